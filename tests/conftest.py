"""Set before anything imports torch or triton, which read the environment once."""

import os

import malora  # noqa: F401  for what it sets; see there

if not os.path.exists("/dev/nvidiactl"):  # no GPU: its kernels run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
