"""Mixtures of asymmetric LoRA experts (MALoRA, arXiv 2410.22782): training, format, kernels.

Importing this package registers the method with PEFT, so that `get_peft_model`,
`PeftModel.from_pretrained` and the trainers built on them know it.
"""

from malora.config import MaloraConfig
from malora.tuner import MaloraModel

__all__ = ["MaloraConfig", "MaloraModel"]
