"""A reply's text becomes the same content and calls, however it is cut into pieces."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malora_server.api.tool_parser import FORMATS, CallPiece, ToolCallParser

NAMES = {"weather", "add"}
HERMES, LLAMA = FORMATS["hermes"], FORMATS["llama3_json"]


def parsed(format, pieces, max_calls=None):
    parser = ToolCallParser(format, NAMES, max_calls)
    content, calls = "", []
    for piece in [*(p for text in pieces for p in parser.push(text)), *parser.finish()]:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.arguments
        else:
            assert piece
            content += piece
    assert parser.num_calls == len(calls)
    return content, [tuple(call) for call in calls]


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TWICE = call("weather", '{"city": "Ghent"}') + "\n" + call("add", '{"a": [1, {"b": "}\\""}]}')
CASES = [
    (HERMES, "Plain words.\n ", "Plain words.\n ", []),
    (HERMES, call("add", "{}"), "", [("add", "{}")]),
    (
        HERMES,
        TWICE,
        "",
        [("weather", '{"city": "Ghent"}'), ("add", '{"a": [1, {"b": "}\\""}]}')],
    ),
    (HERMES, "I look.\n\n" + call("add", "{}") + "\n\n", "I look.", [("add", "{}")]),
    (HERMES, "a < b <tool", "a < b <tool", []),
    (HERMES, call("rob", "{}"), call("rob", "{}"), []),
    (
        HERMES,
        "Hm " + call("rob", "{}") + call("add", "{}"),
        "Hm " + call("rob", "{}"),
        [("add", "{}")],
    ),
    (HERMES, "so <tool_call> is a tag", "so <tool_call> is a tag", []),
    (HERMES, "<tool_call>{]</tool_call>", "<tool_call>{]</tool_call>", []),
    (
        HERMES,
        '<tool_call>{"arguments":{"a": "é"},"name":"add"}</tool_call>',
        "",
        [("add", '{"a": "é"}')],
    ),
    (
        HERMES,
        '<tool_call>{"name":"add","arguments":{"a": "</tool_call>"',
        "",
        [("add", '{"a": "</tool_call>"')],
    ),
    (HERMES, '<tool_call>{"name":"add","arguments":null}</tool_call>', "", [("add", "null")]),
    (HERMES, '<tool_call>{"name":"add"}</tool_call>', '<tool_call>{"name":"add"}</tool_call>', []),
    (LLAMA, "Plain { words }", "Plain { words }", []),
    (LLAMA, ' {"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (
        LLAMA,
        '{"name": "add", "parameters": {"a": 1}}; {"name": "weather", "parameters": {}}\n',
        "",
        [("add", '{"a": 1}'), ("weather", "{}")],
    ),
    (LLAMA, '{"named": 1}', '{"named": 1}', []),
    (LLAMA, '{"name": "rob", "parameters": {}}', '{"name": "rob", "parameters": {}}', []),
    (LLAMA, ' {"na', ' {"na', []),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "content", "calls"), CASES)
def test_what_a_text_becomes(format, text, content, calls):
    assert parsed(format, [text]) == (content, calls)
    assert parsed(format, list(text)) == (content, calls)


@given(
    case=st.sampled_from(CASES),
    cuts=st.sets(st.integers(0, 120), max_size=12),
)
def test_cuts_make_no_difference(case, cuts):
    format, text, content, calls = case
    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(at)]
    assert parsed(format, pieces) == (content, calls)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    format=st.sampled_from([HERMES, LLAMA]),
    calls=st.lists(
        st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(max_size=5), values)),
        min_size=1,
        max_size=4,
    ),
    size=st.integers(1, 9),
    ascii=st.booleans(),
)
def test_written_calls_are_read_back(format, calls, size, ascii):
    wanted = [(name, json.dumps(arguments, ensure_ascii=ascii)) for name, arguments in calls]
    text = format.separator.join(format.write(name, arguments) for name, arguments in wanted)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert parsed(format, pieces) == ("", wanted)
    assert parsed(format, pieces, max_calls=1) == ("", wanted[:1])
