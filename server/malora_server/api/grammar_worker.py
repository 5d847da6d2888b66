"""The process in which the API compiles grammars before it takes them.

Some are small to write and exponential to compile. What they cost in time and memory they cost
here, where it is bounded: `GrammarChecker` ends a worker that takes too long, the system one that
takes too much. JSON lines on stdin and stdout; the first one brings the tokenizer.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from malora_server.engine import grammar as grammars
from malora_server.engine.grammar import GrammarError

_MEMORY = 96 * 2**20
"""Bytes that compiling a grammar may take."""
_SECONDS = 10.0
"""For one grammar; `GrammarChecker` waits for less, but it may have ended."""
_MAX_INTERSECTED = 8
"""The states of an intersection of regular expressions can be as many as two to their number."""
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "not", "if"}
_ANNOTATIONS = {
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "default",
    "definitions",
    "description",
    "examples",
    "title",
}
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')


def check(tokenizer: LLTokenizer, kind: str, value: str) -> str:
    """The grammar of a request's field, known to compile. GrammarError for one that is refused."""
    match kind:
        case "json":
            try:
                check_schema(json.loads(value))
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"the schema can't be read: {error}") from None
            grammar = grammars.from_json_schema(value)
        case "regex":
            grammar = grammars.from_regex(value)
        case "choice":
            grammar = grammars.from_choice(json.loads(value))
        case "ebnf":
            _check_ebnf(value)
            grammar = grammars.from_ebnf(value)
        case "calls":
            grammar = _from_calls(json.loads(value))
        case _:
            raise GrammarError(f"there is no kind {kind!r} of grammar")
    grammars.compile_grammar(tokenizer, grammar)
    return grammar


def _from_calls(wanted: dict[str, Any]) -> str:
    """What `OfferedTools.grammar` asks for: one or more calls, each with arguments that fit."""
    rules, more = [], wanted["max_calls"] - 1
    for number, call in enumerate(wanted["calls"]):
        check_schema(call["schema"])
        head, tail = json.dumps(call["head"]), json.dumps(call["tail"])
        rules.append(f"call_{number}: {head} {grammars.json_rule(call['schema'])} {tail}")
    separator = json.dumps(wanted["separator"])
    names = " | ".join(f"call_{number}" for number in range(len(rules)))
    again = f" ({separator} call){{0,{more}}}" if more else ""
    return grammars.from_lark("\n".join([f"start: call{again}", f"call: {names}", *rules]))


def check_schema(schema: Any) -> None:
    """Refuse a schema that may intersect many regular expressions."""
    regexes: set[str] = set()
    combines = False
    for node in _objects(schema):
        keys = node.keys() - _ANNOTATIONS
        combines |= "allOf" in keys or (bool(keys & _COMBINING) and len(keys) > 1)
        regexes |= {str(node[key]) for key in ("pattern", "format") if key in node}
        properties = node.get("patternProperties")
        regexes |= set(properties) if isinstance(properties, dict) else set()
    if combines and len(regexes) > _MAX_INTERSECTED:
        raise GrammarError(
            f"the schema combines schemas (allOf, or $ref, anyOf, … beside other keywords) and has "
            f"{len(regexes)} patterns and formats; such a schema may have {_MAX_INTERSECTED}"
        )


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            yield node
            rest.extend(node.values())
        elif isinstance(node, list):
            rest.extend(node)


def _check_ebnf(text: str) -> None:
    syntax = _LITERAL.sub(" ", text)
    if "%json" in syntax:
        raise GrammarError("%json is not taken inside a grammar; give the schema as json")
    if syntax.count("&") > _MAX_INTERSECTED:
        raise GrammarError(f"the grammar has more than {_MAX_INTERSECTED} intersections (&)")


def main() -> None:
    """Answer requests until stdin ends."""
    first = json.loads(sys.stdin.readline())
    try:
        tokenizer = grammars.load_tokenizer(
            Tokenizer.from_str(first["tokenizer"]), first["vocab_size"], first["eos_token_ids"]
        )
    except GrammarError as error:
        _answer(error=str(error))
        return
    _answer()
    with open("/proc/self/status", encoding="ascii") as status:
        [kilobytes] = [line.split()[1] for line in status if line.startswith("VmData:")]
    limit = int(kilobytes) * 1024 + _MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for line in sys.stdin:
        request = json.loads(line)
        # Ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, _SECONDS)
        try:
            _answer(grammar=check(tokenizer, request["kind"], request["value"]))
        except GrammarError as error:
            _answer(error=str(error))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(**fields: str) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
