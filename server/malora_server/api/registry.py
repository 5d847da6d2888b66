"""The names requests may give as `model`: the base model, and the adapters in the folder.

An adapter's content at one time is a generation. A request keeps the one it began with; when the
name's content changes, later requests get the next one, and the old one goes with its last request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from malora.limits import CONFIG_NAME, MAX_CONFIG_BYTES
from malora_server.adapters.catalog import FoundAdapter, Signature, find_adapter, find_adapters
from malora_server.adapters.manifest import Manifest
from malora_server.adapters.sources import prune_cache
from malora_server.api.errors import ApiError, engine_dead
from malora_server.engine.messages import (
    AdapterInfo,
    AdapterStatus,
    AdapterVersion,
    LoadAdapter,
    PinAdapter,
    RetireAdapter,
)
from malora_server.settings import StartError

if TYPE_CHECKING:
    from malora_server.engine.client import EngineClient
    from malora_server.engine.supervisor import EngineSupervisor

logger = logging.getLogger(__name__)

_GENERATION_LENGTH = 16
_SCAN_SECONDS = 1.0
_STATUSES = {
    "adapter_not_found": 404,
    "adapter_load_failed": 503,
    "adapter_changed": 503,
    "adapter_no_room": 507,
}
"""Of adapters' error codes that are not the adapter's fault: others are 400."""


@dataclass(eq=False)
class Generation:
    """One content of an adapter, in use since it became the name's, until its last request ends."""

    version: AdapterVersion
    signature: Signature
    created: int
    """Unix seconds."""
    status: AdapterStatus
    """What the engine told of it last."""
    num_in_flight: int = 0
    last_used: float | None = None
    """Unix seconds."""
    retired: bool = False

    @classmethod
    def of(cls, name: str, number: int, found: FoundAdapter) -> Generation:
        """A generation that nobody has read yet."""
        version = AdapterVersion(name, number, str(found.path))
        status = AdapterStatus(name, number, "unloaded")
        return cls(version, found.signature, found.created, status)

    @property
    def id(self) -> str:
        """What names the generation: its digest's beginning; '' until it was read."""
        return self.status.digest[:_GENERATION_LENGTH]


@dataclass(eq=False)
class ServedAdapter:
    """An adapter's name, and what it stands for now."""

    name: str
    source: str
    """Where it came from, as a call named it, or its folder's name."""
    current: Generation
    pinned: bool = False
    seen: Signature | None = None
    """Of its folder when it was looked at last."""


@dataclass(frozen=True)
class ServedModel:
    """What a name stands for, for one request: a generation, or the base model."""

    name: str
    created: int
    generation: Generation | None = None

    @property
    def version(self) -> AdapterVersion | None:
        """What to tell the engine."""
        return self.generation.version if self.generation else None

    @property
    def fingerprint(self) -> str:
        """What `system_fingerprint` says. It is known once the engine sends the first token."""
        return self.generation.id if self.generation else "base"


@dataclass
class _Waiter:
    """Somebody who waits for the engine to tell of a version."""

    future: asyncio.Future[AdapterStatus]
    wants_pinned: bool | None = None
    """None: to be loaded, or to have failed."""

    def is_answered(self, status: AdapterStatus) -> bool:
        if self.wants_pinned is not None and status.error is None:
            return status.pinned == self.wants_pinned
        return status.tier in ("host", "device", "failed") or status.error is not None


