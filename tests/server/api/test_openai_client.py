"""The openai package works against the server unchanged."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

PROMPT = "a fox"
TALK: Any = [{"role": "user", "content": "hello"}]
REPLY = " the quick brown fox jumps över the lazy dog 🦊!"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def async_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def num_reply_tokens(engine: Any) -> int:
    return len(engine.reply)


def test_a_completion(client: openai.OpenAI, engine: Any, num_reply_tokens: int) -> None:
    reply = client.completions.create(
        model="sql", prompt=PROMPT, max_tokens=num_reply_tokens, temperature=0.5, seed=7
    )
    assert (reply.object, reply.model) == ("text_completion", "sql")
    assert reply.system_fingerprint == ("15d1" * 16)[:16]
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.index) == (REPLY, "length", 0)
    (submit,) = engine.submits
    assert (submit.adapter.name, submit.adapter.number) == ("sql", 1)
    assert (submit.sampling.temperature, submit.sampling.seed) == (0.5, 7)
    num_prompt_tokens = len(submit.prompt_token_ids)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == num_prompt_tokens
    assert reply.usage.completion_tokens == num_reply_tokens
    assert reply.usage.total_tokens == num_prompt_tokens + num_reply_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == num_prompt_tokens // 2


def test_a_streamed_completion(client: openai.OpenAI, num_reply_tokens: int) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=num_reply_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == num_reply_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    # A character that several tokens spell comes in one piece, so some tokens have no chunk.
    assert 5 < len(chunks) < num_reply_tokens
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks[:-1])


def test_a_chat(client: openai.OpenAI, engine: Any, tokenizer: Any, num_reply_tokens: int) -> None:
    engine.reply.append(engine.EOS)
    reply = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
            },
        ],
    )
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", REPLY)
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == num_reply_tokens + 1
    (submit,) = engine.submits
    prompt = tokenizer.backend.decode(submit.prompt_token_ids, False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # With no limit given, the reply may fill the context.
    assert submit.sampling.max_tokens == 128 - len(submit.prompt_token_ids)
    # What came back can be sent again.
    again = [*TALK, choice.message, *TALK]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=1).choices


def test_a_streamed_chat(client: openai.OpenAI, num_reply_tokens: int) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=TALK,
            max_completion_tokens=num_reply_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == REPLY
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].object == "chat.completion.chunk"


def test_chat_logprobs(client: openai.OpenAI, tokenizer: Any, engine: Any) -> None:
    num = len(engine.reply)

    def contents(stream: bool) -> list[Any]:
        arguments: Any = {
            "model": "tiny", "messages": TALK, "max_tokens": num, "logprobs": True,
            "top_logprobs": 2, "stream": stream,
        }  # fmt: skip
        reply = client.chat.completions.create(**arguments)
        choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
        return [entry for choice in choices for entry in choice.logprobs.content]

    whole = contents(stream=False)
    assert whole == contents(stream=True)
    assert b"".join(bytes(entry.bytes) for entry in whole).decode() == REPLY
    assert whole[0].token == " the"
    assert all(entry.logprob == -0.125 for entry in whole)
    second = [top.logprob for top in whole[0].top_logprobs]
    assert second == [-2.0, -9999.0]
    other = tokenizer.token_text(engine.reply[0] + 1)
    assert whole[0].top_logprobs[0].token == other


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: openai.OpenAI, stream: bool) -> None:
    arguments: Any = {
        "model": "tiny", "prompt": PROMPT, "max_tokens": 3, "echo": True, "logprobs": 2,
        "stream": stream,
    }  # fmt: skip
    reply = client.completions.create(**arguments)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    text = "".join(choice.text for choice in choices)
    assert text == PROMPT + " the quick brown"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    logprobs = [value for choice in choices for value in choice.logprobs.token_logprobs]
    tops = [top for choice in choices for top in choice.logprobs.top_logprobs]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert "".join(tokens) == text
    assert logprobs == [None] + [-0.125] * (len(tokens) - 1)
    assert tops[0] is None
    for top, token in zip(tops[1:], tokens[1:], strict=True):
        assert len(top) == 3
        assert top[token] == -0.125
    for token, offset in zip(tokens, offsets, strict=True):
        assert text[offset : offset + len(token)] == token


def test_scoring_a_prompt_alone(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
    )
    (choice,) = reply.choices
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == PROMPT
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(client: openai.OpenAI, engine: Any, stream: bool) -> None:
    arguments: Any = {
        "model": "tiny", "prompt": ["one", "two", "three"], "n": 2, "max_tokens": 4, "seed": 5,
        "echo": True, "stream": stream,
    }  # fmt: skip
    reply = client.completions.create(**arguments)
    texts = [""] * 6
    for choice in (c for chunk in reply for c in chunk.choices) if stream else reply.choices:
        texts[choice.index] += choice.text
    end = " the quick brown fox"
    assert texts == [prompt + end for prompt in ("one", "one", "two", "two", "three", "three")]
    assert [submit.sampling.seed for submit in engine.submits] == [5, 6] * 3
    assert len({submit.request_id for submit in engine.submits}) == 6
    if not stream:
        prompts = {tuple(submit.prompt_token_ids) for submit in engine.submits}
        assert reply.usage.prompt_tokens == sum(map(len, prompts))
        assert reply.usage.completion_tokens == 24


def test_prompts_of_token_ids(client: openai.OpenAI, engine: Any) -> None:
    one = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=1)
    many = client.completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=1)
    assert (len(one.choices), len(many.choices)) == (1, 2)
    assert [s.prompt_token_ids for s in engine.submits] == [[5, 6, 7], [5, 6], [7]]


def test_stop_strings(client: openai.OpenAI, engine: Any) -> None:
    for stop, include, text in (
        ("brown", False, " the quick "),
        (["x j", "jumps"], False, " the quick brown fo"),
        ("brown fox", True, " the quick brown fox"),
    ):
        for stream in (False, True):
            arguments: Any = {
                "model": "tiny", "prompt": PROMPT, "max_tokens": 100, "stop": stop,
                "stream": stream, "extra_body": {"include_stop_str_in_output": include},
            }  # fmt: skip
            reply = client.completions.create(**arguments)
            choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
            assert "".join(choice.text for choice in choices) == text
            assert choices[-1].finish_reason == "stop"
            assert choices[-1].stop_reason == ([stop] if isinstance(stop, str) else stop)[0]
    assert len(engine.aborted) == 6


def test_stop_token_ids(client: openai.OpenAI, engine: Any) -> None:
    stop_id = engine.reply[2]
    for include, text in ((False, " the quick"), (True, " the quick brown")):
        reply = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            extra_body={"stop_token_ids": [stop_id], "include_stop_str_in_output": include},
        )
        choice: Any = reply.choices[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (text, "stop", stop_id)
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 3


@pytest.mark.parametrize("wanted", [True, "layers"])
def test_routing(client: openai.OpenAI, wanted: Any) -> None:
    extra = {"include_routing": wanted}
    experts = [{"expert": 2, "gate": 0.75}, {"expert": 0, "gate": 0.25}]
    layers = [
        [{"expert": 2, "gate": 1.0}],
        [{"expert": 0, "gate": 0.5}, {"expert": 2, "gate": 0.5}],
    ]
    expected = [
        {"token": token, "experts": experts, "layers": layers if wanted == "layers" else None}
        for token in (" the", " quick")
    ]
    reply: Any = client.completions.create(
        model="sql", prompt=PROMPT, max_tokens=2, extra_body=extra
    )
    assert reply.choices[0].routing == expected
    chat: Any = client.chat.completions.create(
        model="sql", messages=TALK, max_tokens=2, extra_body=extra, stream=True
    )
    assert [entry for chunk in chat for entry in chunk.choices[0].routing] == expected
    base: Any = client.completions.create(model="tiny", prompt=PROMPT, extra_body=extra)
    assert base.choices[0].routing is None


def test_every_sampling_field_reaches_the_engine(client: openai.OpenAI, engine: Any) -> None:
    client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=9,
        temperature=0,
        top_p=0.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"7": -100, "8": 2.5},  # type: ignore[dict-item]
        logprobs=3,
        user="me",
        extra_body={
            "top_k": 5, "min_p": 0.125, "repetition_penalty": 1.5, "stop_token_ids": [9],
            "ignore_eos": True, "min_tokens": 2, "priority": -3,
            "response_format": {"type": "text"},
        },
    )  # fmt: skip
    (submit,) = engine.submits
    sampling = submit.sampling
    assert submit.priority == -3
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (9, 2, 0)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 5, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, {7: -100, 8: 2.5})
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.logprobs) == ([9], True, 3)
    assert 0 <= sampling.seed < 2**63
    client.completions.create(model="tiny", prompt=PROMPT, extra_body={"top_k": -1})
    assert engine.submits[1].sampling.top_k == 0
    assert engine.submits[1].sampling.max_tokens == 16
    assert engine.submits[1].sampling.seed != sampling.seed


def test_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "sql", "broken"}
    with pytest.raises(openai.BadRequestError):  # found out when it is first used
        client.completions.create(model="broken", prompt=PROMPT)
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "sql"}
    sql: Any = client.models.retrieve("sql")
    assert (sql.parent, sql.root, sql.created, sql.max_model_len) == ("tiny", "sql", 77, 128)
    assert getattr(models["tiny"], "parent", "") is None


def test_errors_become_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="nope", prompt=PROMPT)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt=PROMPT, top_p=2)
    assert (bad.value.param, bad.value.type) == ("top_p", "invalid_request_error")


async def test_many_at_once(async_client: openai.AsyncOpenAI, engine: Any) -> None:
    engine.step_seconds = 0.002

    async def stream(model: str) -> str:
        chunks = await async_client.completions.create(
            model=model, prompt=PROMPT, max_tokens=len(engine.reply), stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    texts = await asyncio.gather(*(stream(model) for model in ["tiny", "sql"] * 4))
    assert texts == [REPLY] * 8
    chat = await async_client.chat.completions.create(model="sql", messages=TALK, max_tokens=1)
    assert chat.choices[0].message.content == " the"


def test_adapters_tokenize_and_version(url: str, tokenizer: Any) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {"model": "broken", "prompt": "the"}
        assert client.post("/v1/completions", json=body).status_code == 400
        adapters = {entry["id"]: entry for entry in client.get("/v1/adapters").json()["data"]}
        assert adapters["sql"]["num_experts"] == 4
        assert adapters["sql"]["target_modules"] == ["q_proj"]
        assert adapters["broken"]["error"] == "adapter_model.safetensors is missing"
        assert client.get("/v1/adapters/sql").json() == adapters["sql"]
        text = "the fox <|im_end|> 🦊"
        body = {"prompt": text, "return_token_strs": True, "model": "sql"}
        tokens = client.post("/tokenize", json=body).json()
        assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
        assert (tokens["tokens"], tokens["max_model_len"]) == (
            tokenizer.backend.encode(text).ids,
            128,
        )
        back = client.post("/detokenize", json={"tokens": tokens["tokens"]})
        assert back.json() == {"prompt": text}
        talk = client.post("/tokenize", json={"messages": TALK}).json()
        assert talk["token_strs"] is None
        assert tokenizer.backend.decode(talk["tokens"], False).startswith("<|im_start|>user")
        for bad in ({}, {"prompt": "a", "messages": TALK}, {"prompt": "a", "model": "nope"}):
            assert client.post("/tokenize", json=bad).status_code in (400, 404)
        assert client.post("/detokenize", json={"tokens": [9999]}).status_code == 400
        assert client.get("/version").json()["version"]
