"""Whose turn it is: service counted per tenant, waiting sequences in the order it gives, and how
much of a step those may have that flood.

The counter is the virtual token counter of Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024). A tenant is an adapter's name; the base model is one too.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Set
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter

from malora_server.engine.sequence import Sequence

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2
ADAPTER_QUANTUM = 512
"""How much more service an adapter must have had for another to take its memory: swapping costs
loads and prompts computed again, so it is not done at every token."""
FLOOD = 4
"""No tenant floods with fewer than this many times the sequences of the one that has the fewest."""
GUARDED_STEPS = 64
"""For how many steps after the others have left a flood is still limited, as they will be back: who
comes waits for the step under way."""
GUARDED_SHARE = 3
"""How many times as many tokens it may have meanwhile."""

_arrival = attrgetter("arrival")


class Tenant:
    """What one tenant has been served, and what it has here now."""

    __slots__ = ("num_ready", "num_running", "num_sequences", "service")

    def __init__(self) -> None:
        self.service = 0
        """Weighted tokens."""
        self.num_sequences = 0
        """Waiting for whatever, or running."""
        self.num_ready = 0
        """Waiting for a place in the batch, or running."""
        self.num_running = 0


class ServiceCounter:
    """The tenants' counters.

    A tenant that comes back after having had no sequence is lifted to the least served of those
    that have one, so that idling earns no credit; what it was served beyond that stays counted.
    """

    def __init__(self) -> None:
        self._tenants: dict[str | None, Tenant] = {}
        self._active: dict[str | None, Tenant] = {}

    def __getitem__(self, seq: Sequence) -> Tenant:
        """The tenant of a sequence that was added and not removed."""
        return self._active[seq.tenant]

    def fewest(self) -> int:
        """How many sequences ready to run the tenant has that has the fewest; 0 without any."""
        ready = (tenant.num_ready for tenant in self._active.values())
        return min((n for n in ready if n), default=0)

    def floods(self, fewest: int, places: int) -> Set[str | None]:
        """The tenants with far more of them than another, which has the fewest, and with more than
        an equal share of the batch's places: being asked for more than others is no flood yet.
        """
        most = max(FLOOD * fewest, places / max(2, len(self._active)))
        return {name for name, tenant in self._active.items() if tenant.num_ready > most}

    def add(self, seq: Sequence) -> None:
        """Note a new sequence of its tenant."""
        tenant = self._tenants.setdefault(seq.tenant, Tenant())
        if tenant.num_sequences == 0:
            least = min((other.service for other in self._active.values()), default=0)
            tenant.service = max(tenant.service, least)
            self._active[seq.tenant] = tenant
        tenant.num_sequences += 1

    def remove(self, seq: Sequence) -> None:
        """Note that a sequence has ended."""
        tenant = self._active[seq.tenant]
        tenant.num_sequences -= 1
        if tenant.num_sequences == 0:
            del self._active[seq.tenant]
            # With nobody here nobody was kept waiting: all start afresh, none is remembered.
            if not self._active:
                self._tenants.clear()


class FloodLimit:
    """The tokens of one step that tenants that flood may have together, one at least for each.

    Sequences more urgent than all of the others' are not limited.
    """

    __slots__ = ("_num_tokens", "_unserved", "_urgency", "floods")

    def __init__(self, floods: Set[str | None], urgency: int, num_tokens: int) -> None:
        """urgency: the priority of the most urgent sequence of the others."""
        self.floods = floods
        self._urgency = urgency
        self._num_tokens = max(num_tokens, len(floods))
        self._unserved = set(floods)

    def holds(self, seq: Sequence) -> bool:
        """Whether it limits this sequence."""
        return seq.tenant in self.floods and seq.priority >= self._urgency

    def left_for(self, seq: Sequence) -> int:
        """How many tokens a sequence may have."""
        if not self.holds(seq):
            return sys.maxsize
        others = len(self._unserved) - (seq.tenant in self._unserved)
        return self._num_tokens - others

    def take(self, seq: Sequence, num_tokens: int) -> None:
        """Note that a sequence is given these."""
        if self.holds(seq):
            self._num_tokens -= num_tokens
            self._unserved.discard(seq.tenant)


class _Line:
    """One tenant's waiting sequences of one priority, by arrival."""

    __slots__ = ("entry", "sequences", "tenant")

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.sequences: list[Sequence] = []
        self.entry = 0
        """The serial number of its entry in the heap; others are obsolete."""


class WaitingQueue:
    """Waiting sequences by (priority, their tenant's service, arrival).

    A heap has one entry for each line, made when its key was no larger than it is now: service
    only grows, and a line whose head comes to be an earlier sequence gets a new entry. So the
    least entry, brought up to date until it stays the least, is the first in order, whatever was
    served meanwhile.
    """

    def __init__(self, service: ServiceCounter) -> None:
        self._service = service
        self._lines: dict[tuple[int, str | None], _Line] = {}
        self._heap: list[tuple[int, int, int, int, _Line]] = []
        self._num_entries = 0
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def push(self, seq: Sequence) -> None:
        """Take in a sequence, new or preempted."""
        key = (seq.priority, seq.tenant)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._service[seq])
        insort(line.sequences, seq, key=_arrival)
        self._len += 1
        if line.sequences[0] is seq:
            heappush(self._heap, self._entry(line))
            # Obsolete entries behind one that stays the first would never be met.
            if len(self._heap) > 2 * len(self._lines) + 8:
                self._heap = [self._entry(line) for line in self._lines.values()]
                heapify(self._heap)

    def first(self, but: Set[str | None] = frozenset()) -> Sequence | None:
        """The next to be admitted, of other tenants than these; None where nobody waits."""
        if but:
            lines = (line for (_, name), line in self._lines.items() if name not in but)
            heads = ((line.sequences[0], line.tenant.service) for line in lines)
            return min(heads, key=lambda h: (h[0].priority, h[1], h[0].arrival), default=(None,))[0]
        while self._heap:
            _, service, arrival, serial, line = self._heap[0]
            if serial != line.entry or not line.sequences:
                heappop(self._heap)
                continue
            head = line.sequences[0]
            if (service, arrival) == (line.tenant.service, head.arrival):
                return head
            heapreplace(self._heap, self._entry(line))
        return None

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence, wherever in the queue it is."""
        key = (seq.priority, seq.tenant)
        sequences = self._lines[key].sequences
        del sequences[bisect_left(sequences, seq.arrival, key=_arrival)]
        self._len -= 1
        if not sequences:
            del self._lines[key]

    def _entry(self, line: _Line) -> tuple[int, int, int, int, _Line]:
        self._num_entries += 1
        line.entry = self._num_entries
        head = line.sequences[0]
        return (head.priority, line.tenant.service, head.arrival, line.entry, line)