class ModelRegistry:
    """Looks models up by name, and follows the adapters folder. Belongs to one event loop."""

    def __init__(self, base_name: str, root: Path | None, engine: EngineSupervisor) -> None:
        """Raises StartError where an adapter bears the base model's name, or the folder's manifest
        cannot be read.
        """
        self.base = ServedModel(base_name, int(time.time()))
        self.root = root
        self.adapters: dict[str, ServedAdapter] = {}
        """Every adapter, those that turned out to be broken included."""
        self.manifest = Manifest()
        self._engine = engine
        self._numbers: dict[str, int] = {}
        self._generations: dict[tuple[str, int], Generation] = {}
        self._waiters: dict[tuple[str, int], list[_Waiter]] = {}
        if root is not None:
            self._open(root)

    def _open(self, root: Path) -> None:
        try:
            self.manifest = Manifest.read(root)
            found = find_adapters(root)
        except (OSError, ValueError) as error:
            raise StartError(str(error)) from None
        prune_cache(root, [root / entry.path for entry in self.manifest.adapters.values()])
        names = {adapter.name for adapter in found} | self.manifest.adapters.keys()
        if self.base.name in names - set(self.manifest.removed):
            raise StartError(
                f"adapter {self.base.name!r} has the base model's name; rename its folder, or name "
                "the base model with --served-model-name"
            )
        self._follow(*self._look())

    # Looking up.

    def resolve(self, name: str, *, param: str | None = "model") -> ServedModel:
        """The model of that name; ApiError 404 where none is, 400 where its adapter is broken."""
        if name == self.base.name:
            return self.base
        adapter = self.adapters.get(name)
        if adapter is None or adapter.current.status.tier == "failed":
            adapter = self._look_again(name)
        if adapter is None:
            raise self._unknown(name, param)
        generation = adapter.current
        if generation.status.tier == "failed":
            raise refusal(name, generation.status.error, generation.status.error_code, param)
        return ServedModel(name, generation.created, generation)

    def adapter(self, name: str) -> ServedAdapter:
        """What is known of an adapter, broken or not; ApiError 404 where there is none."""
        adapter = self.adapters.get(name) or self._look_again(name)
        if adapter is None:
            raise self._unknown(name, None)
        return adapter

    def models(self) -> list[ServedModel]:
        """What can be asked for, the base model first."""
        served = [
            ServedModel(adapter.name, adapter.current.created, adapter.current)
            for adapter in sorted(self.adapters.values(), key=lambda adapter: adapter.name)
            if adapter.current.status.tier != "failed"
        ]
        return [self.base, *served]

    @contextmanager
    def in_use(self, model: ServedModel) -> Iterator[None]:
        """Count a request for a model while it is in flight."""
        generation = model.generation
        if generation is None:
            yield
            return
        generation.num_in_flight += 1
        generation.last_used = time.time()
        try:
            yield
        finally:
            generation.num_in_flight -= 1
            self._forget_if_done(generation)

    def _unknown(self, name: str, param: str | None) -> ApiError:
        return ApiError(
            404,
            f"The model {name!r} does not exist; GET /v1/models lists those that do.",
            code="model_not_found",
            param=param,
        )

    # Following the folder.

    async def watch(self) -> None:
        """Follow the adapters folder for ever: what is added, changed or removed there."""
        while self.root is not None:
            await asyncio.sleep(_SCAN_SECONDS)
            try:
                self._follow(*await asyncio.to_thread(self._look))
            except OSError as error:
                logger.error("the adapters folder cannot be read: %s", error)

    def _look(self) -> tuple[Manifest, dict[str, FoundAdapter]]:
        """What lies in the folder now, or where the manifest says."""
        assert self.root is not None
        manifest = self.manifest
        found = {adapter.name: adapter for adapter in find_adapters(self.root)}
        for name in manifest.removed:
            found.pop(name, None)
        for name, entry in manifest.adapters.items():
            located = find_adapter(self.root, name, entry.path)
            if located is None:
                found.pop(name, None)
            else:
                found[name] = located
        found.pop(self.base.name, None)
        return manifest, found

    def _follow(self, manifest: Manifest, found: dict[str, FoundAdapter]) -> None:
        if manifest is not self.manifest:
            return  # a call has changed something meanwhile: the next look will tell
        for name in self.adapters.keys() - found.keys():
            # Not one that a call put there while the folder was looked at.
            if not self._is_there(self.adapters[name]):
                logger.info("adapter %s is gone", name)
                self.drop(name)
        for name, adapter in found.items():
            known = self.adapters.get(name)
            if known is None:
                self._notice(adapter)
            elif adapter.path == Path(known.current.version.path):
                changed = adapter.signature != known.current.signature
                # Seen twice, so that nothing is read that is still being written.
                if changed and adapter.signature == known.seen:
                    self._notice(adapter)
                known.seen = adapter.signature

    def _look_again(self, name: str) -> ServedAdapter | None:
        """An adapter that is unknown or broken, looked at now."""
        known = self.adapters.get(name)
        if self.root is None or name == self.base.name:
            return known
        entry = self.manifest.adapters.get(name)
        if entry is None and name in self.manifest.removed:
            return None
        found = find_adapter(self.root, name, None if entry is None else entry.path)
        if found is None or (known is not None and found.signature == known.current.signature):
            return known
        return self._notice(found)

    def _is_there(self, adapter: ServedAdapter) -> bool:
        try:
            return (
                adapter.name not in self.manifest.removed
                and Signature.of(Path(adapter.current.version.path)) is not None
            )
        except OSError:
            return False

    def _notice(self, found: FoundAdapter) -> ServedAdapter:
        """Serve what was found from now on."""
        name = found.name
        entry = self.manifest.adapters.get(name)
        source = name if entry is None else entry.source
        logger.info("adapter %s is %s", name, "changed" if name in self.adapters else "there")
        pinned = entry is not None and entry.pinned
        return self.switch(self.new_generation(found), source, pinned=pinned)

    # Generations.

    def new_generation(self, found: FoundAdapter) -> Generation:
        """A generation of what was found; to be served once it is `switch`ed to."""
        number = self._numbers[found.name] = self._numbers.get(found.name, 0) + 1
        generation = Generation.of(found.name, number, found)
        self._generations[found.name, number] = generation
        return generation

    def switch(self, generation: Generation, source: str, *, pinned: bool) -> ServedAdapter:
        """Let new requests of the name have this generation; the old one goes when it is done."""
        name = generation.version.name
        old = self.adapters.get(name)
        adapter = ServedAdapter(name, source, generation, pinned, generation.signature)
        self.adapters[name] = adapter
        if old is not None:
            self.retire(old.current)
        if pinned and not generation.status.pinned:
            self._engine.tell(LoadAdapter(generation.version))
            self._engine.tell(PinAdapter(generation.version, True))
        return adapter

    def drop(self, name: str) -> None:
        """Serve a name no more; requests in flight finish."""
        self.retire(self.adapters.pop(name).current)

    def retire(self, generation: Generation) -> None:
        """Give a generation up, once the last request for it has ended."""
        generation.retired = True
        self._engine.tell(RetireAdapter(generation.version))
        self._forget_if_done(generation)

    def _forget_if_done(self, generation: Generation) -> None:
        if generation.retired and generation.num_in_flight == 0:
            key = generation.version.name, generation.version.number
            self._generations.pop(key, None)

    # The engine.

    def on_status(self, status: AdapterStatus) -> None:
        """Take in what the engine tells of a version."""
        key = status.name, status.number
        generation = self._generations.get(key)
        if generation is not None:
            generation.status = status
        waiters = self._waiters.get(key, ())
        for waiter in waiters:
            if waiter.is_answered(status) and not waiter.future.done():
                waiter.future.set_result(status)

    async def on_restart(self, engine: EngineClient) -> None:
        """A new engine has nothing in memory; it is told of pinned adapters again."""
        for generation in self._generations.values():
            version = generation.version
            generation.status = AdapterStatus(
                version.name, version.number, "unloaded", generation.status.digest
            )
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.future.done():
                    waiter.future.set_exception(self._engine_dead())
        self._ask_for_pinned(engine)

    async def load(self, generation: Generation) -> None:
        """Have a generation read and checked wholly. ApiError where it cannot be used."""
        status = await self._ask(generation, LoadAdapter(generation.version), None)
        if status.error is not None:
            name = generation.version.name
            raise refusal(name, status.error, status.error_code, None)

    async def pin(self, generation: Generation, pinned: bool) -> None:
        """Keep a generation on the device, or no more. ApiError 507 where there is no room."""
        if pinned:
            await self.load(generation)
        elif not generation.status.pinned:
            return
        status = await self._ask(generation, PinAdapter(generation.version, pinned), pinned)
        if status.error is not None and status.pinned != pinned:
            raise refusal(generation.version.name, status.error, status.error_code, None)

    def _ask_for_pinned(self, engine: EngineClient) -> None:
        for adapter in self.adapters.values():
            if adapter.pinned:
                engine.tell(LoadAdapter(adapter.current.version))
                engine.tell(PinAdapter(adapter.current.version, True))

    async def _ask(
        self,
        generation: Generation,
        message: LoadAdapter | PinAdapter,
        wants_pinned: bool | None,
    ) -> AdapterStatus:
        key = generation.version.name, generation.version.number
        waiter = _Waiter(asyncio.get_running_loop().create_future(), wants_pinned)
        self._waiters.setdefault(key, []).append(waiter)
        try:
            self._engine.tell(message)
            while not waiter.future.done():
                if not self._engine.healthy:
                    raise self._engine_dead()
                await asyncio.wait({waiter.future}, timeout=0.5)
            return waiter.future.result()
        finally:
            self._waiters[key].remove(waiter)
            if not self._waiters[key]:
                del self._waiters[key]

    def _engine_dead(self) -> ApiError:
        return engine_dead("The engine has stopped; nothing was changed.", self._engine.retry_after)


