"""Finds the calls in what a model writes, piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


@dataclass(frozen=True)
class CallFormat:
    """How a model writes its calls: JSON objects with a name and arguments.

    begin, end: what stands around a call; where `begin` is '', a reply that begins with a call's
    JSON is nothing but calls. separator: between two calls. arguments_key: the arguments' name.
    """

    begin: str
    end: str
    separator: str
    arguments_key: str

    def write(self, name: str, arguments: str) -> str:
        """A call as the model writes it; arguments: JSON text."""
        return f"{self.head(name)}{arguments}{self.tail}"

    def head(self, name: str) -> str:
        """What stands before a call's arguments."""
        begin = self.begin + "\n" if self.begin else ""
        return f'{begin}{{"name": {json.dumps(name)}, "{self.arguments_key}": '

    @property
    def tail(self) -> str:
        """What stands after a call's arguments."""
        return "}\n" + self.end if self.end else "}"


FORMATS = {
    "hermes": CallFormat("<tool_call>", "</tool_call>", "\n", "arguments"),
    "llama3_json": CallFormat("", "", "; ", "parameters"),
}


@dataclass(frozen=True)
class CallPiece:
    """What a piece of text adds to one call; `name` comes once, with its first piece."""

    index: int
    name: str | None
    arguments: str


Piece = str | CallPiece
"""Text of the reply's content, or a piece of a call."""

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)
_OPENING = '{"name":'


class _State(Enum):
    TEXT = auto()
    HEAD = auto()
    """Behind a call's begin, before its arguments."""
    ARGUMENTS = auto()
    TAIL = auto()
    """Behind its arguments."""
    REST = auto()
    """Behind the last call that was allowed: nothing counts any more."""


class ToolCallParser:
    """One reply's text, taken apart as it comes into content and calls.

    How the text is cut into pieces makes no difference to what it becomes. What looks like a call
    but names no function that there is stays content. White space around calls is dropped.
    """

    def __init__(self, format: CallFormat, names: Collection[str], max_calls: int | None) -> None:
        self.num_calls = 0
        self._format = format
        self._names = names
        self._max_calls = max_calls
        self._state = _State.TEXT
        self._pending = ""
        self._said_text = False
        self._blank = ""
        """White space before what may be a call."""
        self._value = _Value()

    def push(self, text: str) -> list[Piece]:
        """Add text; what has become certain."""
        self._pending += text
        pieces: list[Piece] = []
        steps = {
            _State.TEXT: self._in_text,
            _State.HEAD: self._in_head,
            _State.ARGUMENTS: self._in_arguments,
            _State.TAIL: self._in_tail,
        }
        while self._state is not _State.REST and steps[self._state](pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What the end of the text makes certain."""
        pieces: list[Piece] = []
        if self._state is _State.HEAD:
            self._say(pieces, self._blank + self._format.begin + self._pending)
        elif self._state is _State.TEXT and (self._pending.strip() or not self.num_calls):
            self._say(pieces, self._pending)
        self._pending = ""
        return pieces

    def _say(self, pieces: list[Piece], text: str) -> None:
        if text:
            self._said_text = True
            pieces.append(text)

    def _in_text(self, pieces: list[Piece]) -> bool:
        begin = self._format.begin
        if not begin:
            return self._at_bare_call(pieces)
        before, found, after = self._pending.partition(begin)
        if found:
            certain = before.rstrip()
            self._say(pieces, certain)
            self._blank = before[len(certain) :]
            self._pending = after
            self._enter_call()
            return True
        # The end may be a call's beginning, or the white space before it.
        size = next(size for size in range(len(begin) - 1, -1, -1) if before.endswith(begin[:size]))
        certain = before[: len(before) - size].rstrip()
        self._say(pieces, certain)
        self._pending = before[len(certain) :]
        return False

    def _at_bare_call(self, pieces: list[Piece]) -> bool:
        if not self._said_text:
            rest = self._pending.lstrip(" \n;" if self.num_calls else None)
            if not rest:
                return False
            if rest.startswith("{"):
                self._blank = self._pending[: len(self._pending) - len(rest)]
                self._pending = rest
                self._enter_call()
                return True
        self._say(pieces, self._pending)
        self._pending = ""
        return False

    def _enter_call(self) -> None:
        last = self._max_calls is not None and self.num_calls >= self._max_calls
        self._state = _State.REST if last else _State.HEAD

    def _in_head(self, pieces: list[Piece]) -> bool:
        head = _HEAD.match(self._pending)
        if head is not None:
            name = _string(head[1])
            if name not in self._names:
                return self._no_call(pieces)
            self._pending = self._pending[head.end() :]
            self._value = _Value()
            self._state = _State.ARGUMENTS
            self._start(pieces, name, "")
            return True
        # Some models write the arguments first: such a call comes whole.
        if self._format.end:
            body, found, after = self._pending.partition(self._format.end)
            if not found:
                return False
        else:
            compact = "".join(self._pending.split())[: len(_OPENING)]
            if not _OPENING.startswith(compact):
                return self._no_call(pieces)
            return False
        name, arguments = _whole_call(body)
        if name not in self._names or arguments is None:
            return self._no_call(pieces)
        self._start(pieces, name, arguments)
        self._pending = after
        self._state = _State.TEXT
        return True

    def _start(self, pieces: list[Piece], name: str | None, arguments: str) -> None:
        pieces.append(CallPiece(self.num_calls, name, arguments))
        self.num_calls += 1

    def _no_call(self, pieces: list[Piece]) -> bool:
        begin = self._format.begin
        self._state = _State.TEXT
        self._say(pieces, self._blank + (begin or self._pending))
        self._pending = self._pending if begin else ""
        return True

    def _in_arguments(self, pieces: list[Piece]) -> bool:
        size = self._value.scan(self._pending)
        if size:
            pieces.append(CallPiece(self.num_calls - 1, None, self._pending[:size]))
            self._pending = self._pending[size:]
        if self._value.complete:
            self._state = _State.TAIL
        return self._value.complete

    def _in_tail(self, _pieces: list[Piece]) -> bool:
        _, found, after = self._pending.partition(self._format.end or "}")
        if found:
            self._pending = after
            self._state = _State.TEXT
        return bool(found)


class _Value:
    """Where a JSON value ends: it is followed, not checked."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int:
        """How many of the next characters belong to the value."""
        for at, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
                    if self._depth == 0:
                        self.complete = True
                        return at + 1
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif self._depth == 0 and char in ",} \n\t\r":
                self.complete = True
                return at
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return at + 1
        return len(text)


def _string(text: str) -> str | None:
    try:
        value: Any = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _whole_call(body: str) -> tuple[str | None, str | None]:
    """The name and arguments (JSON text) of a call's JSON; None where it has none."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None, None
    for key in ("arguments", "parameters"):
        if key in call:
            return call["name"], json.dumps(call[key], ensure_ascii=False)
    return call["name"], None
