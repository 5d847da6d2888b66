"""Folders as an attacker would make them: each loads or is refused, and none takes memory."""

import json
import resource
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from malora import MaloraConfig
from malora.format import AdapterFormatError, BaseModelSpec, load_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SPARE_BYTES = 256 * 2**20
"""What loading may take beyond what the process has; the folders hold less than 100 kB."""


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


@pytest.fixture(scope="module")
def spec() -> BaseModelSpec:
    return BaseModelSpec.from_model(llama())


@pytest.fixture(scope="module", params=["malora", "lora"])
def good(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of a good adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    config = {
        "malora": lambda: MaloraConfig(r=2, num_experts=3, top_k=2, basis_dim=4),
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    }[request.param]()
    peft.get_peft_model(llama(), config).save_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    document = json.loads(files[CONFIG])
    document.pop("base_model_fingerprint", None)
    return {**files, CONFIG: json.dumps(document).encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process take no more than `SPARE_BYTES`; what asks for more fails."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def load(folder: Path, spec: BaseModelSpec, files: dict[str, bytes]) -> str | None:
    """The code with which the files are refused, or None."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refusal = None
    for base in (None, spec):
        try:
            with little_memory():
                load_adapter(folder, base)
        except AdapterFormatError as error:
            refusal = error
    if refusal is None:
        return None
    assert refusal.code.startswith("adapter_")
    assert str(folder.parent) not in str(refusal)
    return refusal.code


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: str, data: bytes, length: int | None = None) -> bytes:
    content = header.encode("utf-8", "surrogatepass")
    size = len(content) if length is None else length
    return (size % 2**64).to_bytes(8, "little") + content + data


numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from(
        [2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, -(2**63)]
    ),
    st.floats(),
)
texts = st.one_of(
    st.text(max_size=12),
    st.text(string.printable, max_size=12),
    st.sampled_from(["MALORA", "LORA", "(", "[", "*", "\ud800", "\0", "q_proj", "hidden", "block"]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
)
dtypes = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "f32", "F4", ""])
shapes = st.lists(numbers, max_size=6)
offsets = st.lists(numbers, min_size=2, max_size=2)
noise = st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), max_size=4)


def damaged(content: bytes, holes: list[tuple[int, bytes]]) -> bytes:
    for at, new in holes:
        start = at % (len(content) + 1)
        content = content[:start] + new + content[start + len(new) :]
    return content


def test_the_good_ones_load(good, folder, spec):
    assert load(folder, spec, good) is None


@FUZZ
@given(config=st.binary(max_size=300), weights=st.binary(max_size=300))
def test_random_bytes(good, folder, spec, config, weights):
    assert load(folder, spec, {CONFIG: config, WEIGHTS: good[WEIGHTS]}) is not None
    assert load(folder, spec, {CONFIG: good[CONFIG], WEIGHTS: weights}) is not None


@FUZZ
@given(config=noise, weights=noise, cut=st.integers(0, 10**6))
def test_damaged_files(good, folder, spec, config, weights, cut):
    content = damaged(good[WEIGHTS], weights)
    load(folder, spec, {CONFIG: damaged(good[CONFIG], config), WEIGHTS: content})
    short = content[: cut % len(content)]
    assert load(folder, spec, {CONFIG: good[CONFIG], WEIGHTS: short}) is not None


STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf")),
    *("", "x", "(", "[", "*", "\ud800", "\0", [], [1], ["("], [[1]], [None], ["q_proj", 1]),
    *({}, {"a": 1}, {"(": 1}, {"": 2}),
    *({"q_proj": value} for value in (0, -1, 10**400, 1e308, "x", None, [1])),
]


def test_every_field_with_every_strange_value(good, folder, spec):
    document = json.loads(good[CONFIG])
    (folder / WEIGHTS).write_bytes(good[WEIGHTS])
    for name in (*document, "layers_pattern", "bias"):
        for value in STRANGE:
            (folder / CONFIG).write_text(json.dumps({**document, name: value}))
            with suppress(AdapterFormatError):
                load_adapter(folder, spec)


@FUZZ
@given(data=st.data())
def test_configurations_with_strange_fields(good, folder, spec, data):
    document = json.loads(good[CONFIG])
    names = st.sampled_from(sorted(document)) | texts
    changes = data.draw(st.dictionaries(names, values, min_size=1, max_size=4))
    dropped = data.draw(st.sets(st.sampled_from(sorted(document)), max_size=2))
    document = {key: value for key, value in {**document, **changes}.items() if key not in dropped}
    text = json.dumps(document).encode()
    load(folder, spec, {CONFIG: text, WEIGHTS: good[WEIGHTS]})


@FUZZ
@given(data=st.data())
def test_headers_that_lie(good, folder, spec, data):
    header, tensors = split(good[WEIGHTS])
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    names = sorted(entries)
    for _ in range(data.draw(st.integers(1, 4))):
        entry = entries[data.draw(st.sampled_from(names))]
        name = data.draw(st.sampled_from(names) | texts)
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "drop", "any", "all"]))
        if field == "drop":
            header.pop(name, None)
            continue
        if field == "all":
            header[name] = data.draw(values)
            continue
        kind = {"dtype": dtypes, "shape": shapes, "data_offsets": offsets}.get(field, values)
        header[name] = {**entry, field: data.draw(kind | values)}
    length = data.draw(st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 3000))
    tail = data.draw(st.sampled_from([tensors, tensors[:-1], tensors + b"\0" * 8, b""]))
    content = joined(json.dumps(header), tail, length)
    load(folder, spec, {CONFIG: good[CONFIG], WEIGHTS: content})


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)})


def header(*entries: str, name: str = "a") -> str:
    """Of tensors a, a, …, or the name with its number in its braces."""
    named = (f'"{name.format(i)}": {entry}' for i, entry in enumerate(entries))
    return f"{{{', '.join(named)}}}"


HEADERS = {
    "a huge product": joined(header(entry(shape=(2**32, 2**32))), b"\0" * 4),
    "an overflowing product": joined(header(entry(shape=(2**63, 2), offsets=(0, 0))), b""),
    "a huge tensor without bytes": joined(header(entry(shape=(0, 2**62), offsets=(0, 0))), b""),
    "an empty tensor with sides beyond counting": joined(
        header(entry(shape=(0, 2**63), offsets=(0, 0))), b""
    ),
    "many dimensions": joined(header(entry(shape=(1,) * 5000)), b"\0" * 4),
    "overlapping offsets": joined(header(entry(), entry(offsets=(2, 6)), name="a{}"), b"\0" * 6),
    "offsets backwards": joined(header(entry(offsets=(4, 0))), b"\0" * 4),
    "a hole": joined(header(entry(offsets=(4, 8))), b"\0" * 8),
    "bytes of nobody": joined(header(entry()), b"\0" * 64),
    "a name twice": joined(header(entry(), entry()), b"\0" * 4),
    "deep JSON": joined('{"a":' * 50_000, b""),
    "deep metadata": joined('{"__metadata__": {"a": ' + "[" * 50_000 + "}}", b""),
    "a header as long as the file": joined("{" + " " * 100_000, b""),
    "a header longer than memory": joined("{}", b"", 2**63),
    "a header over the limit": joined("{" + " " * 2**22 + "}", b""),
    "a name of half a surrogate": joined(header(entry(), name="\\ud800"), b"\0" * 4),
    "a name with a path": joined(header(entry(), name="../../a"), b"\0" * 4),
    "NaN": joined('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b""),
    "many tensors": joined(header(*[entry(shape=(0,), offsets=(0, 0))] * 20_000, name="t{}"), b""),
    "no tensor": joined("{}", b""),
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be(good, folder, spec, name):
    assert load(folder, spec, {CONFIG: good[CONFIG], WEIGHTS: HEADERS[name]}) is not None


CONFIGS = {
    "deep": b'{"peft_type": "LORA", "a": ' + b"[" * 100_000,
    "deep and closed": b'{"peft_type": "LORA", "a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a long number": b'{"peft_type": "LORA", "r": ' + b"9" * 100_000 + b"}",
    "a name twice": b'{"peft_type": "LORA", "peft_type": "MALORA", "r": 1, "r": []}',
    "UTF-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "a mark first": b'\xef\xbb\xbf{"peft_type": "LORA"}',
    "a list": b'["peft_type"]',
    "too much": b'{"peft_type": "LORA", "a": "' + b"a" * 2**20 + b'"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_cannot_be(good, folder, spec, name):
    assert load(folder, spec, {CONFIG: CONFIGS[name], WEIGHTS: good[WEIGHTS]}) is not None
