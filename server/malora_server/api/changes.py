"""Changes of adapters that are asked for: what is loaded, replaced, pinned or removed by a call.

One change of a name at a time. A change is checked wholly, then recorded in the manifest, then
made: where it fails, everything is as it was.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from malora_server.adapters.catalog import FoundAdapter, find_adapter, is_name
from malora_server.adapters.manifest import Manifest, ManifestEntry
from malora_server.adapters.sources import AdapterSourceError, fetch_adapter
from malora_server.api.errors import ApiError, invalid
from malora_server.api.registry import ModelRegistry, ServedAdapter

logger = logging.getLogger(__name__)

_SOURCE_STATUSES = {
    "adapter_source_not_found": 404,
    "adapter_source_unavailable": 502,
    "adapter_cache_unwritable": 507,
}


class AdapterChanges:
    """Changes the registry's adapters, and the manifest with them."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._busy: set[str] = set()
        self._writing = asyncio.Lock()

    async def put(
        self,
        name: str,
        source: str | None,
        *,
        pinned: bool | None,
        expected_generation: str | None,
    ) -> ServedAdapter:
        """Load an adapter from its source and serve it under the name, in place of what was there.

        source: a folder under the adapters folder, hf://… or s3://…; None: what the name had, or
        its folder. pinned: None leaves it as it is. expected_generation: the one to replace.
        """
        registry, root = self._registry, self._root()
        with self._alone(name):
            known = registry.adapters.get(name)
            await self._expect(known, expected_generation)
            if source is None:
                source = name if known is None else known.source
            if pinned is None:
                pinned = known is not None and known.pinned
            found = await self._find(root, name, source)
            generation = registry.new_generation(found)
            try:
                await registry.load(generation)
                if pinned:
                    await registry.pin(generation, True)
                path = str(found.path.relative_to(root))
                entry = ManifestEntry(source, path, pinned)
                await self._record(lambda manifest: manifest.with_adapter(name, entry))
            except BaseException:
                registry.retire(generation)
                raise
            return registry.switch(generation, source, pinned=pinned)

    async def delete(self, name: str) -> None:
        """Serve an adapter no more; its memory is free once requests in flight are done.

        The folder stays where it is, and is no longer noticed.
        """
        root = self._root()
        with self._alone(name):
            self._registry.adapter(name)
            hidden = find_adapter(root, name) is not None
            await self._record(lambda manifest: manifest.without_adapter(name, hidden=hidden))
            if name in self._registry.adapters:
                self._registry.drop(name)

    async def pin(self, name: str, pinned: bool) -> ServedAdapter:
        """Keep an adapter on the device, or no more."""
        root = self._root()
        with self._alone(name):
            adapter = self._registry.adapter(name)
            await self._registry.pin(adapter.current, pinned)
            path = str(Path(adapter.current.version.path).relative_to(root))
            entry = ManifestEntry(adapter.source, path, pinned)
            try:
                await self._record(lambda manifest: manifest.with_adapter(name, entry))
            except BaseException:
                await self._registry.pin(adapter.current, adapter.pinned)
                raise
            adapter.pinned = pinned
            return adapter

    def was_loaded(self, name: str) -> bool:
        """Whether a call has put the adapter there, beside the folder that may bear its name."""
        return name in self._registry.manifest.adapters

    def _root(self) -> Path:
        if self._registry.root is None:
            raise ApiError(
                400,
                "This server has no adapters folder: start it with --adapters.",
                code="adapters_disabled",
            )
        return self._registry.root

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        if not is_name(name):
            raise invalid("name", "An adapter's name is a folder's: no '/', no '.' at its start.")
        if name == self._registry.base.name:
            raise invalid("name", f"{name!r} is the base model.")
        if name in self._busy:
            raise ApiError(
                409,
                f"Adapter {name!r} is being changed by another request; try again shortly.",
                code="adapter_busy",
                headers={"Retry-After": "1"},
            )
        self._busy.add(name)
        try:
            yield
        finally:
            self._busy.discard(name)

    async def _expect(self, known: ServedAdapter | None, expected: str | None) -> None:
        if expected is None:
            return
        if known is not None and not known.current.id:
            await self._registry.load(known.current)  # whose content nobody has read yet
        generation = "" if known is None else known.current.id
        if generation != expected:
            now = f"it has {generation!r}" if generation else "there is none"
            raise ApiError(
                409,
                f"The adapter was to have generation {expected!r}, but {now}.",
                code="generation_mismatch",
                param="expected_generation",
            )

    async def _find(self, root: Path, name: str, source: str) -> FoundAdapter:
        if "://" in source:
            try:
                fetched = await asyncio.to_thread(fetch_adapter, source, root)
            except AdapterSourceError as error:
                status = _SOURCE_STATUSES.get(error.code, 400)
                raise ApiError(status, str(error), code=error.code, param="source") from None
            path = str(fetched.folder.relative_to(root))
        else:
            path = folder_under(root, source)
        found = find_adapter(root, name, path)
        if found is None:
            raise ApiError(
                404,
                f"There is no folder {source!r} in the adapters folder.",
                code="adapter_not_found",
                param="source",
            )
        return found

    async def _record(self, change: Callable[[Manifest], Manifest]) -> None:
        root = self._root()
        async with self._writing:
            manifest = change(self._registry.manifest)
            try:
                await asyncio.to_thread(manifest.write, root)
            except OSError as error:
                logger.error("the manifest cannot be written: %s", error)
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                raise ApiError(
                    507 if full else 500,
                    "The change cannot be recorded in the adapters folder, so it was not made: "
                    + ("its disk is full." if full else "it cannot be written to."),
                    code="manifest_unwritable",
                ) from None
            self._registry.manifest = manifest


def folder_under(root: Path, source: str) -> str:
    """The path, from the root, that a call means; ApiError where it may lead out of it."""
    path = Path(source)
    if path.is_absolute():
        if not path.is_relative_to(root) or path == root:
            raise _forbidden()
        path = path.relative_to(root)
    parts = path.parts
    if not parts or not all(is_name(part) for part in parts):
        raise _forbidden()
    for length in range(1, len(parts) + 1):
        if root.joinpath(*parts[:length]).is_symlink():
            raise _forbidden()
    return str(path)


def _forbidden() -> ApiError:
    return ApiError(
        400,
        "An adapter's folder must lie in the adapters folder, and be reached without '..', hidden "
        "folders and links.",
        code="adapter_path_forbidden",
        param="source",
    )
