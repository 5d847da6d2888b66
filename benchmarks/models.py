"""Random base models and adapters to measure on: shapes and bytes are real, weights are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from safetensors.torch import save_file

from malora.basis import PEFT_PREFIX
from malora.config import MaloraConfig
from malora.format import AdaptedLinear, Adapter, save_adapter
from malora_server.engine.core import EngineCore

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""27.8 M parameters, Llama architecture."""
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "small": SMALL,
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
}
"""Llama 3.1 8B's, Llama 3.2 1B's, and two for a CPU; the last to try a benchmark out."""
CPU = torch.device("cpu")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """The sizes of one kind of adapter; `family`: all share one basis."""

    num_experts: int
    top_k: int
    r: int
    basis_dim: int
    reads_basis: bool = False
    family: bool = False


KINDS = {
    "family": Kind(8, 2, 8, 64, reads_basis=True, family=True),
    "own": Kind(8, 2, 8, 16),
    "lora16": Kind(1, 1, 16, 16),
    "lora64": Kind(1, 1, 64, 64),
}
Sites = Mapping[str, tuple[int, int]]
"""Path of a linear in the base model -> (outputs, inputs)."""


def random_model(
    shape: str, device: torch.device, eos_token_id: int | None = None
) -> transformers.LlamaForCausalLM:
    """A random Llama of one of SHAPES: bfloat16 on a GPU, float32 on the CPU."""
    config = transformers.LlamaConfig(**SHAPES[shape], eos_token_id=eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model


def sites_of(core: EngineCore) -> Sites:
    """The linears that adapters of an engine's base model may adapt."""
    return {
        site.path: (site.width, group.in_features)
        for group in core._loaded.groups
        for site in group.sites
    }


def random_adapters(kind: Kind, sites: Sites, count: int) -> Iterator[dict[str, AdaptedLinear]]:
    """`count` random adapters, bfloat16. All have the same up-projections, in the same memory."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        values = torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)
        return values.to(torch.bfloat16)

    first: dict[str, AdaptedLinear] = {}
    for _ in range(count):
        linears = {}
        for path, (out_features, in_features) in sites.items():
            routed = kind.num_experts > 1
            linear = first.get(path)
            basis = (
                linear.basis
                if linear is not None and kind.family
                else rand(kind.basis_dim, in_features)
            )
            read = kind.basis_dim if kind.reads_basis else in_features
            linears[path] = AdaptedLinear(
                basis=basis,
                up=rand(kind.num_experts, out_features, kind.r) if linear is None else linear.up,
                coefficients=rand(kind.num_experts, kind.r, kind.basis_dim) if routed else None,
                router=rand(kind.num_experts, read) if routed else None,
                router_input="basis" if kind.reads_basis else "hidden",
                top_k=kind.top_k,
                scaling=1.0,
            )
        first = first or linears
        yield linears


def save_random_adapters(kind: Kind, sites: Sites, root: Path, name: str, count: int) -> None:
    """As `random_adapters`, in root/name-0, root/name-1, …: LoRAs as PEFT saves them."""
    for number, linears in enumerate(random_adapters(kind, sites, count)):
        folder = root / f"{name}-{number}"
        if kind.num_experts > 1:
            config = MaloraConfig(
                r=kind.r,
                num_experts=kind.num_experts,
                top_k=kind.top_k,
                basis_dim=kind.basis_dim,
                lora_alpha=kind.r,
                router_input="basis" if kind.reads_basis else "hidden",
                target_modules=MODULES,
                task_type="CAUSAL_LM",
            )
            save_adapter(Adapter.of(config, linears), folder)
            continue
        lora(kind.r).save_pretrained(folder)
        tensors = {}
        for path, linear in linears.items():
            tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = linear.basis
            tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = linear.up[0]
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_base(
    folder: Path, tokenizer: Path, shape: str = "small", device: torch.device = CPU
) -> None:
    """A random Llama of one of SHAPES, made on the device, with the tokenizer of a folder.

    It never chooses a token that the tokenizer does not know.
    """
    model = random_model(shape, device, eos_token_id=0)
    known = transformers.AutoTokenizer.from_pretrained(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[len(known) :] = 0  # some other one has a positive score
    model.save_pretrained(folder)
    known.save_pretrained(folder)


def save_adapters(
    base: Path, root: Path, count: int, config: peft.PeftConfig, name: str, family: bool = False
) -> None:
    """`count` random adapters of one configuration, as root/name-0, root/name-1, …

    family: all in the first one's basis, which the server then keeps once.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, config)
    ours = {n: p for n, p in adapted.named_parameters() if "lora_" in n or "malora_" in n}
    for i in range(count):
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter_name, parameter in ours.items():
                if i == 0 or not (family and "malora_basis" in parameter_name):
                    parameter.normal_(0, 0.02)
        adapted.save_pretrained(root / f"{name}-{i}")


def lora(r: int = 16) -> peft.LoraConfig:
    """PEFT's LoRA on the seven modules."""
    return peft.LoraConfig(r=r, lora_alpha=r, target_modules=MODULES, task_type="CAUSAL_LM")


def malora(router_input: Literal["hidden", "basis"] = "hidden") -> MaloraConfig:
    """Eight experts of rank 8, two a token: each token passes through rank 16."""
    return MaloraConfig(
        r=8,
        num_experts=8,
        top_k=2,
        basis_dim=16,
        router_input=router_input,
        target_modules=MODULES,
        task_type="CAUSAL_LM",
    )
