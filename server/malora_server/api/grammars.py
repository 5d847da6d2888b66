"""What a request says of its reply's form: response_format, structured_outputs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend

from malora_server.api.errors import ApiError
from malora_server.api.protocol import GenerationRequest

MAX_GRAMMAR_LENGTH = 2**17
"""Characters of a schema's JSON text, a regular expression or a grammar."""
_CHECK_SECONDS = 3.0
_START_SECONDS = 60.0
_MAX_CACHED = 256
_LONGEST_LINE = 16 * MAX_GRAMMAR_LENGTH
_ANY_OBJECT = '{"type": "object"}'


class GrammarChecker:
    """Compiles grammars in a process of its own, which it starts when the first one comes."""

    def __init__(self, backend: Backend, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._backend = backend
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._worker: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._answers: OrderedDict[tuple[str, str], dict[str, str]] = OrderedDict()

    async def check(self, kind: str, value: str, param: str) -> str:
        """The engine's grammar; ApiError 400 `invalid_grammar`, which says why, for a bad one.

        kind: "json", "regex", "choice", "ebnf" or "calls", as `grammar_worker.check` takes it.
        """
        if len(value) > MAX_GRAMMAR_LENGTH:
            raise _invalid(
                f"it has {len(value)} characters; at most {MAX_GRAMMAR_LENGTH} are taken", param
            )
        answer = self._answers.get((kind, value))
        if answer is None:
            async with self._one_at_a_time:
                answer = self._answers.get((kind, value)) or await self._ask(kind, value)
            self._answers[kind, value] = answer
            if len(self._answers) > _MAX_CACHED:
                self._answers.popitem(last=False)
        self._answers.move_to_end((kind, value))
        if "error" in answer:
            raise _invalid(answer["error"], param)
        return answer["grammar"]

    async def close(self) -> None:
        """End the process."""
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()

    async def _ask(self, kind: str, value: str) -> dict[str, str]:
        # A worker whose memory others' grammars have used up is no judge: a fresh one decides.
        for fresh in (self._worker is None, True):
            if self._worker is None:
                refusal = await self._start()
                if refusal is not None:
                    return {"error": refusal}
            try:
                answer = await self._exchange({"kind": kind, "value": value}, _CHECK_SECONDS)
            except TimeoutError:
                return {"error": f"it takes more than {_CHECK_SECONDS:g} seconds to compile"}
            if answer is not None:
                return answer
            if fresh:
                break
        return {"error": "it takes too much memory to compile"}

    async def _start(self) -> str | None:
        """Start the process; returns why it can't check anything, where that is so."""
        self._worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "malora_server.api.grammar_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LONGEST_LINE,
            # The terminal's Ctrl-C is for the API process to act on.
            start_new_session=True,
        )
        first = {
            "tokenizer": self._backend.to_str(),
            "vocab_size": self._vocab_size,
            "eos_token_ids": self._eos_token_ids,
        }
        answer = await self._exchange(first, _START_SECONDS)
        if answer is None:
            raise RuntimeError("the process that checks grammars does not start")
        if "error" in answer:
            await self.close()
        return answer.get("error")

    async def _exchange(self, request: dict[str, object], seconds: float) -> dict[str, str] | None:
        """The worker's answer; None where it died. What ends otherwise ends the worker with it."""
        worker = self._worker
        assert worker is not None
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                worker.stdin.write(json.dumps(request).encode() + b"\n")
                await worker.stdin.drain()
                line = await worker.stdout.readline()
        except ConnectionError:
            line = b""
        except BaseException:  # too late, or the client has left: its answer is nobody's
            await self.close()
            raise
        if not line:
            await self.close()
            return None
        answer: dict[str, str] = json.loads(line)
        return answer


async def grammar_of(checker: GrammarChecker, body: GenerationRequest) -> str | None:
    """The engine's grammar for a request's reply; None for free text. ApiError for a bad one."""
    wanted = body.structured_outputs
    if wanted is not None:
        if wanted.json_schema is not None:
            schema = wanted.json_schema
            text = schema if isinstance(schema, str) else json.dumps(schema)
            return await checker.check("json", text, "structured_outputs.json")
        if wanted.regex is not None:
            return await checker.check("regex", wanted.regex, "structured_outputs.regex")
        if wanted.choice is not None:
            text = json.dumps(wanted.choice)
            return await checker.check("choice", text, "structured_outputs.choice")
        if wanted.grammar is not None:
            return await checker.check("ebnf", wanted.grammar, "structured_outputs.grammar")
        return await checker.check("json", _ANY_OBJECT, "structured_outputs.json_object")
    format = body.response_format
    if format is None or format.type == "text":
        return None
    if format.json_schema is None:
        return await checker.check("json", _ANY_OBJECT, "response_format")
    text = json.dumps(format.json_schema.json_schema)
    return await checker.check("json", text, "response_format.json_schema.schema")


def _invalid(reason: str, param: str) -> ApiError:
    message = f"{param} can't be followed: {reason.rstrip('.')}."
    return ApiError(400, message, code="invalid_grammar", param=param)
