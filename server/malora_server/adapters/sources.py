"""Where adapters come from beside the adapters folder: the Hugging Face hub and S3.

`fetch_adapter` brings one into a cache under the adapters folder, from where it is loaded as any
other. Tokens, keys and endpoints are taken from where huggingface_hub and s3fs look for them
themselves (`HF_TOKEN`, `AWS_ACCESS_KEY_ID`, …), never from a request.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from malora.limits import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_NAME,
    AdapterFormatError,
)

logger = logging.getLogger(__name__)

CACHE_NAME = ".cache"
"""The cache's folder in the adapters folder, where a hidden folder is no adapter."""
_PARTIAL_PREFIX = ".partial-"
_MAX_SECONDS = 900.0
"""For one file, so that a source that trickles does not keep its caller for ever."""
_REQUEST_SECONDS = 10.0
_CHUNK_BYTES = 2**20
_MAX_SOURCE_LENGTH = 1024
_FORMS = "hf://org/name[@revision][/subfolder] or s3://bucket/prefix"


class AdapterSourceError(AdapterFormatError):
    """An adapter that cannot be fetched. The message names no path and no secret."""


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter in the cache."""

    source: str
    version: str
    """What the source said of the content: the hub's commit, or the files' entity tags."""
    folder: Path
    """Holds adapter_config.json and adapter_model.safetensors; what is in it never changes."""


@dataclass(frozen=True)
class _RemoteFile:
    """A file as it was when it was found; reading fails where it has changed since."""

    content: IO[bytes]
    size: int
    version: str


_Finder = Callable[[re.Match[str], ExitStack], dict[str, _RemoteFile]]


def fetch_adapter(source: str, root: Path, *, max_bytes: int = MAX_WEIGHTS_BYTES) -> FetchedAdapter:
    """Bring an adapter into the cache under `root`, unless it is there in the same version.

    Blocks while it downloads. Only sizes are checked; the rest is for `load_adapter`.

    Args:
        source: `hf://org/name[@revision][/subfolder]` or `s3://bucket/prefix`.
        root: the adapters folder.
        max_bytes: the largest weights file to accept.

    Raises AdapterSourceError, its code one of adapter_source_invalid, adapter_source_not_found,
    adapter_source_unavailable, adapter_too_large, adapter_cache_unwritable.
    """
    source = source.rstrip("/")
    find, match = _parse(source)
    limits = {CONFIG_NAME: MAX_CONFIG_BYTES, WEIGHTS_NAME: max_bytes}
    with ExitStack() as stack:
        with _source_errors(source):
            files = find(match, stack)
        for name, file in files.items():
            if file.size > limits[name]:
                raise _too_large(name, file.size, limits[name])
        version = "-".join(dict.fromkeys(file.version for file in files.values()))
        digest = sha256(f"{source} {version}".encode()).hexdigest()
        with _cache_errors():
            folder = _cache(root) / digest[:32]
            if folder.is_dir():
                os.utime(folder)  # in use, as of now
            else:
                _download(source, files, folder)
    return FetchedAdapter(source, version, folder)


def prune_cache(root: Path, keep: Collection[Path]) -> None:
    """Delete cached adapters but those in `keep`, and what downloads that broke off left.

    What is younger than a download may take stays: another server may be about to use it.
    """
    cache = root / CACHE_NAME
    if cache.is_symlink() or not cache.is_dir():
        return
    kept = {path.name for path in keep}
    latest = time.time() - 2 * _MAX_SECONDS  # a download is of two files
    for entry in cache.iterdir():
        if entry.name not in kept and entry.lstat().st_mtime < latest:
            shutil.rmtree(entry, ignore_errors=True)


def _parse(source: str) -> tuple[_Finder, re.Match[str]]:
    scheme, _, location = source.partition("://")
    if scheme in _SCHEMES and len(source) <= _MAX_SOURCE_LENGTH:
        pattern, find = _SCHEMES[scheme]
        match = pattern.fullmatch(location)
        if match and not {"", ".", ".."} & set((match["folder"] or "-").split("/")):
            return find, match
    raise AdapterSourceError(
        "adapter_source_invalid",
        f"The source is none that adapters come from: it must be {_FORMS}.",
    )


def _find_on_hub(match: re.Match[str], stack: ExitStack) -> dict[str, _RemoteFile]:
    from huggingface_hub import HfApi, HfFileSystem

    class Files(HfFileSystem):
        """Of paths that are known to be files."""

        def isdir(self, path: str) -> bool:  # noqa: ARG002 (fsspec's name)
            """No: finding that out lists the repository's tree, with no limit on the time."""
            return False

    repo = match["repo"]
    revision = unquote(match["revision"]) if match["revision"] else None
    info = HfApi().model_info(
        repo, revision=revision, files_metadata=True, timeout=_REQUEST_SECONDS
    )
    sizes = {entry.rfilename: entry.size for entry in info.siblings or ()}
    files = {}
    hub = Files(skip_instance_cache=True, use_listings_cache=False)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = f"{match['folder']}/{name}" if match["folder"] else name
        size = sizes.get(path)
        if size is None or info.sha is None:
            raise FileNotFoundError
        # A block size of 0 asks for one stream, rather than for a request a block.
        content = stack.enter_context(hub.open(f"{repo}@{info.sha}/{path}", block_size=0))
        files[name] = _RemoteFile(content, size, info.sha)
    return files


