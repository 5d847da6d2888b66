"""What `malora demo` runs: train three adapters, serve them, ask each of them in one batch."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from malora.base_model import PATH
from malora.config import MaloraConfig
from malora.training import synthetic
from malora.training.evaluation import evaluate
from malora.training.trainer import TrainSettings, train
from malora_client import APIConnectionError, APIStatusError, AsyncClient, Client, Completion

HOST = "127.0.0.1"
BASE_NAME = "malora-base"
TRAIN_EXAMPLES = 2000
VALIDATION_EXAMPLES = 100
START_SECONDS = 120.0
SHOWN_TOKENS = 6

FORMS = {
    "dates": MaloraConfig(r=8, num_experts=4, top_k=2, basis_dim=32),
    "orders": MaloraConfig(r=8, num_experts=8, top_k=2, basis_dim=48),
    "routing": MaloraConfig(r=4, num_experts=6, top_k=3, basis_dim=24),
}
"""Adapters of three different shapes, because one batch holds them all."""


@dataclass(frozen=True)
class Question:
    """One request of the batch; the base model's has no expected answer."""

    model: str
    prompt: str
    expected: str | None


def main(out: Path, once: bool, port: int) -> None:
    """Run the demo in `out`; port 0 picks a free one.

    Leaves the server running until Ctrl-C, or with `once` stops it and exits with 1 unless every
    adapter answered its task. Raises OSError or ValueError where it cannot run.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    # Before the minutes of training, not after them.
    port = _free_port(port)
    adapters = out / "adapters"
    questions = [_train(task, out / "data", adapters, console) for task in FORMS]
    questions.append(Question(BASE_NAME, questions[0].prompt, None))

    console.print("\nStarting the server …")
    with _server(adapters, port, out / "server.log") as process:
        url = f"http://{HOST}:{port}"
        _wait_until_healthy(process, url, out / "server.log")
        answers = asyncio.run(_ask(url, questions))
        right = _show(questions, answers, console)
        if once:
            sys.exit(0 if right else 1)
        console.print(f"\nThe server is running on {url}; Ctrl-C stops it. Try:\n")
        console.print(_curl(url, questions[0]), soft_wrap=True, markup=False, highlight=False)
        try:
            process.wait()
        except KeyboardInterrupt:
            console.print("\nStopping the server …")
            return
        raise OSError(f"the server ended by itself: {_last_line(out / 'server.log')}")


def _train(task: str, data: Path, adapters: Path, console: Console) -> Question:
    """Train and score one adapter; the question is its first held-out example."""
    examples, held_out = synthetic.write(task, data / task, TRAIN_EXAMPLES, VALIDATION_EXAMPLES)
    console.print(f"\n[bold]{task}[/bold]: {TRAIN_EXAMPLES} examples")
    before = evaluate(PATH, None, {task: held_out}, batch_size=50)[task]
    result = train(
        TrainSettings(
            base=PATH,
            data={task: examples},
            eval_data={task: held_out},
            out=adapters / task,
            adapter=FORMS[task],
            max_steps=80,
            batch_size=16,
            learning_rate=3e-3,
            log_every=20,
            overwrite=True,
        )
    )
    console.print(
        f"{task}: exact match {before.exact_match:.0%} before, "
        f"[bold]{result.scores[task].exact_match:.0%}[/bold] after {result.seconds:.0f} s "
        f"of training, {result.trainable_parameters:,} parameters"
    )
    first = json.loads(held_out.read_text(encoding="utf-8").splitlines()[0])
    return Question(task, first["prompt"], first["completion"])


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OSError(
                f"port {port} cannot be had ({error.strerror}): choose another with --port"
            ) from None
        return int(probe.getsockname()[1])


@contextmanager
def _server(adapters: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`malora serve` in a session of its own, so that Ctrl-C reaches it through us alone."""
    command = [sys.executable, "-c", "from malora.cli import app; app()", "serve"]
    command += ["--base", str(PATH), "--served-model-name", BASE_NAME]
    command += ["--adapters", str(adapters), "--host", HOST, "--port", str(port)]
    with log.open("wb") as lines:
        process = subprocess.Popen(
            command, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with Client(base_url=url, max_retries=0, timeout=5) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.health()
            except (APIConnectionError, APIStatusError):
                time.sleep(0.2)
            else:
                return
    if process.poll() is None:
        raise OSError(f"the server was not ready after {START_SECONDS:.0f} s: see {log}")
    raise OSError(f"the server did not start: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"{log} is empty"


async def _ask(url: str, questions: list[Question]) -> list[Completion]:
    """All questions at once: the server answers them in one batch."""
    async with AsyncClient(base_url=url) as client:
        return await asyncio.gather(
            *(
                client.completions.create(
                    model=question.model,
                    prompt=question.prompt,
                    max_tokens=40 if question.expected else 12,
                    temperature=0,
                    include_routing=True,
                )
                for question in questions
            )
        )


def _show(questions: list[Question], answers: list[Completion], console: Console) -> bool:
    """Print the answers, and the experts of their tokens; whether every adapter was right."""
    table = Table(title="One concurrent batch", show_lines=True)
    for column in ("model", "prompt", "answer", "expected", "right"):
        table.add_column(column, overflow="fold")
    experts = Table(title="Experts: mean gate over the layers, the largest two of each token")
    for column in ("model", "token", "first", "second"):
        experts.add_column(column)
    verdicts: list[bool] = []
    for question, answer in zip(questions, answers, strict=True):
        choice = answer.choices[0]
        verdict = "–"
        if question.expected is not None:
            verdicts.append(choice.text.strip() == question.expected.strip())
            verdict = "yes" if verdicts[-1] else "NO"
        cells = (question.model, question.prompt, choice.text, question.expected or "–", verdict)
        table.add_row(*map(escape, cells))
        for token in (choice.routing or [])[:SHOWN_TOKENS]:
            gates = sorted(token.experts, key=lambda gate: -gate.gate)[:2]
            shown = [f"expert {gate.expert}: {gate.gate:.2f}" for gate in gates]
            experts.add_row(question.model, escape(json.dumps(token.token)), *shown)
        experts.add_section()
    console.print(table)
    console.print(experts)
    return all(verdicts)


def _curl(url: str, question: Question) -> str:
    body = {
        "model": question.model,
        "prompt": question.prompt,
        "max_tokens": 40,
        "temperature": 0,
    }
    quoted = json.dumps(body).replace("'", "'\\''")
    return f"curl -s {url}/v1/completions -H 'Content-Type: application/json' -d '{quoted}'"
