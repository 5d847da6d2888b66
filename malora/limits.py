"""The files of an adapter's folder, how large they may be, and the error that refuses one.

Apart from what reads them, so that who only fetches or names them needs no torch.
"""

from __future__ import annotations

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_WEIGHTS_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 4 * 2**20
"""Of the weights file: enough for 20,000 tensors, each of which takes more memory than its name."""


class AdapterFormatError(ValueError):
    """An adapter that cannot be used. `code` is stable; the message is one sentence.

    The message names the tensor or the field at fault, and no path of this machine.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
