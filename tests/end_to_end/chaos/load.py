"""Clients of every kind, each of whose requests must be answered, and rightly where it succeeds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

COMPLETIONS = "/v1/completions"
MAX_TOKENS = 16
ANSWER_SECONDS = 90
"""In which every request has its answer, whatever becomes of the engine meanwhile."""
PASSING = {429: {"queue_full"}, 503: {"engine_dead", "adapter_load_failed"}}
"""Errors that a well-formed request may get at any time."""
UNSTEADY = {
    400: {"adapter_file_invalid", "adapter_file_missing", "adapter_config_invalid"},
    404: {"model_not_found", "adapter_not_found"},
    503: {"adapter_changed"},
}
"""Further ones that it may get of an adapter that is tampered with."""


class Expected:
    """What the models say to the prompts, decoded greedily: by fingerprint, so by content."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
        self.models: list[str] = []
        """The names that can be asked for."""
        self.unsteady: set[str] = set()
        """Names of adapters that are tampered with."""
        self.texts: dict[tuple[str, str], str] = {}
        """By fingerprint and prompt."""
        self.fingerprints: dict[str, set[str]] = {}
        """By name: the contents that it may have."""


class Load:
    """Workers that send one request after another until told to stop."""

    def __init__(self, url: str, expected: Expected, seed: int) -> None:
        self.url = url
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.slowest = 0.0
        self._expected = expected
        self._seed = seed
        self._stopping = asyncio.Event()

    async def run(self, num_workers: int) -> None:
        """Send requests until `stop`."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as http:
            await asyncio.gather(*(self._worker(http, number) for number in range(num_workers)))

    def stop(self) -> None:
        """Let every worker finish its request."""
        self._stopping.set()

    async def _worker(self, http: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self._seed}-{number}")
        kinds: list[Callable[[httpx.AsyncClient, random.Random], Awaitable[str]]] = [
            self._whole,
            self._whole,
            self._streamed,
            self._streamed,
            self._several,
            self._with_logprobs,
            self._follows_a_grammar,
            self._leaves_a_stream,
            self._leaves_a_reply,
            self._bad,
            self._reads_nothing,
            self._half_body,
            self._looks_around,
        ]
        while not self._stopping.is_set():
            kind = rng.choice(kinds)
            name = kind.__name__.strip("_")
            started = time.monotonic()
            outcome = ""
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    outcome = await kind(http, rng)
            except TimeoutError:
                self.problems.append(f"{name}: no answer within {ANSWER_SECONDS} s")
            except Exception as error:
                self.problems.append(f"{name}: {error!r}")
            else:
                self.outcomes[f"{name}: {outcome}"] += 1
            self.slowest = max(self.slowest, time.monotonic() - started)
            if "engine_dead" in outcome:
                await asyncio.sleep(rng.uniform(0, 1))

    def _body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        return {
            "model": rng.choice(self._expected.models),
            "prompt": rng.choice(self._expected.prompts),
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            **fields,
        }

    def check(self, body: dict[str, Any], fingerprint: str, text: str) -> str:
        """The text is what this content of the model says."""
        model = body["model"]
        assert fingerprint in self._expected.fingerprints[model], f"{model} is {fingerprint}"
        want = self._expected.texts[fingerprint, body["prompt"]]
        assert text == want, f"{model} said {text!r} instead of {want!r}"
        return "right"

    def _refused(self, body: dict[str, Any], status: int, content: str) -> str:
        assert content.startswith("{"), f"{status} with {content!r}"
        error = json.loads(content)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        code: str = error["code"]
        allowed = PASSING.get(status, set())
        if body["model"] in self._expected.unsteady:
            allowed = allowed | UNSTEADY.get(status, set())
        assert code in allowed, f"{body['model']}: {status}: {error}"
        return code

    async def _whole(self, http: httpx.AsyncClient, rng: random.Random, **fields: Any) -> str:
        body = self._body(rng, **fields)
        reply = await http.post(COMPLETIONS, json=body)
        if reply.status_code != 200:
            return self._refused(body, reply.status_code, reply.text)
        document = reply.json()
        choices = document["choices"]
        assert len(choices) == body.get("n", 1)
        for choice in choices:
            assert choice["finish_reason"] == "length"
            self.check(body, document["system_fingerprint"], choice["text"])
            if "logprobs" in body:
                assert len(choice["logprobs"]["token_logprobs"]) == MAX_TOKENS
        return "right"

    async def ask(self, http: httpx.AsyncClient, model: str, rng: random.Random) -> None:
        """One request of a model, like those of the workers."""
        outcome = await self._whole(http, rng, model=model)
        self.outcomes[f"{model.partition('-')[0]}: {outcome}"] += 1

    async def _several(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        return await self._whole(http, rng, n=3)

    async def _with_logprobs(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        return await self._whole(http, rng, logprobs=2)

    async def _follows_a_grammar(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        choices = ["yes", "no", "not today"]
        body = self._body(rng, structured_outputs={"choice": choices}, ignore_eos=False)
        reply = await http.post(COMPLETIONS, json=body)
        if reply.status_code != 200:
            return self._refused(body, reply.status_code, reply.text)
        assert reply.json()["choices"][0]["text"] in choices
        return "right"

    async def _streamed(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        body = self._body(rng, stream=True)
        async with http.stream("POST", COMPLETIONS, json=body) as reply:
            if reply.status_code != 200:
                return self._refused(body, reply.status_code, (await reply.aread()).decode())
            content = (await reply.aread()).decode()
        return self._check_stream(body, content)

    def _check_stream(self, body: dict[str, Any], content: str) -> str:
        assert content.endswith("data: [DONE]\n\n"), f"a stream ended with {content[-200:]!r}"
        *payloads, _done, _ = content.split("\n\n")
        assert all(payload.startswith("data: {") for payload in payloads), content
        events = [json.loads(payload.removeprefix("data: ")) for payload in payloads]
        if "error" in events[-1]:
            return self._refused(body, 503, json.dumps(events[-1])) + " in its stream"
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        (fingerprint,) = {event["system_fingerprint"] for event in events}
        text = "".join(event["choices"][0]["text"] for event in events)
        return self.check(body, fingerprint, text)

    async def _leaves_a_stream(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        body = self._body(rng, stream=True, max_tokens=600)
        async with http.stream("POST", COMPLETIONS, json=body) as reply:
            if reply.status_code != 200:
                return self._refused(body, reply.status_code, (await reply.aread()).decode())
            num_lines = rng.randrange(1, 9)
            async for _ in reply.aiter_lines():
                num_lines -= 1
                if not num_lines:
                    break
        return "left"

    async def _leaves_a_reply(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        body = self._body(rng, max_tokens=600, n=2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.01, 0.3)):
                reply = await http.post(COMPLETIONS, json=body)
                return self._refused(body, reply.status_code, reply.text)
        return "left"

    async def _bad(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        path, content, status, code = rng.choice(
            [
                (COMPLETIONS, b'{"model": ', 400, "invalid_json"),
                (COMPLETIONS, self._json(rng, model="absent"), 404, "model_not_found"),
                (COMPLETIONS, self._json(rng, max_tokens=-1), 400, "invalid_value"),
                (COMPLETIONS, self._json(rng, colour="red"), 400, "unknown_parameter"),
                (COMPLETIONS, self._json(rng, prompt=[10**9]), 400, "invalid_value"),
                ("/v1/nothing", b"{}", 404, "not_found"),
            ]
        )
        headers = {"Content-Type": "application/json"}
        reply = await http.post(path, content=content, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text
        return code

    def _json(self, rng: random.Random, **fields: Any) -> bytes:
        return json.dumps({**self._body(rng), "model": "base", **fields}).encode()

    async def _looks_around(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        path = rng.choice(["/health", "/metrics", "/v1/models", "/v1/adapters", "/version"])
        reply = await http.get(path)
        if path == "/health" and reply.status_code == 503:
            assert reply.json()["error"]["code"] == "engine_dead"
            return "engine_dead"
        assert reply.status_code == 200, reply.text
        return "seen"

    async def _reads_nothing(self, _http: httpx.AsyncClient, rng: random.Random) -> str:
        """For a while: then it leaves, or reads all of what it should have got."""
        body = self._body(rng, stream=True)
        content = json.dumps(body)
        async with self._connected(f"Content-Length: {len(content)}\r\n\r\n{content}") as reader:
            await asyncio.sleep(rng.uniform(0.1, 2))
            if rng.random() < 0.5:
                return "left"
            text = (await reader.read()).decode()
        head, _, content = text.partition("\r\n\r\n")
        status = int(head.split()[1])
        if status != 200:
            return self._refused(body, status, content)
        return self._check_stream(body, _dechunked(content))

    async def _half_body(self, _http: httpx.AsyncClient, rng: random.Random) -> str:
        content = self._json(rng).decode()
        half = content[: rng.randrange(len(content))]
        async with self._connected(f"Content-Length: {len(content)}\r\n\r\n{half}") as reader:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0.1, 2)):
                    assert not await reader.read(1), "an answer to half a request"
        return "left"

    @contextlib.asynccontextmanager
    async def _connected(self, rest: str) -> Any:
        address = urlsplit(self.url)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=2048)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        try:
            writer.write(f"{head}Content-Type: application/json\r\n{rest}".encode())
            yield reader
        finally:
            writer.close()


def _dechunked(content: str) -> str:
    """The body of a reply in HTTP's chunks, which must be complete."""
    parts = []
    while True:
        size, _, content = content.partition("\r\n")
        length = int(size, 16)
        if not length:
            return b"".join(parts).decode()
        raw = content.encode()
        parts.append(raw[:length])
        content = raw[length + 2 :].decode()
