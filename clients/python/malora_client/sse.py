"""Server-sent events, as far as a completion stream needs them: the events' data."""

from __future__ import annotations

from collections.abc import Iterator

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventDecoder:
    """Turns pieces of a stream, cut anywhere, into the data of its events.

    Works on bytes, not on httpx's `iter_lines`, which also cuts at U+2028, U+0085 and their
    like: those are no line ends in an event stream, and JSON may hold them unescaped. Within
    bytes no part of a multi-byte character looks like a line end.
    """

    def __init__(self) -> None:
        self._partial = b""
        self._after_cr = False
        self._first_line = True
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that `piece` completes; several data lines joined by newlines."""
        for line in self._lines(piece):
            if not line:
                if self._data:
                    data, self._data = "\n".join(self._data), []
                    yield data
                continue
            name, _, value = line.partition(b":")
            if name == b"data":  # A comment has an empty name; event, id and retry say nothing.
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))

    def _lines(self, piece: bytes) -> Iterator[bytes]:
        if not piece:
            return
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        buffer = self._partial + piece
        self._after_cr = buffer.endswith(b"\r")
        lines = buffer.splitlines(keepends=True)
        self._partial = b""
        if lines and not lines[-1].endswith((b"\n", b"\r")):
            self._partial = lines.pop()
        for line in lines:
            if self._first_line:
                line = line.removeprefix(_BYTE_ORDER_MARK)
                self._first_line = False
            yield line.rstrip(b"\r\n")
