"""Where every adapter's weights are: on disk, in host memory, on the device.

Each tier is one memory of fixed size (an arena), in which an adapter takes its own bytes. What is
on the device is in host memory too, so that a place on the device is freed at once. Both are
cleared of the adapters that were not used for longest. Reading from disk is the loader's work, one
adapter at a time; copying to the device runs beside the steps.

An adapter is known by its name and version. What its files hold is known once they are read: their
digest stands for the content from then on.
"""

from __future__ import annotations

import logging
import select
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from malora.format import AdaptedLinear
from malora.kernels.arena import Arena
from malora.kernels.packed import PackedAdapter
from malora.kernels.resident import ResidentAdapter, ResidentAdapters, Upload
from malora_server.adapters.loading import (
    Close,
    Loader,
    LoaderDiedError,
    Open,
    Opened,
    Pack,
    Packed,
    Refused,
)
from malora_server.adapters.memory import HostMemory
from malora_server.engine.messages import (
    AdapterInfo,
    AdapterStatus,
    AdapterStoreStats,
    AdapterTier,
    AdapterVersion,
)

logger = logging.getLogger(__name__)

_TRIES = 3
"""How often an adapter is read whose files change under the loader."""


class AdapterError(Exception):
    """An adapter that cannot be used. `code` is stable; the message is for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class _HostPlace:
    """Where an adapter lies in host memory."""

    own_start: int
    basis_start: int


@dataclass(eq=False, slots=True)
class StoredAdapter:
    """One version of an adapter, wherever it is. Compared by identity."""

    version: AdapterVersion
    packed: PackedAdapter | None = None
    """Set while it is in host memory, or on the device."""
    info: AdapterInfo | None = None
    digest: str = ""
    """Of the content that was read last."""
    host: _HostPlace | None = None
    device: ResidentAdapter | None = None
    is_loading: bool = False
    """From disk; or it is in line for that."""
    is_arriving: bool = False
    """On the device, to be ready when its upload is done."""
    is_wanted: bool = False
    """Asked for beside requests: to be loaded once, whoever waits."""
    pinned: bool = False
    is_to_be_pinned: bool = False
    """As soon as it is loaded."""
    retired: bool = False
    """No new requests come; it goes with the last of those there are."""
    num_requests: int = 0
    """In the engine, whatever their state."""
    num_using: int = 0
    """Of them running, or ready to."""
    error: AdapterError | None = None
    """Why the last load failed."""
    is_broken: bool = False
    """Whether another load would fail too."""
    load_seconds: float = 0.0
    # Since its last status.
    num_loads: int = 0
    num_failures: int = 0
    num_device_evictions: int = 0
    num_host_evictions: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether a step may use it."""
        return self.device is not None and not self.is_arriving

    @property
    def tier(self) -> AdapterTier:
        if self.is_ready:
            return "device"
        if self.host is not None:
            return "host"
        if self.is_loading:
            return "loading"
        return "failed" if self.is_broken else "unloaded"


@dataclass
class _Load:
    """A load that the loader works on."""

    adapter: StoredAdapter
    started: float
    tries: int = 1
    opened: Opened | None = None
    place: _HostPlace | None = None


@dataclass
class _HostBasis:
    start: int
    users: int = 0


@dataclass
class News:
    """What has happened to adapters since the last call of `poll`."""

    loaded: list[StoredAdapter] = field(default_factory=list)
    """Now in host memory."""
    ready: list[StoredAdapter] = field(default_factory=list)
    """Now on the device."""
    failed: list[tuple[StoredAdapter, AdapterError]] = field(default_factory=list)


