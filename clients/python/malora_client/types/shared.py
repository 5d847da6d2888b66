"""What several replies have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Part of a reply. Fields that this version does not know are kept as attributes."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


EntryT = TypeVar("EntryT", bound=Reply)


class Listing(Reply, Generic[EntryT]):
    """A list of entries: iterate over it, or take `data`."""

    object: str = "list"
    data: list[EntryT]

    def __iter__(self) -> Iterator[EntryT]:  # type: ignore[override]
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


class PromptTokensDetails(Reply):
    """`cached_tokens`: prompt tokens that the server had computed for an earlier request."""

    cached_tokens: int = 0


class Usage(Reply):
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ExpertGate(Reply):
    """An expert of the adapter, and the share (0 to 1) of a token's update that came from it."""

    expert: int
    gate: float


class Routing(Reply):
    """The experts that one generated token took.

    `experts` is averaged over the adapted layers; `layers` has one list for each decoder layer,
    and is there only when the request said `include_routing="layers"`.
    """

    token: str
    experts: list[ExpertGate]
    layers: list[list[ExpertGate]] | None = None
