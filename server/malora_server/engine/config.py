"""What an engine needs to know to start; plain data, so that it crosses to the engine process."""

from __future__ import annotations

from typing import Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's settings.

    base: folder or hub id of the base model. adapters: a folder whose subfolders are adapters.
    max_model_len: tokens of prompt and output (None: the model's own). kv_cache_memory,
    adapter_device_memory, adapter_host_memory: bytes (None: a share of what is free).
    max_slowdown: how many times as long others' requests may take because of a tenant that floods
    (None: unlimited). num_threads: torch's CPU threads (None: torch's choice, and one
    beside a GPU).
    """

    base: str
    adapters: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: Literal["fp8", "int8"] | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_slowdown: float | None = 1.5
    block_size: int = 16
    kv_cache_memory: int | None = None
    adapter_device_memory: int | None = None
    adapter_host_memory: int | None = None
    enable_prefix_caching: bool = True
    num_threads: int | None = None
