"""Grammars: which tokens they allow, and what the engine makes of them in any company."""

import json
import re
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from malora.base_model import PATH as BASE
from malora_server.engine import grammar as grammars
from malora_server.engine.config import EngineConfig
from malora_server.engine.grammar import GrammarError, Grammars, Matcher, forbid
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams

END = 256
"""The tiny models' end of the text; their other tokens are bytes."""
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def backend():
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


@pytest.fixture(scope="module")
def base_grammars(backend):
    return Grammars(backend, backend.get_vocab_size() + 5, [0, 2])


def matcher(made: Grammars, grammar: str) -> Matcher:
    return made.matcher(made.compile(grammar).result(10))


def allowed(made: Grammars, *matchers: Matcher) -> list[set[int]]:
    masks = np.full((len(matchers), made.num_words), -1, dtype=np.int32)
    made.fill(matchers, masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [set(np.nonzero(row)[0].tolist()) for row in bits]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@settings(suppress_health_check=list(HealthCheck))
@given(choices=st.lists(texts, min_size=1, max_size=5), data=st.data())
def test_a_mask_allows_tokens_that_continue_a_choice_and_its_end_where_it_is_whole(
    backend, base_grammars, choices, data
):
    wanted = [choice.encode() for choice in choices]
    pieces = {
        token: bytes(backend_bytes(backend, token)) for token in range(backend.get_vocab_size())
    }
    one = matcher(base_grammars, grammars.from_choice(choices))
    said = b""
    while True:
        [ids] = allowed(base_grammars, one)
        may = {
            token
            for token, piece in pieces.items()
            if piece and any(text.startswith(said + piece) for text in wanted)
        }
        # Where one text alone is left, its usual spelling is the only one.
        assert ids
        assert ids - {0, 2} <= may
        assert ids & {0, 2} == ({0, 2} if said in wanted else set())
        token = data.draw(st.sampled_from(sorted(ids)))
        if one.accept(token):
            break
        said += pieces[token]
    assert one.error is None
    assert said in wanted
    for choice in choices:
        one = matcher(base_grammars, grammars.from_choice(choices))
        for token in backend.encode(choice).ids:
            assert token in allowed(base_grammars, one)[0]
            assert not one.accept(token)
        assert {0, 2} <= allowed(base_grammars, one)[0]


def backend_bytes(backend, token):
    from malora_server.api.tokenizer import Tokenizer as Words

    piece = backend.id_to_token(token)
    if piece.startswith("<|"):  # stands for no text
        return b""
    return bytes(Words._alphabet[character] for character in piece)


def test_rows_are_filled_each_for_itself(base_grammars):
    kinds = [grammars.from_choice(["yes", "no"]), grammars.from_regex("[0-9]{3}")]
    alone = [allowed(base_grammars, matcher(base_grammars, kind))[0] for kind in kinds]
    together = allowed(base_grammars, *(matcher(base_grammars, kind) for kind in kinds * 2))
    assert together == alone * 2


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (grammars.from_regex("a("), "unclosed group"),
        (grammars.from_json_schema({"type": "strng"}), "strng"),
        (grammars.from_json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (grammars.from_json_schema({"$ref": "#"}), "no token"),
        (grammars.from_ebnf("start: nothing"), "nothing"),
        ("not a grammar", "Expected token"),
    ],
)
def test_a_bad_grammar_has_a_reason(base_grammars, grammar, reason):
    with pytest.raises(GrammarError, match=reason) as caught:
        base_grammars.compile(grammar).result(10)
    assert "<" not in str(caught.value)


def test_what_is_no_grammar_at_all_has_a_reason():
    with pytest.raises(GrammarError, match="JSON"):
        grammars.from_json_schema("{")
    with pytest.raises(GrammarError, match="GBNF"):
        grammars.from_ebnf("words without sense")


