import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from malora.router import gates, load_balancing_loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@given(st.integers(1, 9), st.data())
def test_gates_are_the_softmax_of_the_selected_logits(
    num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(5, num_experts, dtype=torch.float64, generator=generator) * 3
    weights, indices = gates(logits, top_k)

    whole = logits.softmax(-1)
    for row in range(5):
        best = sorted(range(num_experts), key=lambda t: -float(logits[row, t]))[:top_k]
        assert indices[row].tolist() == best
        kept = whole[row, best]
        torch.testing.assert_close(weights[row, best], kept / kept.sum())
        assert weights[row].count_nonzero() == top_k


def test_gates_of_all_experts_are_the_plain_softmax() -> None:
    logits = torch.randn(2, 3, 6)
    torch.testing.assert_close(gates(logits, 6)[0], logits.softmax(-1))


def test_gates_are_float32_for_bfloat16_logits_and_differentiable() -> None:
    logits = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    weights, _ = gates(logits, 2)
    assert weights.dtype == torch.float32
    (weights**2).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def naive_loss(logits: torch.Tensor, top_k: int, mask: list[bool]) -> float:
    """The published formula for one linear, token by token."""
    tokens = [row for row, keep in zip(logits.tolist(), mask, strict=True) if keep]
    n_experts = logits.shape[-1]
    share, probability = [0.0] * n_experts, [0.0] * n_experts
    for row in tokens:
        softmax = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
        for t in sorted(range(n_experts), key=lambda t: -row[t])[:top_k]:
            share[t] += 1 / top_k / len(tokens)
        for t in range(n_experts):
            probability[t] += softmax[t] / len(tokens)
    return n_experts * sum(f * p for f, p in zip(share, probability, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_loss_is_the_published_formula_averaged_over_linears(top_k: int) -> None:
    logits = torch.randn(3, 7, 4, dtype=torch.float64) * 2
    mask = [True, True, False, True, True, False, True]
    expected = sum(naive_loss(each, top_k, mask) for each in logits) / 3
    actual = load_balancing_loss(logits, top_k, torch.tensor(mask))
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_loss_ignores_padding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4)
    padded = torch.cat([logits, torch.full((2, 5, 4), 50.0)], dim=1)
    mask = torch.tensor([1] * 6 + [0] * 5)
    torch.testing.assert_close(load_balancing_loss(padded, 2, mask), load_balancing_loss(logits, 2))
    assert load_balancing_loss(padded, 2) != load_balancing_loss(logits, 2)


def test_loss_is_one_when_balanced_and_n_when_one_expert_takes_all() -> None:
    balanced = torch.eye(4).mul(30).unsqueeze(0)
    assert load_balancing_loss(balanced, 1).item() == pytest.approx(1)
    collapsed = torch.tensor([30.0, 0, 0, 0]).expand(1, 9, 4)
    assert load_balancing_loss(collapsed, 1).item() == pytest.approx(4)


def test_loss_of_padding_alone_is_zero() -> None:
    assert load_balancing_loss(torch.randn(1, 3, 4), 2, torch.zeros(3)).item() == 0


def test_descending_the_loss_balances_the_experts() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(64, 8), torch.randn(4, 8) * 0.1
    weight[0] += 1
    weight.requires_grad_()
    before = load_balancing_loss((x.abs() @ weight.T)[None], 1)
    optimizer = torch.optim.SGD([weight], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        load_balancing_loss((x.abs() @ weight.T)[None], 1).backward()
        optimizer.step()
    after = load_balancing_loss((x.abs() @ weight.T)[None], 1)
    assert before > 3
    assert after < 1.5
