"""Weighted sums of adapters, against PEFT, against merged weights and against float64."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from malora import MaloraConfig
from malora.combine import combine
from malora.format import (
    AdaptedLinear,
    Adapter,
    AdapterFormatError,
    BaseModelSpec,
    load_adapter,
    save_adapter,
    write_adapter,
)
from malora.kernels.reference import delta

Q = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(2, 20).view(2, 9)


def base(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def make(tiny_base: Path, out: Path, kind: type = LoraConfig, **changes: Any) -> Path:
    """An adapter saved by PEFT, with trained-looking weights."""
    torch.manual_seed(len(out.name))
    options = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(base(tiny_base), kind(**{**options, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "malora_up" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["up_proj", "down_proj"]])
def test_it_equals_pefts_cat(tiny_base: Path, tmp_path: Path, targets: list[str]) -> None:
    a = make(tiny_base, tmp_path / "a")
    b = make(tiny_base, tmp_path / "bb", r=2, lora_alpha=3, use_rslora=True, target_modules=targets)
    theirs = PeftModel.from_pretrained(base(tiny_base), a, adapter_name="a")
    theirs.load_adapter(b, adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", combination_type="cat")
    theirs.set_adapter("both")
    expected = theirs(IDS).logits
    combine([(a, 0.7), (b, -1.5)], tmp_path / "both")
    ours = PeftModel.from_pretrained(base(tiny_base), tmp_path / "both")
    torch.testing.assert_close(ours(IDS).logits, expected, atol=2e-5, rtol=2e-5)
    theirs.set_adapter("a")
    assert not torch.allclose(theirs(IDS).logits, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LoraConfig, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 9}}),
        (LoraConfig, {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
        (LoraConfig, {"layers_to_transform": [1], "layers_pattern": "layers"}),
        (LoraConfig, {"target_modules": r".*\.layers\.0\..*(q|down)_proj"}),
        (MaloraConfig, {"num_experts": 1, "top_k": 1, "basis_dim": 6, "target_modules": None}),
        (MaloraConfig, {"num_experts": 1, "top_k": 1, "basis_dim": 4, "coefficients": "identity"}),
    ],
)
def test_peft_and_we_read_it_and_it_adds_the_weighted_updates(
    tiny_base: Path, tmp_path: Path, kind: type, changes: dict[str, Any]
) -> None:
    parts = [
        (make(tiny_base, tmp_path / "a"), 0.6),
        (make(tiny_base, tmp_path / "bb", kind, **changes), -1.25),
        (make(tiny_base, tmp_path / "ccc", r=1, target_modules=["q_proj", "o_proj"]), 2.0),
    ]
    made = combine(parts, tmp_path / "sum")
    merged = base(tiny_base, torch.float64)
    with torch.no_grad():
        for folder, weight in parts:
            for path, linear in load_adapter(folder).linears.items():
                update = linear.up[0].double()
                if linear.coefficients is not None:
                    update = update @ linear.coefficients[0].double()
                update = update @ linear.basis.double()
                merged.get_submodule(path).weight += weight * linear.scaling * update
    adapted = PeftModel.from_pretrained(base(tiny_base, torch.float64), tmp_path / "sum")
    torch.testing.assert_close(adapted(IDS).logits, merged(IDS).logits, atol=1e-5, rtol=1e-5)
    spec = BaseModelSpec.from_model(base(tiny_base))
    assert load_adapter(tmp_path / "sum", spec).digest == made.digest
    assert {linear.scaling for linear in made.linears.values()} == {1.0}


PATHS = {Q: (5, 7), "model.layers.1.self_attn.q_proj": (5, 7), "model.layers.0.mlp.up": (4, 9)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def _adapters(draw: st.DrawFn) -> Adapter:
    """One expert on some of PATHS, each with a rank of its own; as LoRA or with coefficients."""
    paths = draw(st.lists(st.sampled_from(sorted(PATHS)), min_size=1, unique=True))
    ranks = {path: draw(st.integers(1, 4)) for path in paths}
    learned = draw(st.booleans())
    config = MaloraConfig(
        r=max(ranks.values()),
        num_experts=1,
        top_k=1,
        basis_dim=4 if learned else max(ranks.values()),
        coefficients="learned" if learned else "identity",
        lora_alpha=draw(st.floats(0.1, 64)),
        use_rslora=draw(st.booleans()),
        target_modules=list(paths),
        rank_pattern=ranks,
    )
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    linears = {}
    for path, r in ranks.items():
        n, m = PATHS[path]
        linears[path] = AdaptedLinear(
            basis=normal(4 if learned else r, n),
            up=normal(1, m, r),
            coefficients=normal(1, r, 4) if learned else None,
            router=None,
            router_input="hidden",
            top_k=1,
            scaling=config.shape_of(path).scaling,
        )
    return Adapter.of(config, linears)


@given(st.lists(st.tuples(_adapters(), st.floats(-3, 3)), min_size=1, max_size=4))
def test_it_is_the_weighted_sum_of_the_reference_in_float64(
    parts: Sequence[tuple[Adapter, float]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i, (adapter, _) in enumerate(parts):
            save_adapter(adapter, root / str(i))
        combine([(root / str(i), weight) for i, (_, weight) in enumerate(parts)], root / "sum")
        made = load_adapter(root / "sum")
    assert made.linears.keys() == {path for adapter, _ in parts for path in adapter.linears}
    for path, linear in made.linears.items():
        shares = [(a.linears[path], weight) for a, weight in parts if path in a.linears]
        assert linear.r == sum(share.r for share, _ in shares)
        assert linear.basis.dtype == linear.up.dtype == torch.float32
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
        expected = sum(weight * delta(x, share)[0] for share, weight in shares)
        # Sums may cancel: what is rounded is each part's own, and the least that float32 holds.
        size = sum(abs(weight) * delta(x, share)[0].norm() for share, weight in shares)
        assert (delta(x, linear)[0] - expected).norm() <= 1e-6 * size + 1e-30


def lora(folder: Path, r: int = 2, n: int = 48, dtype: Any = torch.float32, **fields: Any) -> Path:
    document = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": ["q_proj"]}
    tensors = {
        f"base_model.model.{Q}.lora_A.weight": torch.ones(r, n, dtype=dtype),
        f"base_model.model.{Q}.lora_B.weight": torch.ones(48, r, dtype=dtype),
    }
    write_adapter(folder, {**document, **fields}, tensors)
    return folder


def refusal(parts: list[tuple[Path, float]], out: Path) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as caught:
        combine(parts, out)
    assert not out.exists()
    return caught.value


def test_routed_experts_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    routed = make(tiny_base, tmp_path / "routed", MaloraConfig, num_experts=2, basis_dim=8)
    error = refusal([(lora(tmp_path / "a"), 1), (routed, 1)], tmp_path / "sum")
    assert error.code == "adapter_type_unsupported"
    assert "routed has 2 experts, weighted anew for every token" in str(error)


def test_ranks_add_up_to_what_is_served_at_most(tmp_path: Path) -> None:
    half, more = lora(tmp_path / "half", r=512), lora(tmp_path / "more", r=513)
    error = refusal([(half, 1), (more, 1)], tmp_path / "sum")
    assert error.code == "adapter_rank_too_large"
    assert f"{Q} add up to 1025, but at most 1024" in str(error)
    assert combine([(half, 1), (half, 1)], tmp_path / "sum").linears[Q].r == 1024


def test_base_models_that_differ_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    one = {"num_experts": 1, "top_k": 1, "basis_dim": 8}
    a = make(tiny_base, tmp_path / "a", MaloraConfig, **one)
    b = make(tiny_base, tmp_path / "b", MaloraConfig, **one)

    def change(**fields: Any) -> None:
        file = b / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    change(base_model_name_or_path="elsewhere/the-same")  # which the fingerprints say it is
    combine([(a, 1), (b, 1)], tmp_path / "same")
    change(base_model_fingerprint="0" * 64)
    error = refusal([(a, 1), (b, 1)], tmp_path / "sum")
    assert error.code == "adapter_base_mismatch"
    assert "a and b were trained on base models of different weights" in str(error)
    change(base_model_fingerprint=None)
    error = refusal([(a, 1), (b, 1)], tmp_path / "sum")
    assert error.code == "adapter_base_mismatch"
    assert "'elsewhere/the-same'" in str(error)
    wide = lora(tmp_path / "wide", n=64)
    error = refusal([(lora(tmp_path / "c"), 1), (wide, 1)], tmp_path / "sum")
    assert error.code == "adapter_shape_mismatch"
    assert f"In c {Q} maps 48 to 48 features, in wide 64 to 48" in str(error)


def test_what_cannot_be_summed(tmp_path: Path) -> None:
    a = lora(tmp_path / "a")
    error = refusal([(a, 1), (lora(tmp_path / "dora", use_dora=True), 1)], tmp_path / "sum")
    assert (error.code, str(error)[:6]) == ("adapter_type_unsupported", "dora: ")
    assert refusal([(a, 1e300)], tmp_path / "sum").code == "adapter_not_finite"
    with pytest.raises(ValueError, match="weight of a must be a finite number, not nan"):
        combine([(a, float("nan"))], tmp_path / "sum")
    with pytest.raises(ValueError, match="no adapter to combine"):
        combine([], tmp_path / "sum")


def test_its_configuration_is_as_short_as_its_parts(tiny_base: Path, tmp_path: Path) -> None:
    a = make(tiny_base, tmp_path / "a")
    b = make(tiny_base, tmp_path / "b", r=8, target_modules=["o_proj", "up_proj"])
    combine([(a, 1), (b, 1)], tmp_path / "sum")
    document = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert document["base_model_name_or_path"] == str(tiny_base)
    assert document["target_modules"] == ["o_proj", "q_proj", "up_proj"]
    ranks = {"q_proj": 4, "up_proj": 12, "o_proj": 8}
    pattern = {name: rank for name, rank in ranks.items() if rank != document["r"]}
    assert document["rank_pattern"] == document["alpha_pattern"] == pattern
