"""How much one request may ask for, checked before any work is done on it."""

from __future__ import annotations

from malora_server.api.errors import invalid
from malora_server.api.protocol import GenerationRequest
from malora_server.api.state import ServerState


def check_limits(server: ServerState, body: GenerationRequest, num_prompts: int) -> None:
    """ApiError 400 where the request asks for more than the settings allow, 429 for a full queue.

    The tokens of prompts and replies are `TokenLimits`' to check, once they are known.
    """
    settings = server.settings
    num_choices = num_prompts * (body.n or 1)
    if num_choices > settings.max_choices:
        raise invalid(
            "n",
            f"The request asks for {num_choices} choices (n times prompts); this server gives at "
            f"most {settings.max_choices}.",
            "too_many_choices",
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for param, count, kind in (
        ("stop", len(stops), "strings"),
        ("stop_token_ids", len(body.stop_token_ids or ()), "tokens"),
    ):
        if count > settings.max_stops:
            raise invalid(
                param,
                f"{param} has {count} {kind}; this server takes at most {settings.max_stops}.",
                "too_many_stops",
            )
    longest = max(map(len, stops), default=0)
    if longest > settings.max_stop_length:
        raise invalid(
            "stop",
            f"stop has a string of {longest} characters; this server takes at most "
            f"{settings.max_stop_length}.",
            "stop_too_long",
        )
    num_biases = len(body.logit_bias or ())
    if num_biases > settings.max_logit_biases:
        raise invalid(
            "logit_bias",
            f"logit_bias has {num_biases} tokens; this server takes at most "
            f"{settings.max_logit_biases}.",
            "too_many_logit_biases",
        )
    server.admission.check(num_choices)
