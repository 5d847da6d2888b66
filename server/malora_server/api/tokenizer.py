"""Text to token ids and back, for prompts and for the words of log-probabilities."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend

from malora_server.api.errors import ApiError
from malora_server.api.protocol import ChatMessage, FunctionTool
from malora_server.api.tool_parser import CallFormat
from malora_server.api.tools import plain_messages, template_messages
from malora_server.settings import StartError

_LONG = 4096
"""Characters, or tokens, from which work on them would hold up the other requests' streams."""
_NUM_THREADS = 4
"""For what is long. They are of its own, so that other work in threads never waits for it."""
_GENERIC_CLASSES = {"TokenizersBackend", "PreTrainedTokenizerFast"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_T = TypeVar("_T")


def _byte_level_alphabet() -> dict[str, int]:
    # Byte-level BPE writes printable Latin-1 bytes as themselves, the rest from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


class Tokenizer:
    """The base model's tokenizer and chat template."""

    _alphabet: ClassVar[dict[str, int]] = _byte_level_alphabet()

    def __init__(self, pretrained: Any) -> None:
        """`pretrained` is a fast tokenizer of transformers."""
        self._pretrained = pretrained
        self.backend: Backend = pretrained.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "tokenizer")
        self._texts: dict[int, str] = {}
        # Beside this token a token decodes as it does inside a text.
        self._anchor = self.backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_length = len(self.backend.decode(self._anchor, False))

    @classmethod
    def load(cls, base: str) -> Tokenizer:
        """The tokenizer of the model at `base`, a folder or a Hub id; StartError without one."""
        if base.startswith((".", "/", "~")) and not Path(base).is_dir():
            raise StartError(f"there is no folder {base!r}; --base wants a folder or a Hub id")
        try:
            pretrained = _pretrained_class(base).from_pretrained(base)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise StartError(
                f"no base model with a tokenizer at {base!r}; --base wants a folder or a Hub id "
                f"({reason})"
            ) from None
        if not pretrained.is_fast:
            raise StartError(f"the tokenizer of {base!r} has no tokenizer.json; convert it first")
        return cls(pretrained)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Each text's token ids; long ones are encoded beside the event loop."""

        def encode() -> list[list[int]]:
            # Of the library's ways this one leaves other threads the interpreter, and is fastest.
            found = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in found]

        return await self._run(encode, sum(map(len, texts)))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """All tokens at once; beside the event loop where they are many."""

        def decode() -> str:
            # As above: decode alone would hold the interpreter.
            return self.backend.decode_batch([token_ids], skip_special_tokens)[0]

        return await self._run(decode, len(token_ids))

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """`token_text` of each; beside the event loop where they are many."""
        return await self._run(lambda: [*map(self.token_text, token_ids)], len(token_ids))

    async def _run(self, work: Callable[[], _T], size: int) -> _T:
        if size <= _LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def render_chat(
        self, messages: list[ChatMessage], tools: Sequence[FunctionTool], format: CallFormat
    ) -> str:
        """The conversation as a prompt that asks for the assistant's turn.

        format: how a template that knows no tools has them, and calls, written.
        """
        if not self._pretrained.chat_template:
            raise ApiError(
                400,
                "The base model has no chat template; use /v1/completions.",
                code="chat_template_missing",
                param="messages",
            )
        shown = [tool.model_dump(exclude_none=True) for tool in tools] or None
        template: str = self._pretrained.get_chat_template(None, shown)
        if "tools" in template:
            conversation = template_messages(messages)
        else:
            conversation, shown = plain_messages(messages, tools, format), None
        try:
            prompt: str = self._pretrained.apply_chat_template(
                conversation, tools=shown, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ApiError(
                400,
                f"The chat template refuses these messages: {error}.",
                code="chat_template_refused",
                param="messages",
            ) from None
        return prompt

    def token_text(self, token_id: int) -> str:
        """One token as it reads inside a text; U+FFFD where it is part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            both = self.backend.decode([*self._anchor, token_id], False)
            text = self._texts[token_id] = both[self._anchor_length :]
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """One token's UTF-8 bytes, also where they are only part of a character."""
        text = self.token_text(token_id)
        piece = self.backend.id_to_token(token_id)
        if "\ufffd" not in text or piece is None:
            return text.encode()
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        if all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        return text.encode()


def _pretrained_class(base: str) -> Any:
    # AutoTokenizer imports torch, which the API process has no other use for and which takes
    # seconds; a folder whose config names the generic class needs no look-up.
    config = Path(base) / "tokenizer_config.json"
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in _GENERIC_CLASSES and config.with_name("tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