def _find_in_bucket(match: re.Match[str], stack: ExitStack) -> dict[str, _RemoteFile]:
    try:
        from s3fs import S3FileSystem
    except ImportError:
        raise AdapterSourceError(
            "adapter_source_unavailable",
            "This server was installed without S3: install malora[s3] to use s3:// sources.",
        ) from None
    bucket = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    files = {}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        content = stack.enter_context(
            bucket.open(f"{match[0]}/{name}", block_size=_CHUNK_BYTES, cache_type="readahead")
        )
        # Every read asks for this entity tag, so that files changed meanwhile are never mixed.
        files[name] = _RemoteFile(content, content.details["size"], content.details["ETag"])
    return files


_SCHEMES: dict[str, tuple[re.Pattern[str], _Finder]] = {
    "hf": (
        re.compile(
            r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w([\w.-]|%2[Ff])*))?"
            r"(/(?P<folder>[\w. /-]+))?",
            re.ASCII,
        ),
        _find_on_hub,
    ),
    "s3": (
        re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?P<folder>[\w.!'()+=@:, /-]+))?", re.ASCII),
        _find_in_bucket,
    ),
}
"""How the part after :// reads, and who finds the files there."""


def _cache(root: Path) -> Path:
    cache = root / CACHE_NAME
    cache.mkdir(exist_ok=True)
    if cache.is_symlink():
        raise AdapterSourceError(
            "adapter_cache_unwritable",
            f"The folder {CACHE_NAME} in the adapters folder is a link: make it a folder.",
        )
    return cache


def _download(source: str, files: dict[str, _RemoteFile], folder: Path) -> None:
    """Make `folder`, whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=folder.parent))
    try:
        for name, file in files.items():
            with (partial / name).open("xb") as target:
                _copy(source, file, target)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another call was faster, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(source: str, file: _RemoteFile, target: IO[bytes]) -> None:
    deadline = time.monotonic() + _MAX_SECONDS
    num_bytes = 0
    while True:
        with _source_errors(source):
            chunk = file.content.read(_CHUNK_BYTES)
            if time.monotonic() > deadline:
                raise TimeoutError
            num_bytes += len(chunk)
            if num_bytes > file.size or (not chunk and num_bytes < file.size):
                raise EOFError
        if not chunk:
            break
        target.write(chunk)
    target.flush()
    os.fsync(target.fileno())  # a name after a power cut must not stand for half a file


@contextmanager
def _source_errors(source: str) -> Iterator[None]:
    """What the libraries raise, of many kinds and with addresses in it, in words of ours."""
    try:
        yield
    except AdapterSourceError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = type(error).__name__
        logger.warning("fetching %s failed: %s, HTTP status %s", source, kind, status)
        if isinstance(error, FileNotFoundError) or status == 404:
            raise AdapterSourceError(
                "adapter_source_not_found",
                f"There is no {CONFIG_NAME} with {WEIGHTS_NAME} at {source}, or none that this "
                "server's credentials may see.",
            ) from None
        if isinstance(error, PermissionError) or status in (401, 403):
            reason = "it refuses this server's credentials"
        elif isinstance(error, TimeoutError) or "Timeout" in kind:  # or an HTTP library's own
            reason = "it takes too long"
        elif isinstance(error, EOFError):
            reason = "it sent more or less of a file than it announced"
        else:
            reason = f"the request failed ({kind})"
        raise AdapterSourceError(
            "adapter_source_unavailable", f"{source} can't be fetched now: {reason}."
        ) from None


@contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterSourceError(
            "adapter_cache_unwritable",
            f"The server can't store the adapter: {error.strerror or 'its disk fails'}.",
        ) from None


def _too_large(name: str, size: int, limit: int) -> AdapterSourceError:
    return AdapterSourceError(
        "adapter_too_large", f"{name} has {size} bytes, but at most {limit} are accepted."
    )
