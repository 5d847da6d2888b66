"""Grammars that a sequence's text must follow, through llguidance.

A grammar travels as llguidance's own text. Nothing here touches a tensor, so that the API's side
can make and check grammars without torch.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from tokenizers import Tokenizer

_LIMITS = LLParserLimits(max_lexer_states=50_000, step_lexer_fuel=100_000, verbose_errors=False)
"""Bounds what a grammar costs: a state takes up to 2 kB, a step's fuel lasts about 7 ms."""
_WHITESPACE = r"(\x20|\x0A[\x20\x09]{0,32})"
"""Between JSON's tokens: a space, or a new line and its indentation. Without such a bound a weak
model fills its whole output with it."""
_NO_TEXT = "no token of the vocabulary can continue the text"
_MAX_CACHED = 32
_NUM_COMPILING = 2


class GrammarError(ValueError):
    """A grammar that can't be used; the message says why."""


def from_json_schema(schema: dict[str, Any] | str) -> str:
    """The grammar of the JSON texts that fit a schema, an object; a str is its JSON text.

    Raises GrammarError for a text that is no JSON object.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        return LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        raise GrammarError(f"the schema is no JSON object: {error}") from None


def json_rule(schema: dict[str, Any]) -> str:
    """JSON that fits a schema, as a part of a rule in `from_lark`'s notation."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}})


def from_lark(text: str) -> str:
    """The grammar of a context-free grammar in Lark's notation."""
    return LLMatcher.grammar_from_lark(text)


def from_regex(regex: str) -> str:
    """The grammar of the texts that match the whole of a regular expression (Rust's syntax)."""
    return LLMatcher.grammar_from_regex(regex)


def from_choice(choices: Sequence[str]) -> str:
    """The grammar of a few texts."""
    return grammar_from("choice", json.dumps(list(choices)))


def from_ebnf(text: str) -> str:
    """The grammar of a context-free grammar, written in Lark's or in GBNF's notation (`::=`).

    Raises GrammarError for what is neither.
    """
    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise GrammarError(str(error)) from None


def load_tokenizer(
    backend: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
) -> LLTokenizer:
    """What llguidance needs to know of the vocabulary.

    vocab_size: the logits' width. eos_token_ids: those that end a text, of which a complete
    grammar allows every one. Raises GrammarError for a tokenizer that it can't take.
    """
    known = backend.get_vocab_size()
    ends = sorted(token for token in eos_token_ids if token < known)
    if not ends:
        raise GrammarError("the base model has no token that ends a text")
    try:
        return LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, known), eos_token=ends)
    except ValueError as error:
        raise GrammarError(f"the base model's tokenizer can't follow grammars: {error}") from None


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of its text; copies of it are cheap.

    Lets go of Python's lock while it works. Raises GrammarError for a malformed, unsupported or
    too large grammar.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        # Copies share the first mask, which is the dearest: the lexer begins with nothing.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(_reason(matcher))
    return matcher


class Matcher:
    """How far one sequence's text is in its grammar: a function of its output tokens."""

    __slots__ = ("_inner", "eos_token_ids", "error")

    def __init__(self, inner: LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._inner = inner
        self.eos_token_ids = eos_token_ids
        self.error: str | None = None
        """Why the text can't go on."""

    def accept(self, token_id: int) -> bool:
        """Take in the next output token; True for one that ends the text."""
        if token_id in self.eos_token_ids:
            return True
        if not self._inner.consume_token(token_id):
            self.error = _reason(self._inner)
        return False


class Grammars:
    """One engine's grammars: compiled beside its loop, the latest kept.

    vocab_size: the logits' width. Every method belongs to the loop's thread. Raises GrammarError
    for a tokenizer that can't be used.
    """

    def __init__(
        self,
        backend: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        num_threads: int | None = None,
    ) -> None:
        self._tokenizer = load_tokenizer(backend, vocab_size, eos_token_ids)
        self._eos_token_ids = frozenset(self._tokenizer.eos_tokens)
        self.num_words = (self._tokenizer.vocab_size + 31) // 32
        """int32 words of a mask over the vocabulary."""
        self._executor = LLExecutor(num_threads)
        self._compiling = ThreadPoolExecutor(_NUM_COMPILING, thread_name_prefix="grammar")
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """The compiled grammar, once it is; GrammarError where it can't be."""
        future = self._compiled.get(grammar)
        if future is None:
            future = self._compiling.submit(compile_grammar, self._tokenizer, grammar)
            self._compiled[grammar] = future
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return future

    def matcher(self, compiled: LLMatcher) -> Matcher:
        """A matcher for one sequence."""
        return Matcher(compiled.deep_copy(), self._eos_token_ids)

    def fill(self, matchers: Sequence[Matcher], masks: np.ndarray) -> None:
        """Write which tokens may come next.

        masks: (R, num_words) int32, contiguous, a row for each matcher; token t's bit is bit
        t % 32 of word t // 32. A matcher that can't go on gets no bit, and its `error`.
        """
        # One at a time is faster here: the threads have to be woken.
        if len(matchers) == 1:
            matchers[0]._inner.unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
        else:
            inner = [(matcher._inner, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(
                inner, masks.ctypes.data, masks.strides[0], len(masks)
            )
        for row, matcher in enumerate(matchers):
            if matcher._inner.is_error():
                matcher.error = matcher.error or _reason(matcher._inner)
                masks[row] = 0


def forbid(mask: np.ndarray, token_ids: Collection[int]) -> None:
    """Take tokens out of a row of masks, (num_words,) int32, unless no other would be left."""
    rest = mask.view(np.uint32).copy()
    for token_id in token_ids:
        if 0 <= token_id < 32 * len(rest):
            rest[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
    if rest.any():
        mask[:] = rest.view(np.int32)


def _reason(matcher: LLMatcher) -> str:
    # What follows shows the parser's state.
    reason = matcher.get_error().split("\n<")[0].strip()
    return _NO_TEXT if reason.startswith("NoExtension") else reason
