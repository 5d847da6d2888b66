"""What the API process and the engine process say to each other (msgspec, msgpack on the wire).

The engine speaks in token ids alone: text, templates and stop strings belong to the API side.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
AdapterTier = Literal["unloaded", "loading", "host", "device", "failed"]
"""Where an adapter's weights are: on disk alone, being read, in host memory, on the device (and in
host memory); or they cannot be used."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose one sequence's tokens. Values are validated by the API before they get here.

    `seed` is always set: the API draws one for a request that names none, so that a sequence
    recomputed after a preemption continues as it began. `logprobs` is the number of alternatives
    beside the chosen token's own log-probability (0: the chosen token alone; None: nothing);
    log-probabilities are of the model's own distribution, before temperature and penalties.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    routing: Literal["mean", "layers"] | None = None
    grammar: str | None = None
    """What the text must follow, as `engine.grammar` makes it. It ends with the grammar, even where
    `min_tokens` or `ignore_eos` ask for more; while it can go on, they are kept."""


class AdapterVersion(msgspec.Struct, array_like=True, frozen=True):
    """One content of an adapter's name: what lies, or lay, in its folder `path`.

    `number` tells the versions of a name apart, and grows.
    """

    name: str
    number: int = 0
    path: str = ""


class Submit(msgspec.Struct, tag="submit", frozen=True, kw_only=True):
    """One sequence to generate, with the adapter's version that the API resolved."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterVersion | None = None
    priority: int = 0
    """Lower runs first."""


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Forget these sequences and free what they hold. Unknown ids are ignored."""

    request_ids: list[str]


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Take no more requests; finish those in flight within `timeout` seconds, abort the rest."""

    timeout: float


class LoadAdapter(msgspec.Struct, tag="load", frozen=True):
    """Read an adapter into host memory, checking it wholly; its status tells when that is done."""

    adapter: AdapterVersion


class PinAdapter(msgspec.Struct, tag="pin", frozen=True):
    """Keep a loaded adapter on the device, or no more; its next status tells whether that is so."""

    adapter: AdapterVersion
    pinned: bool


class RetireAdapter(msgspec.Struct, tag="retire", frozen=True):
    """No more requests come for this version: forget it once those in flight are done."""

    adapter: AdapterVersion


Message = Submit | Abort | Stop | LoadAdapter | PinAdapter | RetireAdapter


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """One position: its token, the token's log-probability (nats), the likeliest alternatives."""

    token_id: int
    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class TokenRouting(msgspec.Struct, array_like=True, frozen=True):
    """The gates one token gave to each expert: index = expert, values sum to 1.

    `mean` averages over all routed linears, `layers` over those of each decoder layer.
    """

    mean: list[float]
    layers: list[list[float]] | None = None


class SequenceStart(msgspec.Struct, array_like=True, frozen=True):
    """How a sequence came to its first token."""

    queue_seconds: float
    """From its arrival in the engine to the first step that it was part of."""
    prefill_seconds: float
    """From there to its first token."""


class SequenceOutput(msgspec.Struct, array_like=True, frozen=True):
    """What one step added to one sequence.

    `prompt_logprobs` and `start` come once, with the first token; the former has one entry for each
    prompt token but the first (which nothing predicts). `num_cached_tokens` counts the prompt
    tokens whose keys and values came from the prefix cache. `stop_reason` is the stop token id that
    ended it, if any.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    routing: list[TokenRouting] | None = None
    error_code: str | None = None
    """A stable code, where `error` is the adapter's fault or the request's."""
    start: SequenceStart | None = None


class AdapterStoreStats(msgspec.Struct, array_like=True, frozen=True):
    """What the tiers of adapter memory hold; counters are totals since the engine's start."""

    device_bytes: int = 0
    device_capacity: int = 0
    host_bytes: int = 0
    host_capacity: int = 0
    num_device: int = 0
    """Adapters on the device."""
    num_host: int = 0
    """Adapters in host memory, those on the device included."""
    num_loading: int = 0
    loads: int = 0
    """Adapters read from disk."""
    load_failures: int = 0
    device_evictions: int = 0
    host_evictions: int = 0


class EngineStats(msgspec.Struct, array_like=True, frozen=True):
    """The engine's state after a step; counters are totals since its start."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_ratio: float = 0.0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    adapters: AdapterStoreStats = AdapterStoreStats()


STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the sizes that a report counts steps by; one more bucket has the larger ones."""

LAYER_GROUPS = ("early", "middle", "late")
"""Thirds of the decoder layers, from the input to the output, that routing is told of."""


class RoutingSample(msgspec.Struct, array_like=True, frozen=True):
    """How an adapter routed in sampled steps, by `LAYER_GROUPS`, summed over tokens and layers.

    A token's gates in a layer are averaged over the layer's linears, so that they sum to 1.
    """

    adapter: str
    gates: list[list[float]]
    """For each group, by expert."""
    entropy: list[float]
    """For each group, of the tokens' gates, in nats."""
    count: list[int]
    """For each group, how many pairs of a token and a layer these are sums over."""

    def plus(self, other: RoutingSample) -> RoutingSample:
        """Both together; of two generations of an adapter, the experts of the larger one."""
        return RoutingSample(
            self.adapter,
            [
                [a + b for a, b in zip_longest(mine, theirs, fillvalue=0.0)]
                for mine, theirs in zip(self.gates, other.gates, strict=True)
            ],
            [a + b for a, b in zip(self.entropy, other.entropy, strict=True)],
            [a + b for a, b in zip(self.count, other.count, strict=True)],
        )


class Report(msgspec.Struct, tag="report", frozen=True):
    """What the engine did since its last report; sent about once a second while it works."""

    num_steps: list[int]
    """Steps by their number of tokens, in `STEP_TOKEN_BUCKETS`."""
    num_tokens: int
    """Tokens of these steps, prompts' and new ones."""
    routing: list[RoutingSample]
    """Of the adapters that a sampled step had."""


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter is, as its files tell."""

    peft_type: str = ""
    num_experts: int = 0
    top_k: int = 0
    r: int = 0
    basis_dim: int = 0
    target_modules: list[str] = []
    num_parameters: int = 0
    num_bytes: int = 0


class AdapterStatus(msgspec.Struct, array_like=True, frozen=True):
    """What became of one version of an adapter; sent whenever it changes.

    `digest` is '' until the weights have been read once. `error` and `error_code` say why the last
    load failed; where another may go well, the tier is not "failed".
    """

    name: str
    number: int
    """Of the version: the API counts the contents that a name has had."""
    tier: AdapterTier
    digest: str = ""
    device_bytes: int = 0
    host_bytes: int = 0
    load_seconds: float = 0.0
    """From disk to host memory, the last time."""
    pinned: bool = False
    info: AdapterInfo | None = None
    error: str | None = None
    error_code: str | None = None
    loads: int = 0
    """How often it was read since its last status."""
    load_failures: int = 0
    """How often that failed since then."""
    device_evictions: int = 0
    """How often it gave way to others on the device since then."""
    host_evictions: int = 0


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """The engine is up; sent once."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    dtype: str
    device: str
    eos_token_ids: list[int] = []


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """All that one step produced."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    adapters: list[AdapterStatus] = []
    """Those that changed; they come before the outputs."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine cannot start or go on; the last thing it says."""

    error: str


Reply = Ready | Outputs | Report | Failed
