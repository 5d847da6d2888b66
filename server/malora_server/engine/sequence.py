"""One request as the engine sees it: its tokens, how far they are computed, where they lie."""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import TYPE_CHECKING

from malora_server.engine.grammar import Matcher
from malora_server.engine.messages import FinishReason, Submit

if TYPE_CHECKING:
    from malora_server.adapters.store import StoredAdapter


class Status(enum.Enum):
    """Where a sequence is in its life: a preempted one is WAITING again."""

    LOADING = enum.auto()
    """Its adapter is on the way, from disk or to the device."""
    PLACING = enum.auto()
    """Its adapter is in host memory, and finds no place on the device yet."""
    WAITING = enum.auto()
    """For a place in the batch."""
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """The tokens of one request (prompt, then outputs) and their place in the KV cache.

    The last `num_pending` of `token_ids` are places of tokens that a step in flight samples; what
    they hold means nothing yet. `num_computed_tokens` counts the leading tokens whose keys and
    values are in the cache, in the blocks of `block_table`. `num_cached_tokens` counts the prompt
    tokens that were found there when the request was first admitted. `cache_salt` separates the
    prefix caches of adapters: the same tokens under another adapter have other keys and values. It
    is known once the adapter's content is (`bind`), which is before anything is computed.

    Raises ValueError for a prompt that is empty, or that leaves no room for one token.
    """

    __slots__ = (
        "adapter",
        "arrival",
        "block_hashes",
        "block_table",
        "cache_salt",
        "eos_token_ids",
        "finish_reason",
        "is_bound",
        "matcher",
        "max_len",
        "min_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "priority",
        "request_id",
        "sampling",
        "status",
        "stop_ids",
        "stop_reason",
        "submit",
        "tenant",
        "token_ids",
    )

    def __init__(
        self,
        submit: Submit,
        arrival: int,
        eos_token_ids: Collection[int],
        max_model_len: int,
        adapter: StoredAdapter | None = None,
    ) -> None:
        sampling = submit.sampling
        self.submit = submit
        self.request_id = submit.request_id
        self.sampling = sampling
        self.adapter = adapter
        self.cache_salt = b""
        self.is_bound = False
        self.arrival = arrival
        self.priority = submit.priority
        self.tenant = None if submit.adapter is None else submit.adapter.name
        """Whom its service is counted for; the base model (None) is a tenant too."""

        self.token_ids = list(submit.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        if not 0 < self.num_prompt_tokens < max_model_len:
            raise ValueError(
                f"request {submit.request_id!r} has a prompt of {self.num_prompt_tokens} tokens: "
                f"give it between 1 and {max_model_len - 1}, the context being {max_model_len}"
            )
        self.min_len = self.num_prompt_tokens + sampling.min_tokens
        """No stop token may be sampled while there are fewer tokens than this."""
        self.max_len = min(self.num_prompt_tokens + sampling.max_tokens, max_model_len)
        self.matcher: Matcher | None = None
        """Where the text is in its grammar; set before it runs, if it has one."""
        self.eos_token_ids = frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        self.stop_ids = self.eos_token_ids.union(sampling.stop_token_ids)

        self.num_pending = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        """Content hashes of the leading full blocks, as far as anyone has asked for them."""
        self.num_registered_blocks = 0
        """Leading blocks of the table that the prefix cache has been told about."""
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def bind(self, digest: str) -> bool:
        """Run with the adapter's content of that digest; False where it has begun with another."""
        salt = digest.encode()
        if self.is_bound:
            return salt == self.cache_salt
        self.cache_salt, self.is_bound = salt, True
        return True

    def expect(self) -> None:
        """Make a place for the token that a step in flight samples."""
        self.token_ids.append(0)
        self.num_pending += 1

    def settle(self, index: int, token_id: int) -> bool:
        """Put a sampled token in its place; True when it was the last, with `finish_reason` set.

        `stop_reason` is set for an id of `stop_token_ids`, and stays None for the model's own
        end of text.
        """
        self.token_ids[index] = token_id
        self.num_pending -= 1
        # The token was sampled when there were `index`, which is what min_tokens speaks of.
        if self.matcher is not None and self.matcher.accept(token_id):
            self.finish_reason = "stop"
        elif token_id in self.stop_ids and index >= self.min_len:
            self.finish_reason = "stop"
            self.stop_reason = None if token_id in self.eos_token_ids else token_id
        elif index + 1 >= self.max_len:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def forget_pending(self) -> None:
        """Give up the places of tokens that will not come, or come too late."""
        if self.num_pending:
            del self.token_ids[-self.num_pending :]
            self.num_pending = 0

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.name}, {self.num_computed_tokens} of "
            f"{len(self.token_ids)} tokens computed, {len(self.block_table)} blocks)"
        )
