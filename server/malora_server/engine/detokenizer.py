"""Token ids to text, one token at a time: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_TRIM_AT = 6
"""Tokens kept before the newest ones, at least; twice as many at most, between characters."""
_GIVE_UP_AT = 64
"""A window this long that still ends in broken bytes holds no character."""


class TokenDecoder:
    """Emits a token's text once no later token can change it.

    Decoders look at neighbours (a leading space, the bytes of one character), so a window of
    recent tokens is decoded again each time and what is new in it emitted. Text that ends in
    replacement characters may be a character whose last bytes are still to come, and is held.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """`context` are the tokens before the first one pushed; their text is not emitted."""
        self._decode = tokenizer.decode
        self._skip_special_tokens = skip_special_tokens
        self._sent = 0
        self._mark = 0
        self.length = 0
        """Characters emitted so far."""
        size = _TRIM_AT
        self._restart(list(context[-size:]))
        # A window that begins inside a character would spoil it, and with it the window's rest.
        while self._text.startswith(_REPLACEMENT) and size < min(len(context), _GIVE_UP_AT):
            size *= 2
            self._restart(list(context[-size:]))

    def push(self, token_id: int) -> str:
        """Add one token; return the text that has become final, often one token's, or ''."""
        window = self._window
        window.append(token_id)
        text = self._decode(window, self._skip_special_tokens)
        if not text.endswith(_REPLACEMENT):
            piece = text[self._sent :]
            self._sent = len(text)
            if len(window) - self._mark >= _TRIM_AT:
                # Both the mark and the end lie between characters.
                self._restart(window[self._mark :])
                self._mark = len(self._window)
        else:
            final = len(text.rstrip(_REPLACEMENT))
            if len(window) >= _GIVE_UP_AT:
                # No character is this long: these bytes are none. Only the last may yet be.
                final = len(text) - 1
                piece = text[self._sent : final]
                self._restart(window[-_TRIM_AT:])
                self._sent = len(self._text) - 1
            else:
                piece = text[self._sent : final]
                self._sent = max(self._sent, final)
        self.length += len(piece)
        return piece

    def finish(self) -> str:
        """The text still held: what an unfinished character's bytes decode to."""
        piece = self._decode(self._window, self._skip_special_tokens)[self._sent :]
        self._restart([])
        self.length += len(piece)
        return piece

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._text = self._decode(window, self._skip_special_tokens) if window else ""
        self._sent = len(self._text.rstrip(_REPLACEMENT))
        self._mark = 0


class StopMatcher:
    """Passes text on up to the stop string that is complete first (the longest of several).

    The end of the text so far that may be a stop string's beginning is held back.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = stop
        self._include_stop = include_stop
        self._reach = max(map(len, stop), default=0) - 1
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Add text; return what may be shown. Once `matched` is set, feed no more."""
        text = self._held + piece
        hits = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if hits:
            end, start, self.matched = min(hits)
            self._held = ""
            return text[: end if self._include_stop else start]
        for at in range(max(0, len(text) - self._reach), len(text)):
            tail = text[at:]
            if any(stop.startswith(tail) for stop in self._stop):
                self._held = tail
                return text[:at]
        self._held = ""
        return text

    def finish(self) -> str:
        """The text still held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


class IncrementalDetokenizer:
    """One sequence's text as its tokens come: TokenDecoder, then StopMatcher."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Stop strings count only in text that comes after the first `min_tokens` tokens."""
        self._decoder = TokenDecoder(
            tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._matcher = StopMatcher(stop, include_stop=include_stop) if stop else None
        self._unchecked = min_tokens

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matcher.matched if self._matcher else None

    @property
    def length(self) -> int:
        """Characters decoded so far, those that the stop strings hold back included."""
        return self._decoder.length

    def push(self, token_id: int) -> str:
        """Add one token; return the text to show now. Push no more once `matched` is set."""
        piece = self._decoder.push(token_id)
        if self._matcher is None:
            return piece
        if self._unchecked > 0:
            self._unchecked -= 1
            return piece
        return self._matcher.feed(piece) if piece else ""

    def finish(self) -> str:
        """The rest of the text, when the last token has been pushed and no stop string matched."""
        piece = self._decoder.finish()
        if self._matcher is None:
            return piece
        shown = self._matcher.feed(piece)
        return shown if self._matcher.matched else shown + self._matcher.finish()