def refusal(name: str, error: str | None, code: str | None, param: str | None) -> ApiError:
    """The ApiError for an adapter that cannot be used."""
    code = code or "adapter_invalid"
    return ApiError(
        _STATUSES.get(code, 400),
        f"Adapter {name!r} can't be served: {error}",
        code=code,
        param=param,
        headers={"Retry-After": "1"} if _STATUSES.get(code) == 503 else None,
    )


def summary(generation: Generation) -> AdapterInfo:
    """What an adapter is: as the engine read it, or as its configuration alone tells."""
    if generation.status.info is not None:
        return generation.status.info
    file = Path(generation.version.path) / CONFIG_NAME
    try:
        if file.is_symlink() or file.stat().st_size > MAX_CONFIG_BYTES:
            return AdapterInfo()
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return AdapterInfo()
    if not isinstance(document, dict):
        return AdapterInfo()
    numbers = {
        name: document[name]
        for name in ("num_experts", "top_k", "r", "basis_dim")
        if type(document.get(name)) is int
    }
    kind, modules = document.get("peft_type"), document.get("target_modules")
    names = modules if isinstance(modules, list) else []
    return AdapterInfo(
        peft_type=kind if isinstance(kind, str) else "",
        target_modules=sorted(name for name in names if isinstance(name, str)),
        **numbers,
    )