class AdapterStore:
    """The tiers, and what moves between them. Owned by the engine's thread; never waits."""

    def __init__(
        self,
        resident: ResidentAdapters,
        device_memory: HostMemory | None,
        host_memory: HostMemory | None,
        loader: Loader | None,
    ) -> None:
        """device_memory: `resident`'s, where it is of the host. Without host memory and a loader
        nothing is read from disk.
        """
        self._resident = resident
        self._device_memory = device_memory
        self._host_memory = host_memory
        self._arena = Arena(0 if host_memory is None else len(host_memory.tensor))
        self._loader = loader
        self._adapters: dict[tuple[str, int], StoredAdapter] = {}
        # In memory, least recently used first.
        self._used: OrderedDict[StoredAdapter, None] = OrderedDict()
        self._pinned: dict[StoredAdapter, None] = {}
        self._bases: dict[str, _HostBasis] = {}
        self._line: deque[StoredAdapter] = deque()
        self._load: _Load | None = None
        self._uploads: deque[tuple[StoredAdapter, Upload]] = deque()
        self._news = News()
        self._changed: dict[StoredAdapter, None] = {}
        self._stats: AdapterStoreStats | None = None
        self._num_loads = self._num_failures = 0
        self._num_device_evictions = self._num_host_evictions = 0

    # What requests and messages ask for.

    def get(self, version: AdapterVersion) -> StoredAdapter:
        """The adapter of that version, new where it was never asked for.

        Raises AdapterError where it is known to be of no use.
        """
        key = (version.name, version.number)
        adapter = self._adapters.get(key)
        if adapter is None:
            if self._loader is None or not version.path:
                raise AdapterError("adapter_not_found", f"adapter {version.name!r} does not exist")
            adapter = self._adapters[key] = StoredAdapter(version)
        if adapter.is_broken and adapter.error is not None:
            raise adapter.error
        return adapter

    def load(self, version: AdapterVersion) -> None:
        """Bring an adapter into host memory, whether or not requests want it."""
        try:
            self.fetch(self.get(version), wanted=True)
        except AdapterError as error:
            known = self._adapters.get((version.name, version.number))
            logger.debug("adapter %s stays as it is: %s", version.name, error)
            if known is not None:
                self._note(known)

    def fetch(self, adapter: StoredAdapter, wanted: bool = False) -> None:
        """Bring an adapter into host memory. wanted: even if no request waits for it."""
        adapter.is_wanted |= wanted
        if adapter.host is None and not adapter.is_loading:
            adapter.is_loading, adapter.error = True, None
            self._line.append(adapter)
            self._advance_line()
        self._note(adapter)

    def add(self, name: str, linears: Mapping[str, AdaptedLinear]) -> StoredAdapter:
        """Put an adapter that is in memory on the device, to stay there.

        Raises NoRoomError. Requests name version 0 of it.
        """
        device = self._resident.add(name, linears)
        adapter = StoredAdapter(AdapterVersion(name), device.packed, digest=name, device=device)
        adapter.pinned = True
        self._adapters[name, 0] = adapter
        return adapter

    def pin(self, version: AdapterVersion, pinned: bool) -> None:
        """Keep an adapter on the device once it is loaded, or do so no more.

        Refused, as its next status tells, where it finds no room beside the others that are pinned.
        """
        adapter = self._adapters.get((version.name, version.number))
        if adapter is None:
            return
        adapter.is_to_be_pinned = pinned and adapter.packed is None and adapter.is_loading
        if adapter.is_to_be_pinned:
            return
        adapter.error = None
        if pinned and adapter.packed is None:
            adapter.error = AdapterError("adapter_load_failed", "It has left memory; try again.")
        elif pinned and not self.can_ever_fit(adapter):
            adapter.error = AdapterError(
                "adapter_no_room",
                "It finds no room on the device beside the others that are pinned there.",
            )
        adapter.pinned = pinned and adapter.error is None
        if adapter.pinned:
            self._pinned[adapter] = None
        else:
            self._pinned.pop(adapter, None)
        self._note(adapter)

    def retire(self, version: AdapterVersion) -> None:
        """Forget a version as soon as the last request for it is done."""
        adapter = self._adapters.get((version.name, version.number))
        if adapter is not None:
            adapter.retired = True
            adapter.pinned = adapter.is_to_be_pinned = adapter.is_wanted = False
            self._pinned.pop(adapter, None)
            self._drop_if_done(adapter)

    def enter(self, adapter: StoredAdapter) -> None:
        """Count a request for it."""
        adapter.num_requests += 1
        if adapter in self._used:
            self._used.move_to_end(adapter)

    def leave(self, adapter: StoredAdapter) -> None:
        """Count its end."""
        adapter.num_requests -= 1
        if adapter in self._used:
            self._used.move_to_end(adapter)
        if adapter.num_requests == 0 and adapter.retired:
            self._drop_if_done(adapter)

    # What happens meanwhile.

    def poll(self) -> News:
        """Take in what the loader says and which uploads are done."""
        while self._loader is not None and self._load is not None:
            try:
                answer = self._loader.receive()
            except LoaderDiedError as error:
                self._fail_load(AdapterError("adapter_load_failed", str(error)), passing=True)
                continue
            if answer is None:
                break
            match answer:
                case Opened():
                    self._load.opened = answer
                case Packed():
                    self._finish_load(answer)
                case Refused(code, reason, passing):
                    self._refuse_load(AdapterError(code, reason), passing)
        self._advance_load()
        self._advance_line()
        while self._uploads and self._uploads[0][1].done():
            adapter, _ = self._uploads.popleft()
            adapter.is_arriving = False
            self._news.ready.append(adapter)
            self._note(adapter)
            self._drop_if_done(adapter)
        news, self._news = self._news, News()
        return news

    @property
    def is_busy(self) -> bool:
        """Whether any adapter is on its way from disk or to the device."""
        return self._load is not None or bool(self._line) or self.has_news

    @property
    def has_news(self) -> bool:
        """Whether `poll` has something to do, or to tell, that does not wait for the loader."""
        return bool(self._uploads or self._news.failed or self._news.loaded)

    @property
    def has_arrival(self) -> bool:
        """Whether `poll` would tell of an upload for which the device waits by itself."""
        return bool(self._uploads) and self._uploads[0][1].is_ordered

    @property
    def has_changes(self) -> bool:
        """Whether there is anything for `changes` to tell."""
        return bool(self._changed)

    def fileno(self) -> int:
        """What becomes readable when the loader speaks; -1 while it has nothing to say."""
        return -1 if self._loader is None or self._load is None else self._loader.fileno()

    def wait(self, seconds: float) -> None:
        """Wait for the loader to speak."""
        if self.fileno() >= 0:
            select.select([self.fileno()], [], [], seconds)

    def wait_for_load(self, seconds: float) -> None:
        """Wait for the loader where it has all it needs for an adapter, so that it may be done."""
        if self._load is not None and self._load.place is not None and seconds > 0:
            self.wait(seconds)

    def changes(self) -> list[AdapterStatus]:
        """Those that changed since the last call."""
        changed, self._changed = self._changed, {}
        return [_take_status(adapter) for adapter in changed]

    def stats(self) -> AdapterStoreStats:
        """What the tiers hold."""
        if self._stats is None:
            self._stats = self._count()
        return self._stats

    def _count(self) -> AdapterStoreStats:
        return AdapterStoreStats(
            device_bytes=self._resident.num_bytes(),
            device_capacity=self._resident.capacity,
            host_bytes=self._arena.used,
            host_capacity=self._arena.capacity,
            num_device=sum(adapter.is_ready for adapter in self._used),
            num_host=len(self._used),
            num_loading=len(self._line) + (self._load is not None),
            loads=self._num_loads,
            load_failures=self._num_failures,
            device_evictions=self._num_device_evictions,
            host_evictions=self._num_host_evictions,
        )

    # Places, which the scheduler hands out.

    def place(self, adapter: StoredAdapter) -> bool:
        """Start bringing an adapter from host memory to the device, in the place of idle ones if
        need be; False where there is no room.
        """
        assert adapter.packed is not None
        assert adapter.host is not None
        assert self._host_memory is not None
        idle = [other for other in self._used if self._is_idle_on_device(other)]
        if not self._resident.fits(adapter.packed, _devices(idle)):
            return False
        device = self._resident.place(adapter.packed)
        for other in idle:
            if device is not None:
                break
            self._evict_from_device(other)
            device = self._resident.place(adapter.packed)
        assert device is not None
        memory = self._host_memory.tensor
        basis = memory[adapter.host.basis_start :][: adapter.packed.basis_bytes]
        own = memory[adapter.host.own_start :][: adapter.packed.own_bytes]
        adapter.device, adapter.is_arriving = device, True
        self._uploads.append((adapter, self._resident.upload(device, basis, own)))
        self._used.move_to_end(adapter)
        return True

    def would_fit(self, adapter: StoredAdapter, without: Collection[StoredAdapter]) -> bool:
        """Whether there would be a place on the device if idle ones and those in `without` went."""
        assert adapter.packed is not None
        gone = [other for other in self._used if self._is_idle_on_device(other)]
        gone += [other for other in without if other not in gone]
        return self._resident.fits(adapter.packed, _devices(gone))

    def can_ever_fit(self, adapter: StoredAdapter) -> bool:
        """Whether there would be a place on the device beside the pinned ones alone."""
        assert adapter.packed is not None
        others = [a for a in self._used if a.device is not None and not a.pinned]
        return adapter.device is not None or self._resident.fits(adapter.packed, _devices(others))

    def on_device(self) -> list[StoredAdapter]:
        """Those that are ready there, and not pinned."""
        return [other for other in self._used if other.is_ready and not other.pinned]

    def unplaced_pins(self) -> list[StoredAdapter]:
        """Those that are pinned, and not on the device yet."""
        return [a for a in self._pinned if a.host is not None and a.device is None]

    def waits_for_room(self) -> StoredAdapter | None:
        """The adapter that is open, but finds no room in host memory."""
        load = self._load
        blocked = load is not None and load.opened is not None and load.place is None
        return load.adapter if blocked and load is not None else None

    def evict(self, adapter: StoredAdapter) -> None:
        """Take an adapter off the device that no sequence uses any more."""
        self._evict_from_device(adapter)

    def evict_wholly(self, adapter: StoredAdapter) -> None:
        """Take an adapter out of memory that no sequence uses any more."""
        if adapter.device is not None:
            self._evict_from_device(adapter)
        self._evict_from_host(adapter)

    def would_fit_in_host(self, without: Collection[StoredAdapter]) -> bool:
        """Whether the load that waits for room would find it if idle ones and `without` went."""
        assert self._load is not None
        assert self._load.opened is not None
        gone = [a for a in self._used if self._is_idle(a) or a in without]
        opened = self._load.opened
        return self._arena.fits([opened.own_bytes, opened.basis_bytes], self._host_ranges(gone))

    def in_host(self) -> list[StoredAdapter]:
        """Those in host memory that may be made to leave it: neither pinned nor on their way, nor
        retired, whose files may be gone.
        """
        return [
            a
            for a in self._used
            if a.host is not None and not (a.pinned or a.retired or a.is_arriving)
        ]

    # The loader's side.

    def _advance_line(self) -> None:
        """Give the loader its next adapter, where it has none."""
        while self._load is None and self._line and self._loader is not None:
            adapter = self._line.popleft()
            if not (adapter.num_requests or adapter.is_wanted):
                adapter.is_loading = False
                self._note(adapter)
                self._drop_if_done(adapter)
                continue
            self._start_load(adapter, 1)

    def _start_load(self, adapter: StoredAdapter, tries: int) -> None:
        assert self._loader is not None
        self._load = _Load(adapter, time.monotonic(), tries)
        try:
            self._loader.send(Open(adapter.version.path))
        except LoaderDiedError as error:
            self._fail_load(AdapterError("adapter_load_failed", str(error)), passing=True)

    def _advance_load(self) -> None:
        """Find room in host memory for the adapter that is open."""
        load = self._load
        if load is None or load.opened is None or load.place is not None:
            return
        assert self._loader is not None
        opened = load.opened
        adapter = load.adapter
        try:
            if not (adapter.num_requests or adapter.is_wanted):
                self._loader.send(Close())
                self._end_load()
                self._note(adapter)
                self._drop_if_done(adapter)
                return
            if self._never_fits(opened):
                self._loader.send(Close())
                self._fail_load(self._too_large(opened), passing=False)
                return
            load.place = self._host_place(opened)
            if load.place is not None:
                self._loader.send(Pack(load.place.basis_start, load.place.own_start))
        except LoaderDiedError as error:
            self._fail_load(AdapterError("adapter_load_failed", str(error)), passing=True)

    def _never_fits(self, opened: Opened) -> bool:
        sizes = [opened.own_bytes, opened.basis_bytes]
        return not (
            Arena(self._arena.capacity).fits(sizes) and Arena(self._resident.capacity).fits(sizes)
        )

    def _too_large(self, opened: Opened) -> AdapterError:
        return AdapterError(
            "adapter_too_large",
            f"It takes {opened.own_bytes + opened.basis_bytes:,} bytes in memory, but there are "
            f"{self._resident.capacity:,} on the device and {self._arena.capacity:,} on the host "
            "for all adapters together: raise --adapter-device-memory and --adapter-host-memory.",
        )

    def _host_place(self, opened: Opened) -> _HostPlace | None:
        """Ranges for an adapter's pieces, in the place of idle ones if need be."""
        if not self.would_fit_in_host(()):
            return None
        idle = [adapter for adapter in self._used if self._is_idle(adapter)]
        while True:
            own_start = self._arena.allocate(opened.own_bytes)
            if own_start is not None:
                basis_start = self._arena.allocate(opened.basis_bytes)
                if basis_start is not None:
                    return _HostPlace(own_start, basis_start)
                self._arena.free(own_start)
            self.evict_wholly(idle.pop(0))

    def _finish_load(self, answer: Packed) -> None:
        load = self._load
        assert load is not None
        assert load.place is not None
        adapter, place, packed = load.adapter, load.place, answer.packed
        basis = self._bases.get(packed.basis_key)
        if basis is None:
            basis = self._bases[packed.basis_key] = _HostBasis(place.basis_start)
        else:
            self._arena.free(place.basis_start)
        basis.users += 1
        adapter.host = _HostPlace(place.own_start, basis.start)
        adapter.packed, adapter.info, adapter.digest = packed, answer.info, packed.digest
        adapter.load_seconds = time.monotonic() - load.started
        self._used[adapter] = None
        self._num_loads += 1
        adapter.num_loads += 1
        logger.info(
            "adapter %s loaded in %.3f s (%s)",
            adapter.version.name,
            adapter.load_seconds,
            packed.digest[:16],
        )
        self._news.loaded.append(adapter)
        adapter.is_wanted = False
        self._end_load()
        self._note(adapter)
        if adapter.is_to_be_pinned:
            self.pin(adapter.version, True)
        self._drop_if_done(adapter)

    def _refuse_load(self, error: AdapterError, passing: bool) -> None:
        load = self._load
        assert load is not None
        if error.code == "adapter_changed" and load.tries < _TRIES:
            self._free_place(load)
            self._start_load(load.adapter, load.tries + 1)
        else:
            self._fail_load(error, passing)

    def _fail_load(self, error: AdapterError, passing: bool) -> None:
        load = self._load
        assert load is not None
        adapter = load.adapter
        logger.error("adapter %s is not served: %s", adapter.version.name, error)
        self._free_place(load)
        self._num_failures += 1
        adapter.num_failures += 1
        adapter.is_wanted = False
        adapter.error, adapter.is_broken = error, not passing
        adapter.is_to_be_pinned = False
        self._news.failed.append((adapter, error))
        self._end_load()
        self._note(adapter)
        self._drop_if_done(adapter)

    def _free_place(self, load: _Load) -> None:
        if load.place is not None:
            self._arena.free(load.place.own_start)
            self._arena.free(load.place.basis_start)

    def _end_load(self) -> None:
        assert self._load is not None
        self._load.adapter.is_loading = False
        self._load = None

    # Leaving.

    def _is_idle(self, adapter: StoredAdapter) -> bool:
        return adapter.num_requests == 0 and not (
            adapter.pinned or adapter.is_arriving or adapter.is_wanted
        )

    def _is_idle_on_device(self, adapter: StoredAdapter) -> bool:
        return adapter.is_ready and adapter.num_using == 0 and not adapter.pinned

    def _evict_from_device(self, adapter: StoredAdapter) -> None:
        self._remove_from_device(adapter, discard=False)
        self._num_device_evictions += 1
        adapter.num_device_evictions += 1
        self._note(adapter)

    def _evict_from_host(self, adapter: StoredAdapter) -> None:
        self._remove_from_host(adapter, discard=False)
        self._num_host_evictions += 1
        adapter.num_host_evictions += 1
        self._note(adapter)

    def _remove_from_device(self, adapter: StoredAdapter, discard: bool) -> None:
        assert adapter.device is not None
        for start, size in self._resident.remove(adapter.device):
            if discard and self._device_memory is not None:
                self._device_memory.discard(start, size)
        adapter.device = None

    def _remove_from_host(self, adapter: StoredAdapter, discard: bool) -> None:
        assert adapter.host is not None
        assert adapter.packed is not None
        assert self._host_memory is not None
        freed = [(adapter.host.own_start, self._arena.free(adapter.host.own_start))]
        basis = self._bases[adapter.packed.basis_key]
        basis.users -= 1
        if basis.users == 0:
            del self._bases[adapter.packed.basis_key]
            freed.append((basis.start, self._arena.free(basis.start)))
        if discard:
            for start, size in freed:
                self._host_memory.discard(start, size)
        adapter.host = adapter.packed = None
        del self._used[adapter]

    def _host_ranges(self, adapters: Iterable[StoredAdapter]) -> list[int]:
        """The ranges of host memory that would be free if these left it."""
        starts = []
        users: dict[str, int] = {}
        for adapter in adapters:
            assert adapter.host is not None
            assert adapter.packed is not None
            starts.append(adapter.host.own_start)
            key = adapter.packed.basis_key
            users[key] = users.get(key, 0) + 1
        unused = [key for key, count in users.items() if self._bases[key].users == count]
        return starts + [self._bases[key].start for key in unused]

    def _drop_if_done(self, adapter: StoredAdapter) -> None:
        """Give back a retired adapter's memory, unless something still needs it."""
        if not adapter.retired or adapter.num_requests:
            return
        if adapter.is_loading or adapter.is_arriving or adapter.is_wanted:
            return
        if self._adapters.pop((adapter.version.name, adapter.version.number), None) is None:
            return
        if adapter.device is not None:
            self._remove_from_device(adapter, discard=True)
        if adapter.host is not None:
            self._remove_from_host(adapter, discard=True)
        self._note(adapter)

    def remove(self, name: str) -> None:
        """Take an adapter that was put on the device by `add` off it."""
        adapter = self._adapters.pop((name, 0))
        self._remove_from_device(adapter, discard=True)

    def _note(self, adapter: StoredAdapter) -> None:
        self._changed[adapter] = None
        self._stats = None


def _devices(adapters: Iterable[StoredAdapter]) -> list[ResidentAdapter]:
    return [adapter.device for adapter in adapters if adapter.device is not None]


def _take_status(adapter: StoredAdapter) -> AdapterStatus:
    """Its status; what it counts starts again from there."""
    num_bytes = 0 if adapter.packed is None else adapter.packed.num_bytes
    status = AdapterStatus(
        adapter.version.name,
        adapter.version.number,
        adapter.tier,
        digest=adapter.digest,
        device_bytes=num_bytes if adapter.device is not None else 0,
        host_bytes=num_bytes if adapter.host is not None else 0,
        load_seconds=adapter.load_seconds,
        pinned=adapter.pinned,
        info=adapter.info,
        error=None if adapter.error is None else str(adapter.error),
        error_code=None if adapter.error is None else adapter.error.code,
        loads=adapter.num_loads,
        load_failures=adapter.num_failures,
        device_evictions=adapter.num_device_evictions,
        host_evictions=adapter.num_host_evictions,
    )
    adapter.num_loads = adapter.num_failures = 0
    adapter.num_device_evictions = adapter.num_host_evictions = 0
    return status
