"""What was asked of adapters at run time, kept in the adapters folder: known after a restart."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

MANIFEST_NAME = ".malora-adapters.json"


class ManifestEntry(msgspec.Struct, frozen=True):
    """An adapter that was loaded or pinned by a call."""

    source: str
    """As the call named it."""
    path: str
    """Of the folder, from the adapters folder."""
    pinned: bool = False


class Manifest(msgspec.Struct, frozen=True):
    """Adapters that were loaded by calls, and folders that are not served though they are there."""

    adapters: dict[str, ManifestEntry] = {}
    removed: list[str] = []

    @classmethod
    def read(cls, root: Path) -> Manifest:
        """The folder's manifest; an empty one where there is none.

        Raises OSError or ValueError, with a message for the user, where it cannot be read.
        """
        try:
            return msgspec.json.decode((root / MANIFEST_NAME).read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()
        except msgspec.DecodeError as error:
            raise ValueError(
                f"{MANIFEST_NAME} in the adapters folder is damaged ({error}): mend or delete it"
            ) from None

    def write(self, root: Path) -> None:
        """Replace the folder's manifest, wholly or not at all. OSError where that fails."""
        document = msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
        handle, partial = tempfile.mkstemp(dir=root, prefix=f"{MANIFEST_NAME}.")
        try:
            with open(handle, "wb") as file:
                file.write(document)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, root / MANIFEST_NAME)
        except BaseException:
            os.unlink(partial)
            raise
        folder = os.open(root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def with_adapter(self, name: str, entry: ManifestEntry) -> Manifest:
        """The same, with an adapter that is served."""
        removed = [each for each in self.removed if each != name]
        return Manifest({**self.adapters, name: entry}, removed)

    def without_adapter(self, name: str, *, hidden: bool) -> Manifest:
        """The same, without an adapter; `hidden`: though a folder of its name is there."""
        adapters = {known: entry for known, entry in self.adapters.items() if known != name}
        removed = [each for each in self.removed if each != name]
        return Manifest(adapters, [*removed, name] if hidden else removed)
