"""Random base models and adapters to measure on: shapes and bytes are real, weights are not."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import peft
import torch
import transformers

from malora.config import MaloraConfig

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
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, tokenizer: Path) -> None:
    """A random Llama of the SMALL shape, float32, with the tokenizer of the folder `tokenizer`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, eos_token_id=0, bos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


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
