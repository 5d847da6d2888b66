"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Response

from malora_server.api.errors import invalid
from malora_server.api.protocol import DetokenizeRequest, TokenizeRequest
from malora_server.api.sampling import check_token_ids
from malora_server.api.state import Server
from malora_server.api.streaming import encode_json
from malora_server.api.tool_parser import FORMATS

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, server: Server) -> Response:
    """The token ids of a prompt, or of a conversation as the chat template writes it."""
    if body.model is not None:
        server.registry.resolve(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "Give either prompt or messages.")
    prompt = body.prompt
    # A chat template writes its special tokens itself.
    add = body.add_special_tokens
    if body.messages is not None:
        prompt = server.tokenizer.render_chat(
            body.messages, body.tools or (), FORMATS[server.settings.tool_call_parser]
        )
        add = bool(add)
    assert prompt is not None
    [tokens] = await server.tokenizer.encode([prompt], add_special_tokens=add is not False)
    strings = await server.tokenizer.token_texts(tokens) if body.return_token_strs else None
    return Response(
        encode_json(
            {
                "count": len(tokens),
                "max_model_len": server.engine.ready.max_model_len,
                "tokens": tokens,
                "token_strs": strings,
            }
        ),
        media_type="application/json",
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, server: Server) -> Response:
    """The text of token ids."""
    if body.model is not None:
        server.registry.resolve(body.model)
    check_token_ids(server, "tokens", body.tokens)
    prompt = await server.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return Response(encode_json({"prompt": prompt}), media_type="application/json")
