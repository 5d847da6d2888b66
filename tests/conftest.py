"""What all tests share: their environment, and requests made up from an OpenAPI document."""

import json
import os
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Before anything imports torch or triton, which read the environment once.
import malora  # noqa: F401  for what it sets; see there

# The same examples in every run; a slow machine fails nothing.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("suite")

if not os.path.exists("/dev/nvidiactl"):  # no GPU: its kernels run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def patched_once() -> Iterator[None]:
    """Have Triton's interpreter put its own in place of triton.language once for each kernel.

    It does so each time that a function calls another, too, and takes half of its time for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_INTERPRET" in os.environ:
            from triton import language
            from triton.runtime import interpreter

            # What a kernel sees, and what the functions that come with the language do.
            both = SimpleNamespace(__globals__={"tl": language, "core": language.core})
            stock = interpreter._patch_lang
            patch.setattr(interpreter, "_patch_lang", lambda _kernel: stock(both))
            patch.setattr(
                interpreter.InterpretedFunction,
                "__call__",
                lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs),
            )
        yield


@dataclass(frozen=True)
class MadeUp:
    """A request that a server must answer, if only with an error object."""

    method: str
    path: str
    json: Any = None
    has_json: bool = False


@st.composite
def _anything(draw: st.DrawFn) -> Any:
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8)
    )
    return draw(
        st.recursive(
            leaves,
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
        )
    )


@pytest.fixture(scope="session")
def fuzz() -> Callable[..., int]:
    """Send made-up requests to one operation of a server, and see that none finds a fault in it.

    `fuzz(client, document, method, path, models=…, examples=…)`: how many did what they asked for.
    Most fit the operation's schema, where sizes are small and names are those of `models`, so that
    many can; the others are broken in one place.
    """
    return _fuzz


def _fuzz(
    client: httpx.Client,
    document: dict[str, Any],
    method: str,
    path: str,
    *,
    models: Collection[str],
    examples: int,
) -> int:
    num_done = 0

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(_requests(document, method, path, models))
    def send(request: MadeUp) -> None:
        nonlocal num_done
        reply = client.request(
            request.method,
            request.path,
            content=json.dumps(request.json) if request.has_json else None,
            headers={"content-type": "application/json"},
        )
        _check(reply)
        num_done += reply.is_success

    send()
    return num_done


def _check(reply: httpx.Response) -> None:
    assert reply.headers["x-request-id"]
    assert reply.status_code < 500, reply.text
    assert "Traceback" not in reply.text
    if not reply.is_success:
        body = reply.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"]
    elif reply.headers["content-type"].startswith("text/event-stream"):
        *events, last, rest = reply.text.split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        for event in events:
            assert "error" not in json.loads(event.removeprefix("data: "))


def _requests(
    document: dict[str, Any], method: str, path: str, models: Collection[str]
) -> st.SearchStrategy[MadeUp]:
    document = deepcopy(document)
    for schema in document["components"]["schemas"].values():
        _narrow(schema.get("properties", {}), sorted(models))
    operation = document["paths"][path][method]
    names = st.sampled_from([*models, "nobody", "../x", "é/ü", "%00"]) | st.text(min_size=1)
    paths = st.builds(lambda name: path.replace("{name}", quote(name, safe="")), names)
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return st.builds(MadeUp, st.just(method.upper()), paths)
    fitting = _fitting(content["application/json"]["schema"], document["components"]["schemas"])
    bodies = st.integers(0, 99).flatmap(
        lambda at: fitting if at < 70 else _anything() if at < 75 else fitting.flatmap(_broken)
    )
    return st.builds(MadeUp, st.just(method.upper()), paths, bodies, st.just(True))


def _narrow(properties: dict[str, Any], models: list[str]) -> None:
    token_ids = {"type": "array", "minItems": 1, "items": {"enum": list(range(300))}}
    text = {"type": "string", "minLength": 1}
    limits: dict[str, Any] = {
        "model": {"enum": models},
        "prompt": {"anyOf": [text, token_ids, {"type": "array", "minItems": 1, "items": text}]},
        "tokens": token_ids,
        "stop_token_ids": token_ids,
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 6},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 6},
        "min_tokens": {"type": "integer", "minimum": 0, "maximum": 2},
        "n": {"type": "integer", "minimum": 1, "maximum": 3},
        "best_of": {"type": "null"},
        "logprobs": {"enum": [None, 0, 3, True]},
        "top_logprobs": {"enum": [None, 0, 2]},
        "logit_bias": {"enum": [None, {}, {"5": 1.5, "7": -100}]},
        "stream": {"type": "boolean"},
    }
    if "messages" in properties:
        talk = [{"role": "user", "content": "hello"}]
        limits["messages"] = {"anyOf": [{"const": talk}, properties["messages"]]}
    for name in properties.keys() & limits.keys():
        properties[name] = limits[name]


def _fitting(schema: dict[str, Any], named: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit a schema, as far as the keywords go that pydantic writes."""
    if "$ref" in schema:
        return _fitting(named[schema["$ref"].rpartition("/")[2]], named)
    if "anyOf" in schema:
        return st.one_of([_fitting(option, named) for option in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    least, most = schema.get("minimum"), schema.get("maximum")
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(least, most)
        case "number":
            return st.floats(
                schema.get("exclusiveMinimum", least),
                most,
                exclude_min="exclusiveMinimum" in schema,
                allow_nan=False,
                allow_infinity=False,
            )
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=20)
        case "array":
            items = _fitting(schema.get("items", {}), named)
            return st.lists(items, min_size=schema.get("minItems", 0), max_size=4)
        case "object":
            fields = {
                name: _fitting(field, named) for name, field in schema.get("properties", {}).items()
            }
            required = set(schema.get("required", ()))
            if fields:
                # Few at a time, as fields may exclude each other.
                optional = st.sets(st.sampled_from(sorted(fields)), max_size=3)
                return optional.flatmap(
                    lambda chosen: st.fixed_dictionaries(
                        {name: fields[name] for name in sorted(required | chosen)}
                    )
                )
            others = schema.get("additionalProperties")
            values = _fitting(others, named) if isinstance(others, dict) else _anything()
            return st.dictionaries(st.text(max_size=8), values, max_size=3)
    return _anything()


@st.composite
def _broken(draw: st.DrawFn, body: Any) -> Any:
    """The body with another value, or none, in a place somewhere in it, or with one more."""
    body = deepcopy(body)
    place = body
    while isinstance(place, dict | list) and place:
        keys: list[Any] = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            change = draw(st.sampled_from(["drop", "replace", "add"]))
            if change == "drop":
                del place[key]
            elif change == "replace":
                place[key] = draw(_anything())
            elif isinstance(place, dict):
                place[draw(st.text(max_size=8))] = draw(_anything())
            else:
                place.append(draw(_anything()))
            break
        place = inner
    return body
