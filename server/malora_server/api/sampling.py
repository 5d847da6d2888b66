"""From a request's fields to the engine's sampling parameters, checked against the model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgspec

from malora_server.api.errors import ApiError, invalid
from malora_server.api.protocol import GenerationRequest
from malora_server.api.state import ServerState
from malora_server.engine.messages import SamplingParams

_SEED_MASK = 2**63 - 1
DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class TokenLimits:
    """How many tokens were asked for: `requested` None means `default`, clamped to the limits."""

    requested: int | None
    default: int | None
    """None: all that there is room for."""
    param: str = "max_tokens"

    def resolve(self, prompt_length: int, server: ServerState) -> int:
        """Tokens to generate after a prompt; ApiError over a setting's limit, or the context's."""
        max_prompt_tokens = server.settings.max_prompt_tokens
        max_output_tokens = server.settings.max_output_tokens
        if max_prompt_tokens is not None and prompt_length > max_prompt_tokens:
            raise ApiError(
                400,
                f"The prompt has {prompt_length} tokens; this server takes at most "
                f"{max_prompt_tokens}.",
                code="prompt_too_long",
            )
        if (
            max_output_tokens is not None
            and self.requested is not None
            and self.requested > max_output_tokens
        ):
            raise invalid(
                self.param,
                f"{self.param} is {self.requested}; this server generates at most "
                f"{max_output_tokens}.",
                "max_tokens_too_large",
            )
        max_model_len = server.engine.ready.max_model_len
        room = max_model_len - prompt_length
        if room < 1:
            raise _too_long(
                f"The prompt has {prompt_length} tokens; with at least one to generate, this "
                f"model's context holds {max_model_len}.",
                None,
            )
        if self.requested is not None:
            if self.requested > room:
                raise _too_long(
                    f"The prompt's {prompt_length} tokens and {self.param} = {self.requested} "
                    f"exceed this model's context of {max_model_len} tokens.",
                    self.param,
                )
            return self.requested
        return min(limit for limit in (room, self.default, max_output_tokens) if limit is not None)


def _too_long(message: str, param: str | None) -> ApiError:
    return ApiError(400, message, code="context_length_exceeded", param=param)


def check_logprobs(server: ServerState, param: str, count: int | None) -> None:
    """Refuse more alternatives than the server gives."""
    if count is not None and count > server.settings.max_logprobs:
        raise invalid(
            param, f"{param} is {count}; this server gives at most {server.settings.max_logprobs}."
        )


def check_token_ids(server: ServerState, param: str, token_ids: list[int]) -> None:
    """Refuse ids outside the vocabulary."""
    vocab_size = server.engine.ready.vocab_size
    if token_ids and max(token_ids) >= vocab_size:
        raise invalid(
            param,
            f"{param} has token id {max(token_ids)}; the vocabulary ends at {vocab_size - 1}.",
        )


def sampling_params(
    server: ServerState,
    body: GenerationRequest,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: str | None = None,
) -> SamplingParams:
    """The parameters of the request's first choice."""
    bias = body.logit_bias or {}
    check_token_ids(server, "logit_bias", list(bias))
    check_token_ids(server, "stop_token_ids", body.stop_token_ids or [])
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(
            "min_tokens", f"min_tokens is {min_tokens}, more than the {max_tokens} to generate."
        )
    seed = secrets.randbits(63) if body.seed is None else body.seed & _SEED_MASK
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        min_tokens=min_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=bias,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        routing=(
            "layers"
            if body.include_routing == "layers"
            else "mean"
            if body.include_routing
            else None
        ),
        grammar=grammar,
    )


def nth_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of another choice: the same but for the seed."""
    if index == 0:
        return params
    return msgspec.structs.replace(params, seed=(params.seed + index) & _SEED_MASK)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
