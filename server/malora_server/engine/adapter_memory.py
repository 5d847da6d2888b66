"""How much memory adapters have in each tier, and the store over it."""

from __future__ import annotations

import torch

from malora.kernels.resident import ResidentAdapters
from malora_server.adapters.loading import Loader
from malora_server.adapters.memory import HostMemory
from malora_server.adapters.store import AdapterStore
from malora_server.engine.config import EngineConfig
from malora_server.model.loader import LoadedModel, free_memory

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
