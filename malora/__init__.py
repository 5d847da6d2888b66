"""Mixtures of asymmetric LoRA experts (MALoRA, arXiv 2410.22782): training, format, kernels.

`from malora import MaloraConfig` (or `import malora.tuner`) registers the method with PEFT, so that
`get_peft_model`, `PeftModel.from_pretrained` and the trainers built on them know it. Importing the
bare package costs nothing: the command line and the API process need no torch to start.
"""

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from malora.config import MaloraConfig
    from malora.tuner import MaloraModel

__all__ = ["MaloraConfig", "MaloraModel"]

# OpenMP threads that spin while they wait take the core that another process needs, and then wait
# for it a scheduler's slice at a time: beside one busy neighbour, such as the API process, small
# products took 25 times longer. A short spin keeps the idle machine's speed. The runtime reads it
# when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Huge pages for large tensors: a decode step walks over all weights, and over most of the pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# transformers imports torchao where it is there, which warns of kernels that a torch for the CPU
# cannot load, and makes torch warn of its enums: neither is the user's to mend.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from malora import config, tuner

    return getattr(config if name == "MaloraConfig" else tuner, name)
