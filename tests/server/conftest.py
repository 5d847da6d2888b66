"""Tiny random base models of every family, and adapters for them, saved as users have them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

COMMON = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
FAMILIES = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
}


def save_tokenizer(folder: Path) -> None:
    """One token a byte, and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_base(family)`: the folder of a random model, float32, made once a session."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name, extra = FAMILIES[family]
            config = getattr(transformers, name)(**(COMMON | extra))
            torch.manual_seed(list(FAMILIES).index(family))
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():  # wide enough that greedy tokens differ along a sequence
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.15)
                    else:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            save_tokenizer(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., None]:
    """`make_adapter(base, folder, seed, **config)`: a random adapter, saved through PEFT."""

    def make(base: Path, folder: Path, seed: int, lora: bool = False, **options: object) -> None:
        import peft

        from malora.config import MaloraConfig

        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = (peft.LoraConfig if lora else MaloraConfig)(task_type="CAUSAL_LM", **options)
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or "malora_" in name:
                    parameter.normal_(0, 0.15)
        adapted.save_pretrained(folder)

    return make
