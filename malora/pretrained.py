"""Base models as they lie on disk: safetensors alone, and every weight of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_pretrained(base: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model at a folder or hub id; options are those of `from_pretrained`.

    Raises OSError or ValueError where it is missing, pickled, broken or not whole.
    """
    folder = Path(base)
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            "its weights are pickled (*.bin), and could run code as they are loaded: save the "
            "model as safetensors"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(f"its weights are broken: {error}") from error
    _check_whole(report)
    return cast(PreTrainedModel, model)


def _check_whole(report: dict[str, Any]) -> None:
    """Raises ValueError for weights that were not there: transformers makes some up."""
    for kind, what in (
        ("missing_keys", "lack {}"),
        ("mismatched_keys", "hold {} in shapes that its configuration does not say"),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[kind])
        if names:
            more = f" and {len(names) - 1} more" * (len(names) > 1)
            raise ValueError("its files " + what.format(names[0] + more))
