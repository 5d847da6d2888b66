"""The dense form against the reference, in float64, for every member of the family."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malora.format import AdaptedLinear
from malora.kernels import reference
from malora.kernels.torch import dense_delta


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


FAMILY = ["lora", "hydralora", "molora", "malora"]


def random_linear(
    kind: str, n_experts: int, r: int, d: int, top_k: int, router_input: Any, seed: int
) -> AdaptedLinear:
    """A float64 linear of 7 inputs and 5 outputs; d and top_k give way to what kind fixes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    n_experts = 1 if kind == "lora" else n_experts
    d = {"lora": r, "hydralora": r, "molora": n_experts * r, "malora": d}[kind]
    reads = 7 if router_input == "hidden" else d
    return AdaptedLinear(
        basis=random(d, 7),
        up=random(n_experts, 5, r),
        coefficients=random(n_experts, r, d) if kind == "malora" else None,
        router=random(n_experts, reads) if n_experts > 1 else None,
        router_input=router_input,
        top_k=n_experts if kind == "hydralora" else min(top_k, n_experts),
        scaling=1.7,
    )


linears = st.builds(
    random_linear,
    kind=st.sampled_from(FAMILY),
    n_experts=st.integers(1, 6),
    r=st.integers(1, 4),
    d=st.integers(1, 9),
    top_k=st.integers(1, 6),
    router_input=st.sampled_from(["hidden", "basis"]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=150)
@given(linears, st.integers(1, 4))
def test_dense_delta_is_the_reference(linear: AdaptedLinear, tokens: int) -> None:
    x = torch.randn(tokens, 7, dtype=torch.float64)
    delta, gates = dense_delta(x, linear)
    expected_delta, expected_gates = reference.delta(x, linear)
    torch.testing.assert_close(delta, expected_delta)
    if gates is None:
        assert expected_gates.tolist() == [[1.0]] * tokens
    else:
        torch.testing.assert_close(gates, expected_gates)


@pytest.mark.parametrize("router_input", ["hidden", "basis"])
@pytest.mark.parametrize("kind", FAMILY)
def test_gradients_are_those_of_the_reference(kind: str, router_input: str) -> None:
    linear = random_linear(kind, 4, 3, 5, 2, router_input, seed=11)
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    leaves = {name: t.requires_grad_() for name, t in linear.tensors().items()}
    target = torch.randn(6, 5, dtype=torch.float64)

    def gradients(delta: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(((delta - target) ** 2).sum(), [x, *leaves.values()]))

    actual = gradients(dense_delta(x, linear)[0])
    expected = gradients(reference.delta(x, linear)[0])
    for name, a, e in zip(["x", *leaves], actual, expected, strict=True):
        assert e.abs().sum() > 0, name
        torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}")


def test_the_reference_is_the_formula_written_with_matrices() -> None:
    linear = random_linear("malora", 3, 2, 4, 2, "hidden", seed=3)
    assert linear.coefficients is not None
    assert linear.router is not None
    x = torch.randn(1, 7, dtype=torch.float64)
    logits = (linear.router @ x[0]).tolist()
    first, second = sorted(range(3), key=lambda t: -logits[t])[:2]
    share = 1 / (1 + torch.tensor(logits[second] - logits[first], dtype=torch.float64).exp())
    expected = torch.zeros(5, dtype=torch.float64)
    for expert, gate in ((first, share), (second, 1 - share)):
        weight = linear.up[expert] @ linear.coefficients[expert] @ linear.basis
        expected += 1.7 * gate * (weight @ x[0])
    torch.testing.assert_close(reference.delta(x, linear)[0][0], expected)


def test_a_molora_is_the_malora_whose_coefficients_are_block_selectors() -> None:
    linear = random_linear("molora", 3, 2, 0, 2, "hidden", seed=5)
    selectors = torch.eye(6, dtype=torch.float64).reshape(3, 2, 6)
    x = torch.randn(4, 7, dtype=torch.float64)
    stored = replace(linear, coefficients=selectors)
    torch.testing.assert_close(dense_delta(x, linear), dense_delta(x, stored))


def test_leading_dimensions_are_kept() -> None:
    linear = random_linear("malora", 4, 2, 5, 2, "basis", seed=1)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    delta, gates = dense_delta(x, linear)
    assert gates is not None
    assert delta.shape == (2, 3, 5)
    assert gates.shape == (2, 3, 4)
    torch.testing.assert_close(delta.flatten(0, 1), dense_delta(x.flatten(0, 1), linear)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_in_its_dtype_and_near_the_reference(dtype: torch.dtype) -> None:
    # A dense softmax, since rounding may rightly change which experts come second and third.
    linear = random_linear("malora", 4, 2, 5, 4, "hidden", seed=2)
    low = replace(
        linear,
        basis=linear.basis.to(dtype),
        up=linear.up.to(dtype),
        coefficients=linear.coefficients.to(dtype),  # type: ignore[union-attr]
        router=linear.router.to(dtype),  # type: ignore[union-attr]
    )
    x = torch.randn(8, 7).to(dtype)
    delta, gates = dense_delta(x, low)
    expected, _ = reference.delta(x, low)
    assert gates is not None
    assert (delta.dtype, gates.dtype) == (dtype, torch.float32)
    assert (delta.double() - expected).norm() < 0.02 * expected.norm()
