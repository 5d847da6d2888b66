"""The event decoder: whatever the cuts and the line ends, the same events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malora_client.sse import EventDecoder


def decode(*pieces: bytes) -> list[str]:
    decoder = EventDecoder()
    return [data for piece in pieces for data in decoder.feed(piece)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends(end: bytes) -> None:
    lines = [b"data: one", b"", b"data: two", b"data: three", b"", b"data: open"]
    assert decode(end.join(lines) + end) == ["one", "two\nthree"]


def test_only_data_counts() -> None:
    stream = (
        b"\xef\xbb\xbfdata:no space\n\n: a comment\n\nevent: x\nid: 1\nretry: 5\n\n"
        b"data:  two spaces\n:within\n\ndata\n\ndatax: no\n\n"
    )
    assert decode(stream) == ["no space", " two spaces", ""]


def test_an_event_that_is_never_ended_is_dropped() -> None:
    assert decode(b"data: 1\n\ndata: 2\n") == ["1"]


def test_unicode_line_separators_are_text() -> None:
    text = '{"text": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"}'
    assert decode(f"data: {text}\n\n".encode()) == [text]


def test_a_carriage_return_at_the_end_of_a_piece_ends_the_event_at_once() -> None:
    decoder = EventDecoder()
    assert list(decoder.feed(b"data: 1\r\r")) == ["1"]
    assert list(decoder.feed(b"\ndata: 2\r\n\r")) == ["2"]


values = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)


@given(
    events=st.lists(st.lists(values, min_size=1, max_size=3), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=20),
)
def test_cuts_do_not_matter(events: list[list[str]], end: str, cuts: list[int]) -> None:
    lines = [line for event in events for line in [*(f"data: {v}" for v in event), ": beat", ""]]
    stream = "".join(line + end for line in lines).encode()
    at = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(at)]
    assert decode(*pieces) == ["\n".join(event) for event in events]
