"""The adapters folder: every folder in it is an adapter, under its own name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from malora.limits import CONFIG_NAME, WEIGHTS_NAME
from malora_server.engine.messages import AdapterVersion

MAX_NAME_LENGTH = 255


@dataclass(frozen=True)
class Signature:
    """By which a change of an adapter's files is noticed, without reading them."""

    files: tuple[tuple[int, int, int], ...]
    """Of each file: when it was written, its size, its inode."""

    @classmethod
    def of(cls, folder: Path) -> Signature | None:
        """The signature of an adapter folder as it is now; None where there is none, or a link."""
        if folder.is_symlink() or not folder.is_dir():
            return None
        files = []
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            try:
                found = (folder / name).stat()
            except OSError:
                files.append((0, 0, 0))
            else:
                files.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return cls(tuple(files))


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter folder, as it was found."""

    name: str
    path: Path
    signature: Signature
    created: int
    """Unix seconds."""


def is_name(name: str) -> bool:
    """Whether an adapter may be called so: one visible folder's name, on every system."""
    return (
        0 < len(name.encode(errors="replace")) <= MAX_NAME_LENGTH
        and name[0] != "."
        and name.isprintable()
        and not any(char in "/\\" for char in name)
    )


def find_adapter(root: Path, name: str, path: str | None = None) -> FoundAdapter | None:
    """What lies under a name; None where there is nothing that may be served.

    path: the folder, from the root, where it is another than the name says.
    """
    return _found(root / (name if path is None else path), name) if is_name(name) else None


def find_adapters(root: Path) -> list[FoundAdapter]:
    """Every adapter folder, by name. Reads no file. OSError where the root cannot be read."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if is_name(entry.name))
    found = (find_adapter(root, name) for name in names)
    return [adapter for adapter in found if adapter is not None]


def _found(path: Path, name: str) -> FoundAdapter | None:
    try:
        signature = Signature.of(path)
        created = int(path.stat().st_mtime)
    except OSError:
        return None
    return None if signature is None else FoundAdapter(name, path, signature, created)


class Catalog:
    """The versions of the adapters in a folder, for who serves them without the API."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._versions: dict[str, tuple[Signature, AdapterVersion]] = {}

    def names(self) -> list[str]:
        """Every adapter that is in the folder now."""
        return [] if self._root is None else [found.name for found in find_adapters(self._root)]

    def version(self, name: str) -> AdapterVersion:
        """What lies under that name now; a version without a path where nothing does."""
        found = None if self._root is None else find_adapter(self._root, name)
        if found is None:
            return AdapterVersion(name)
        signature, version = self._versions.get(name, (None, AdapterVersion(name)))
        if signature != found.signature:
            version = AdapterVersion(name, version.number + 1, str(found.path))
            self._versions[name] = found.signature, version
        return version
