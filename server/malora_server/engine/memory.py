"""How much memory adapters have, with the store over it, and how much keys and values have."""

from __future__ import annotations

import math

import torch

from malora.kernels.resident import ResidentAdapters
from malora_server.adapters.loading import Loader
from malora_server.adapters.memory import HostMemory
from malora_server.adapters.store import AdapterStore
from malora_server.engine.config import EngineConfig
from malora_server.model.attention import cache_bytes_per_block
from malora_server.model.loader import LoadedModel, free_memory

CACHE_SHARES = {"cpu": 0.5, "cuda": 0.85}
"""The share of the memory left by the weights and the adapters that the KV cache may take where
`kv_cache_memory` is not given. The rest is for activations, graphs and, on the CPU, others."""
_GIB = 2**30


def device_capacity(config: EngineConfig, loaded: LoadedModel) -> int:
    """Bytes of the device's memory that adapters may take."""
    if config.adapter_device_memory is not None:
        return config.adapter_device_memory
    if config.adapters is None:
        return 0
    free = free_memory(loaded.device)
    return free // 10 if loaded.device.type == "cuda" else min(_GIB, free // 8)


def host_capacity(config: EngineConfig, loaded: LoadedModel, device_bytes: int) -> int:
    """Bytes of the host's memory that adapters may take, those on the device included.

    Raises ValueError where it could not hold those.
    """
    if config.adapters is None:
        return 0
    if config.adapter_host_memory is None:
        return device_bytes + 4 * _GIB if loaded.device.type == "cuda" else 2 * device_bytes
    if config.adapter_host_memory < device_bytes:
        raise ValueError(
            f"--adapter-host-memory ({config.adapter_host_memory:,} bytes) must be no less than "
            f"the device memory for adapters ({device_bytes:,} bytes): what is on the device is in "
            "host memory too"
        )
    return config.adapter_host_memory


def make_store(
    config: EngineConfig, loaded: LoadedModel, device_bytes: int, host_bytes: int
) -> tuple[AdapterStore, ResidentAdapters]:
    """The store over two memories of these sizes, and what is on the device.

    Raises OSError, with a message for the user, where they cannot be had.
    """
    on_cpu = loaded.device.type == "cpu"
    device_memory = HostMemory(device_bytes, shared=False) if on_cpu else None
    resident = ResidentAdapters(
        loaded.groups,
        torch.float32 if on_cpu else loaded.dtype,  # the CPU's kernel reads single precision
        torch.empty(device_bytes, dtype=torch.uint8, device=loaded.device)
        if device_memory is None
        else device_memory.tensor,
    )
    if config.adapters is None:
        return AdapterStore(resident, device_memory, None, None), resident
    host_memory = HostMemory(host_bytes, shared=True)
    if not on_cpu:
        host_memory.pin()
    loader = Loader(host_memory, loaded.spec, resident.paths, resident.dtype)
    return AdapterStore(resident, device_memory, host_memory, loader), resident


def count_blocks(
    config: EngineConfig, loaded: LoadedModel, max_model_len: int, adapters: int, reserved: int
) -> int:
    """How many blocks the KV cache has.

    adapters: the bytes of the device's memory kept for those. reserved: bytes that are free now,
    but others' later.

    Raises ValueError where not one sequence would fit.
    """
    per_block = cache_bytes_per_block(loaded.model, config.block_size, loaded.dtype)
    a_sequence = math.ceil(max_model_len / config.block_size)
    free = max(0, free_memory(loaded.device) - reserved)
    left = (
        f"{free:,} bytes are free beside the weights ({loaded.num_bytes:,}) and the adapters "
        f"({adapters:,})"
    )
    if config.kv_cache_memory is not None:
        blocks = config.kv_cache_memory // per_block
        if blocks < a_sequence:
            raise ValueError(
                f"the KV cache's {config.kv_cache_memory:,} bytes hold {blocks} blocks, but one "
                f"sequence of {max_model_len} tokens takes {a_sequence} ({a_sequence * per_block:,}"
                " bytes): raise --kv-cache-memory or lower --max-model-len"
            )
        if config.kv_cache_memory > free:
            raise ValueError(
                f"the KV cache cannot have the {config.kv_cache_memory:,} bytes of "
                f"--kv-cache-memory: {left}"
            )
        return blocks
    share = CACHE_SHARES[loaded.device.type]
    fits = int(free * share) // per_block
    if fits < a_sequence:
        raise ValueError(
            f"{left}, {share:.0%} of which the KV cache may take: that holds {fits} blocks of "
            f"{per_block:,} bytes, but one sequence of {max_model_len} tokens takes {a_sequence}: "
            "lower --max-model-len or free memory"
        )
    # More than every running sequence at its longest, twice over for cached prefixes, is waste.
    return min(fits, 2 * a_sequence * config.max_num_seqs)
