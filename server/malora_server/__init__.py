"""The service: an API process and an engine process, one base model and many adapters."""

import malora  # noqa: F401  # sets how OpenMP threads wait, before torch is loaded
