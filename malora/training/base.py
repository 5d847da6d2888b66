"""Loading the frozen base model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from malora.pretrained import load_pretrained

Precision = Literal["auto", "bf16", "float32"]


def resolve_precision(precision: Precision) -> Literal["bf16", "float32"]:
    """The precision to compute in: `auto` is bf16 on CUDA and float32 on the CPU."""
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() else "float32"
    return precision


def load_tokenizer(base: str | Path) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """The tokenizer and the configuration of the model at a folder or hub id, without weights.

    Raises ValueError, in one sentence, where there is none.
    """
    try:
        config = AutoConfig.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(_missing(base, error)) from error
    return tokenizer, config


def load_model(base: str | Path, precision: Precision) -> PreTrainedModel:
    """The causal language model at a folder or hub id, on the GPU if there is one, in eval mode.

    Its weights are bfloat16 or float32, as `precision` says. Raises ValueError, in one sentence,
    where there is none.
    """
    dtype = torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32
    try:
        model = load_pretrained(base, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(_missing(base, error)) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def context_length(config: PretrainedConfig) -> int:
    """How many tokens, prompt and completion together, the model reads."""
    return int(config.get_text_config().max_position_embeddings)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to fill short rows with; masked everywhere, so the end of sequence serves as well."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _missing(base: str | Path, error: Exception) -> str:
    if Path(base).is_dir():
        reason = str(error).strip().splitlines()[0]
        return f"the base model in {base} cannot be loaded: {reason}"
    return f"there is no base model at {base}: neither a folder nor a model id that can be fetched"
