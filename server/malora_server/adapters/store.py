"""The adapters an engine serves: every folder under one root, under the folder's name."""

from __future__ import annotations

import logging
from pathlib import Path

from malora.format import Adapter, AdapterFormatError, BaseModelSpec, load_adapter
from malora.kernels.resident import ResidentAdapter, ResidentAdapters
from malora_server.engine.messages import AdapterInfo

logger = logging.getLogger(__name__)


class AdapterStore:
    """Loads adapters from their folders onto the device.

    An adapter that cannot be loaded is listed with its reason and harms nothing else.
    """

    def __init__(self, root: Path | None, spec: BaseModelSpec, resident: ResidentAdapters) -> None:
        """Raises FileNotFoundError where `root` is not a folder."""
        if root is not None and not root.is_dir():
            raise FileNotFoundError(f"the adapters folder {str(root)!r} does not exist")
        self._root = root
        self._spec = spec
        self._memory = resident
        self._resident: dict[str, ResidentAdapter] = {}
        self._info: dict[str, AdapterInfo] = {}

    def load_all(self) -> None:
        """Load every adapter under the root, in the order of their names."""
        if self._root is None:
            return
        folders = sorted(p for p in self._root.iterdir() if p.is_dir() and p.name[0] != ".")
        for folder in folders:
            self._load(folder)

    def _load(self, folder: Path) -> None:
        name = folder.name
        created = int(folder.stat().st_mtime)
        try:
            adapter = load_adapter(folder, self._spec)
        except AdapterFormatError as error:
            logger.error("adapter %s is not served: %s", name, error)
            self._info[name] = AdapterInfo(name=name, created=created, error=str(error))
            return
        self._resident[name] = self._memory.add(adapter.digest, adapter.linears)
        self._info[name] = _describe(name, adapter, created)
        logger.info("adapter %s loaded (%s)", name, adapter.digest[:16])

    def infos(self) -> list[AdapterInfo]:
        """Every adapter under the root, the broken ones with their reason."""
        return list(self._info.values())

    def get(self, name: str) -> ResidentAdapter:
        """The adapter, on the device.

        Raises KeyError, with a message for the user, where it is unknown or broken.
        """
        if name in self._resident:
            return self._resident[name]
        if name in self._info:
            raise KeyError(f"adapter {name!r} cannot be served: {self._info[name].error}")
        raise KeyError(f"adapter {name!r} does not exist")


def _describe(name: str, adapter: Adapter, created: int) -> AdapterInfo:
    config = adapter.config
    linears = adapter.linears.values()
    return AdapterInfo(
        name=name,
        digest=adapter.digest,
        peft_type=str(getattr(config.peft_type, "value", config.peft_type)),
        num_experts=max(linear.num_experts for linear in linears),
        top_k=max(linear.top_k for linear in linears),
        r=max(linear.r for linear in linears),
        basis_dim=max(linear.basis_dim for linear in linears),
        target_modules=sorted({path.rsplit(".", 1)[-1] for path in adapter.linears}),
        num_parameters=adapter.num_parameters,
        num_bytes=adapter.num_bytes,
        created=created,
    )
