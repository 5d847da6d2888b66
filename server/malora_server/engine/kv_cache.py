"""Who holds which block of the paged KV cache, and which blocks may be used again.

This is bookkeeping alone: block ids are integers, the tensors live with the model.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection
from hashlib import blake2b

from malora_server.engine.sequence import Sequence


class BlockManager:
    """A pool of `num_blocks` blocks, each for the keys and values of `block_size` tokens.

    A full, computed block is registered under a hash of all tokens up to its end, which starts
    from the sequence's `cache_salt`; later sequences that begin alike share it. Only full blocks
    are shared and a full block is never written again, so that no copy is ever needed. A
    registered block that nobody holds keeps its content until the pool needs it: the one unused
    for longest goes first, and of one sequence the tail before the head, since a tail is
    worthless without its head.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        """Prompt tokens of admitted requests that were looked up in the prefix cache."""
        self.num_hit_tokens = 0
        """Those of them that were found."""
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._registered: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Registered, but held by nobody; least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def usage(self) -> float:
        """The share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> tuple[list[int], int]:
        """The registered blocks a sequence's tokens begin with, and how many tokens they hold.

        Never all tokens: the last has to be computed, to have logits. A request for the
        log-probabilities of its prompt needs the logits of every position, so finds nothing.
        Changes nothing; hand the blocks to `allocate` to keep them.
        """
        blocks: list[int] = []
        if self._looks_up(seq):
            limit = (len(seq.token_ids) - 1) // self.block_size
            self._extend_hashes(seq, limit)
            for key in seq.block_hashes[:limit]:
                block = self._registered.get(key)
                if block is None:
                    break
                blocks.append(block)
        return blocks, len(blocks) * self.block_size

    def fits(self, seq: Sequence) -> bool:
        """Whether a waiting sequence's known tokens would find room now. Changes nothing."""
        prefix, _ = self.match_prefix(seq)
        num_new = self.blocks_for(len(seq.token_ids)) - len(prefix)
        return num_new + self._num_revived(prefix) <= self.num_free_blocks

    def allocate(self, seq: Sequence, num_tokens: int, prefix: Collection[int] = ()) -> bool:
        """Make room for `num_tokens` tokens after the computed ones; False if there is none.

        `prefix`, for a sequence that holds no block yet, is what `match_prefix` found: those
        blocks come first in its table and count as computed; `num_tokens` come after them.
        Nothing is changed where the answer is False.
        """
        num_computed = seq.num_computed_tokens + len(prefix) * self.block_size
        table = seq.block_table
        num_new = self.blocks_for(num_computed + num_tokens) - len(table) - len(prefix)
        if num_new + self._num_revived(prefix) > self.num_free_blocks:
            return False
        references = self._references
        if not table:
            self._count_lookup(seq, num_computed)
        for block in prefix:
            if references[block] == 0:
                del self._idle[block]
            references[block] += 1
            table.append(block)
        seq.num_computed_tokens = num_computed
        seq.num_registered_blocks += len(prefix)
        for _ in range(num_new):
            block = self._take()
            references[block] = 1
            table.append(block)
        return True

    def commit(self, seq: Sequence) -> None:
        """Register the blocks that have become full, computed and known since the last call."""
        if not self.enable_prefix_caching:
            return
        num_known = len(seq.token_ids) - seq.num_pending
        num_full = min(seq.num_computed_tokens, num_known) // self.block_size
        self._extend_hashes(seq, num_full)
        for index in range(seq.num_registered_blocks, num_full):
            key = seq.block_hashes[index]
            # Of two sequences that computed the same tokens at once, the first one's block is
            # registered, the other's remains its own.
            if key not in self._registered:
                block = seq.block_table[index]
                self._registered[key] = block
                self._hashes[block] = key
        seq.num_registered_blocks = num_full

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of a sequence; the registered ones may be found again."""
        references = self._references
        for block in reversed(seq.block_table):
            references[block] -= 1
            if references[block] == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None
        seq.block_table.clear()
        seq.num_registered_blocks = 0

    def reset(self) -> None:
        """Forget all that the prefix cache holds; sequences keep the blocks they have."""
        self._registered.clear()
        self._hashes = [None] * self.num_blocks
        self._blank.extend(self._idle)
        self._idle.clear()

    def _num_revived(self, prefix: Collection[int]) -> int:
        return sum(self._references[block] == 0 for block in prefix)

    def _take(self) -> int:
        if self._blank:
            return self._blank.pop()
        block, _ = self._idle.popitem(last=False)
        key = self._hashes[block]
        assert key is not None
        del self._registered[key]
        self._hashes[block] = None
        return block

    def _looks_up(self, seq: Sequence) -> bool:
        return self.enable_prefix_caching and seq.sampling.prompt_logprobs is None

    def _count_lookup(self, seq: Sequence, num_found: int) -> None:
        # After a preemption a sequence mostly finds its own blocks, which says nothing about
        # how well requests share.
        if seq.num_preemptions == 0 and self._looks_up(seq):
            seq.num_cached_tokens = num_found
            self.num_queried_tokens += seq.num_prompt_tokens
            self.num_hit_tokens += num_found

    def _extend_hashes(self, seq: Sequence, num_blocks: int) -> None:
        hashes, size = seq.block_hashes, self.block_size
        for index in range(len(hashes), num_blocks):
            parent = (
                hashes[-1]
                if hashes
                else blake2b(seq.cache_salt, digest_size=32, person=b"salt").digest()
            )
            tokens = array("q", seq.token_ids[index * size : (index + 1) * size]).tobytes()
            hashes.append(blake2b(parent + tokens, digest_size=32, person=b"block").digest())
