"""What a request may ask for: every limit is a setting, and its refusal an error object."""

import asyncio

import httpx
import pytest

from malora_server.app import create_app
from malora_server.engine.messages import EngineStats
from malora_server.settings import Settings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"model": "tiny", "prompt": "hello"}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
KEY, OTHER = "sk-one", "sk-two"


@pytest.fixture
def client_with(engine, tokenizer):
    """A client of an application with these settings."""

    def client(**settings):
        engine.stats = EngineStats()
        app = create_app(Settings(base="models/tiny", **settings), engine, tokenizer)
        transport = httpx.ASGITransport(app)
        return httpx.AsyncClient(transport=transport, base_url="http://malora")

    return client


@pytest.mark.parametrize(
    ("setting", "limit", "fits", "exceeds", "param", "code"),
    [
        ("max_prompt_tokens", 5, {"prompt": [7] * 5}, {"prompt": [7] * 6}, None, "prompt_too_long"),
        ("max_output_tokens", 5, {"max_tokens": 5}, {"max_tokens": 6}, "max_tokens", None),
        ("max_choices", 4, {"n": 4}, {"n": 5}, "n", "too_many_choices"),
        (
            "max_choices",
            4,
            {"n": 2, "prompt": ["a", "b"]},
            {"n": 2, "prompt": ["a", "b", "c"]},
            "n",
            "too_many_choices",
        ),
        ("max_stops", 2, {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, "stop", "too_many_stops"),
        ("max_stops", 0, {"stop": []}, {"stop": "a"}, "stop", "too_many_stops"),
        (
            "max_stops",
            2,
            {"stop_token_ids": [1, 2]},
            {"stop_token_ids": [1, 2, 3]},
            "stop_token_ids",
            "too_many_stops",
        ),
        ("max_stop_length", 3, {"stop": "abc"}, {"stop": ["a", "abcd"]}, "stop", "stop_too_long"),
        (
            "max_logit_biases",
            2,
            {"logit_bias": {"1": 1, "2": 1}},
            {"logit_bias": {"1": 1, "2": 1, "3": 1}},
            "logit_bias",
            "too_many_logit_biases",
        ),
    ],
)
async def test_a_limit(client_with, engine, setting, limit, fits, exceeds, param, code):
    async with client_with(**{setting: limit}) as client:
        reply = await client.post(COMPLETIONS, json={**HELLO, **fits})
        assert reply.status_code == 200, reply.text
        num_submitted = len(engine.submits)
        reply = await client.post(COMPLETIONS, json={**HELLO, **exceeds})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["param"], error["code"]) == (param, code or "max_tokens_too_large")
        assert str(limit) in error["message"]
        assert len(engine.submits) == num_submitted
    async with client_with() as client:  # without the setting it fits
        assert (await client.post(COMPLETIONS, json={**HELLO, **exceeds})).status_code == 200


async def test_limits_hold_for_conversations_too(client_with, engine):
    async with client_with(max_stops=1, max_output_tokens=7, max_prompt_tokens=64) as client:
        for changes, param in (
            ({"stop": ["a", "b"]}, "stop"),
            ({"max_completion_tokens": 8}, "max_completion_tokens"),
            ({"max_tokens": 8}, "max_tokens"),
        ):
            reply = await client.post(CHAT, json={**TALK, **changes})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        # Left out, the reply's length is what the limit leaves of the context.
        reply = await client.post(CHAT, json=TALK)
        assert reply.json()["usage"]["completion_tokens"] == 7


async def test_the_body_is_limited(client_with):
    async with client_with(max_body_size=100) as client:
        assert (await client.post(COMPLETIONS, json={**HELLO, "user": "x"})).status_code == 200
        reply = await client.post(COMPLETIONS, json={**HELLO, "user": "x" * 100})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        assert "100 bytes" in reply.json()["error"]["message"]


async def test_a_full_queue_tokenises_nothing(client_with, engine, tokenizer, monkeypatch):
    async def encode(text, *, add_special_tokens):
        raise AssertionError("tokenised")

    engine.num_until_blocked = 0
    async with client_with(max_num_seqs=1, max_queued_requests=1) as client:
        first = asyncio.create_task(client.post(COMPLETIONS, json={**HELLO, "n": 2}))
        while len(engine.submits) < 2:
            await asyncio.sleep(0)
        monkeypatch.setattr(tokenizer, "encode", encode)
        for path, body in ((COMPLETIONS, HELLO), (CHAT, TALK)):
            reply = await client.post(path, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
            assert int(reply.headers["retry-after"]) >= 1
        engine.stopping.set()
        await first


async def test_the_queue_is_bounded_in_tokens(client_with, engine):
    engine.num_until_blocked = 0
    async with client_with(max_queued_tokens=10) as client:
        first = asyncio.create_task(client.post(COMPLETIONS, json={**HELLO, "prompt": [5] * 8}))
        while not engine.submits:
            await asyncio.sleep(0)
        reply = await client.post(COMPLETIONS, json={**HELLO, "prompt": [5] * 3})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
        engine.stopping.set()
        await first
        engine.num_until_blocked = None
        reply = await client.post(COMPLETIONS, json={**HELLO, "prompt": [5] * 3})
        assert reply.status_code == 200


async def test_tokens_wait_no_longer_once_their_sequence_has_begun(client_with, engine):
    engine.num_until_blocked = 1
    async with client_with(max_queued_tokens=10) as client:
        begun = asyncio.create_task(client.post(COMPLETIONS, json={**HELLO, "prompt": [5] * 8}))
        while not engine.submits:
            await asyncio.sleep(0)
        for _ in range(100):  # its first token goes from generator to generator
            await asyncio.sleep(0)
        engine.num_until_blocked = None
        reply = await client.post(COMPLETIONS, json={**HELLO, "prompt": [5] * 8})
        assert reply.status_code == 200
        engine.stopping.set()
        await begun


async def test_requests_of_one_key_are_limited(client_with, engine, tmp_path, caplog):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n{OTHER}\n")
    engine.num_until_blocked = 0
    settings = {"api_keys_file": keys, "admin_key": "sk-admin", "max_requests_per_key": 1}
    async with client_with(**settings) as client:

        def post(key):
            headers = {"Authorization": f"Bearer {key}"}
            return client.post(COMPLETIONS, json=HELLO, headers=headers)

        first = asyncio.create_task(post(KEY))
        while not engine.submits:
            await asyncio.sleep(0)
        reply = await post(KEY)
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "too_many_requests_per_key"
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert int(reply.headers["retry-after"]) >= 1
        engine.num_until_blocked = None
        assert (await post(OTHER)).status_code == 200
        assert [(await post("sk-admin")).status_code for _ in range(2)] == [200, 200]
        assert (await client.get("/health")).status_code == 200
        engine.stopping.set()
        await first
        assert (await post(KEY)).status_code == 200
    assert KEY not in caplog.text
