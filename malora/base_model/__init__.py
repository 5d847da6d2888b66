"""The embedded default base model: a small Llama with its own tokenizer, ready to load."""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).resolve().parent
"""The folder that `AutoModelForCausalLM` and `AutoTokenizer` load the default base from."""