def test_a_tokenizer_that_fits_no_grammar_has_a_reason(backend):
    with pytest.raises(GrammarError, match="ends a text"):
        Grammars(backend, 4096, [])
    words = Tokenizer(tokenizer_models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(GrammarError, match="tokenizer"):
        Grammars(words, 2, [1])


def test_whitespace_in_json_is_bounded(backend, base_grammars):
    value = {"a": [1, {"b": []}], "c": None}
    usual = [json.dumps(value, indent=indent) for indent in (None, 0, 1, 2, 4, "\t")]
    usual.append(json.dumps(value, separators=(",", ":")))
    for text in (*usual, "[  1]", "[\n\n1]", "[1 \n]", "[\n" + " " * 33 + "1]", " []", "[] "):
        one = matcher(base_grammars, grammars.from_json_schema({}))
        for token in backend.encode(text).ids:
            one.accept(token)
        assert (one.error is None) == (text in usual), text


def test_forbidding_gives_way_where_nothing_else_is_left():
    mask = np.array([0b1010, -(2**31), 0], dtype=np.int32)
    forbid(mask, {1, 63, 500})
    assert mask.tolist() == [0b1000, 0, 0]
    forbid(mask, [3])
    assert mask.tolist() == [0b1000, 0, 0]


@pytest.fixture(scope="module")
def served(tiny_base, make_adapter, tmp_path_factory) -> tuple[Path, Path]:
    base, root = tiny_base("llama"), tmp_path_factory.mktemp("adapters")
    make_adapter(base, root / "hidden", 0, num_experts=4, top_k=2, r=3, basis_dim=8)
    make_adapter(base, root / "lora", 1, lora=True, r=4, target_modules="all-linear")
    return base, root


@pytest.fixture(scope="module")
def llm(served) -> LLM:
    base, root = served
    return LLM(EngineConfig(base=str(base), adapters=str(root), num_threads=1))


def sampling(grammar: str | None, **options: object) -> SamplingParams:
    fields = {"max_tokens": 120, "seed": 5, "temperature": 0.9, "grammar": grammar}
    return SamplingParams(**(fields | options))


def bytes_of(ids: list[int]) -> bytes:
    from malora_server.api.tokenizer import Tokenizer as Words

    alphabet = sorted(Words._alphabet)
    return bytes(Words._alphabet[alphabet[i]] for i in ids if i != END)


GRAMMARS = {
    "json": grammars.from_json_schema(PERSON),
    "regex": grammars.from_regex("[a-f]{2,9}-[0-9]{4}"),
    "choice": grammars.from_choice(["positive", "negative", "null"]),
    "gbnf": grammars.from_ebnf('root ::= "SELECT " col (", " col)*\ncol ::= "id" | "name"'),
    "free": None,
}


def follows(kind: str, text: str) -> bool:
    match kind:
        case "json":
            jsonschema.validate(json.loads(text), PERSON)
            return True
        case "regex":
            return re.fullmatch("[a-f]{2,9}-[0-9]{4}", text) is not None
        case "choice":
            return text in ("positive", "negative", "null")
        case "gbnf":
            return re.fullmatch("SELECT (id|name)(, (id|name))*", text) is not None
    return True


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mixed_batch_follows_its_grammars_and_says_the_same_as_each_alone(
    served, llm, temperature
):
    base, root = served
    kinds = list(GRAMMARS) * 3
    names = [None, "hidden", "lora"] * 5
    prompts = [[7 + i, 60, 3 * i + 1] for i in range(len(kinds))]
    params = [
        sampling(GRAMMARS[kind], temperature=temperature, seed=i, logprobs=1)
        for i, kind in enumerate(kinds)
    ]
    alone = [llm.generate([p], s, n)[0] for p, s, n in zip(prompts, params, names, strict=True)]
    ended = 0
    for kind, generation in zip(kinds, alone, strict=True):
        assert generation.error is None
        if kind != "free" and generation.finish_reason == "stop":
            ended += 1
            assert follows(kind, bytes_of(generation.token_ids).decode())
    assert ended >= 6
    config = EngineConfig(base=str(base), adapters=str(root), num_threads=1)
    few = msgspec.structs.replace(
        config, max_model_len=128, kv_cache_memory=9 * 3 * 2 * 24 * 16 * 4
    )
    engines = {"mixed": LLM(config), "preempted": LLM(few), "pipelined": LLM(config)}
    engines["pipelined"]._core._pipelined = True
    for name, engine in engines.items():
        together = engine.generate(prompts, params, names)
        assert [g.token_ids for g in together] == [g.token_ids for g in alone], name
        assert [g.finish_reason for g in together] == [g.finish_reason for g in alone], name
        assert engine.stats().kv_cache_usage_ratio == 0
    assert engines["preempted"].stats().preemptions > 0


def test_logprobs_are_of_the_models_own_distribution(llm):
    params = sampling(GRAMMARS["choice"], logprobs=5, temperature=0.0)
    [constrained] = llm.generate([[1, 2, 3]], params)
    text = constrained.token_ids
    free = msgspec.structs.replace(params, grammar=None, prompt_logprobs=5, max_tokens=1)
    [scored] = llm.generate([[1, 2, 3, *text]], free)
    assert bytes_of(text) in (b"positive", b"negative", b"null")
    for ours, model in zip(constrained.logprobs, scored.prompt_logprobs[2:], strict=True):
        assert ours.logprob == pytest.approx(model.logprob, abs=1e-4)
        assert ours.top_token_ids == model.top_token_ids
    assert any(entry.token_id not in entry.top_token_ids for entry in constrained.logprobs)


def test_lengths_and_stops_beside_a_grammar(llm):
    def say(grammar: str, **options: object):
        [generation] = llm.generate([[9, 9]], sampling(grammar, **options))
        assert generation.error is None
        return bytes_of(generation.token_ids).decode(), generation

    digits = grammars.from_regex("[0-9]+")
    text, cut = say(digits, max_tokens=7, ignore_eos=True)
    assert (len(text), cut.finish_reason) == (7, "length")
    text, long = say(digits, min_tokens=40, max_tokens=200, logit_bias={END: 40.0})
    assert (len(text), long.finish_reason) == (40, "stop")
    text, short = say(digits, logit_bias={END: 40.0})
    assert (len(text), short.finish_reason) == (1, "stop")
    # A grammar that is complete ends, whatever else was asked for.
    for options in ({"ignore_eos": True}, {"min_tokens": 100}):
        text, whole = say(grammars.from_regex("[0-9]{5}"), **options)
        assert (len(text), whole.finish_reason) == (5, "stop")
    stop = sorted(chr(i) for i in range(33, 127)).index("7")
    text, stopped = say(digits, stop_token_ids=[stop], logit_bias={stop: 100.0}, min_tokens=3)
    assert stopped.finish_reason == "stop"
    assert text.index("7") == len(text) - 1 >= 3
    # A bias may choose among what the grammar allows, nothing else.
    nine = sorted(chr(i) for i in range(33, 127)).index("9")
    text, _ = say(grammars.from_regex("[0-9]{5}"), logit_bias={nine: 50.0, END: 100.0, 70: 100.0})
    assert text == "99999"


def test_choices_draw_each_their_own(llm):
    params = [sampling(GRAMMARS["regex"], seed=seed, temperature=1.5) for seed in range(4)]
    texts = {bytes_of(g.token_ids) for g in llm.generate([[4, 4]] * 4, params)}
    assert len(texts) > 1


def test_a_bad_grammar_harms_nobody(llm):
    good = sampling(GRAMMARS["choice"])
    want = llm.generate([[1], [2]], [good, sampling(None)])
    got = llm.generate(
        [[1], [2], [3], [4]],
        [good, sampling(None), sampling(grammars.from_regex("(")), sampling("{}")],
    )
    assert [g.token_ids for g in got[:2]] == [g.token_ids for g in want]
    assert [g.finish_reason for g in got[2:]] == ["error"] * 2
    assert "unclosed group" in got[2].error


def test_a_text_that_cannot_go_on_ends_with_an_error_and_harms_nobody(llm):
    # Each of the 40 letters may begin 2^40 trees: too much to keep track of.
    rules = "\n".join(f"x{i}: x{i + 1} x{i + 1}" for i in range(40))
    dead = grammars.from_ebnf(f'start: "ab" x0\n{rules}\nx40: "a"')
    want = llm.generate([[1], [2]], [sampling(GRAMMARS["choice"]), sampling(None)])
    params = [sampling(GRAMMARS["choice"]), sampling(None), sampling(dead)]
    *rest, ended = llm.generate([[1], [2], [3]], params)
    assert [g.token_ids for g in rest] == [g.token_ids for g in want]
    assert ended.finish_reason == "error"
    assert "grammar" in ended.error
    assert llm.stats().kv_cache_usage_ratio == 0


def test_a_sequence_that_waits_for_its_grammar_can_be_aborted(llm):
    from malora_server.engine.messages import Submit

    core = llm._core
    params = sampling(grammars.from_regex("never seen before [a-z]{3}"))
    for index in range(2):
        submit = Submit(request_id=f"r{index}", prompt_token_ids=[1, 2], sampling=params)
        assert core.add(submit) is None
    again = Submit(request_id="r0", prompt_token_ids=[1], sampling=params)
    failure = core.add(again)
    assert failure is not None
    assert "in use" in failure.error
    assert core.stats().num_requests_waiting == 2
    core.abort(["r0"])
    ended = []
    while core.has_work:
        ended += [o.request_id for o in core.step().outputs if o.finish_reason]
    assert ended == ["r1"]


schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -20, "maximum": 300},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": 5},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"enum": ["red", "green", 3, None]},
            {"const": "ü\n"},
        ]
    ),
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        st.dictionaries(st.sampled_from(["a", "b", 'c"d', "é"]), inner, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:2],
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    batch=st.lists(schemas, min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_every_finished_reply_parses_and_fits_its_schema(llm, batch, seed, temperature):
    params = [
        sampling(
            grammars.from_json_schema(schema),
            seed=seed + i,
            temperature=temperature,
            max_tokens=150,
        )
        for i, schema in enumerate(batch)
    ]
    names = ["hidden", None, "lora", None, "hidden"][: len(batch)]
    generations = llm.generate([[5, 1 + i] for i in range(len(batch))], params, names)
    for schema, generation in zip(batch, generations, strict=True):
        assert generation.error is None
        if generation.finish_reason == "stop":
            value = json.loads(bytes_of(generation.token_ids))
            jsonschema.validate(value, schema)
