"""Real tasks from training to HTTP: adapters trained, served together and scored as served.

Reads {"prompt", "completion"} JSONL from MALORA_TEST_DATA/TASK/{train,validation}.jsonl, and skips
without it. MALORA_TEST_WHOLE=1 takes all tasks and all examples (`make test-data`).
"""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from malora_client import AsyncClient

DATA = Path(os.environ.get("MALORA_TEST_DATA", "../shared/data/tasks")).resolve()
WHOLE = os.environ.get("MALORA_TEST_WHOLE") == "1"
CONCURRENCY = 32


@dataclass(frozen=True)
class Task:
    """How much of a task to learn, and what counts as learnt."""

    name: str
    labels: int | None = None
    """The subset keeps the examples of this many completions, the first in the alphabet."""
    examples: int | None = None
    validation: int = 64
    options: tuple[str, ...] = ()
    exact_match: float = 0.0
    token_accuracy: float = 0.0


COMMON = ("--batch-size", "32", "--learning-rate", "3e-3", "--experts", "4", "--basis-dim", "32")
SUBSET = [
    Task("clinc150", labels=6, options=(*COMMON, "--epochs", "2"), exact_match=0.6),
    Task("banking77", labels=5, options=(*COMMON, "--epochs", "2"), exact_match=0.6),
]
ALL = [
    Task("clinc150", validation=3000, options=(*COMMON, "--epochs", "1"), exact_match=0.6),
    Task("banking77", validation=1000, options=(*COMMON, "--epochs", "2"), exact_match=0.6),
    Task("ag_news", validation=1000, options=(*COMMON, "--epochs", "1"), exact_match=0.5),
    Task("text2sql", validation=539, options=(*COMMON, "--epochs", "1"), token_accuracy=0.8),
    Task("e2e_nlg", validation=863, options=(*COMMON, "--epochs", "1"), token_accuracy=0.5),
]
TASKS = ALL if WHOLE else SUBSET

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no task data: {DATA} does not exist"),
    pytest.mark.timeout(7200 if WHOLE else 600),
]


def malora(*arguments: object) -> str:
    """Run the command; its standard output."""
    command = [sys.executable, "-m", "malora.cli", *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 0, run.stdout
    return run.stdout


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(task: Task, folder: Path) -> tuple[Path, Path]:
    """The task's training and validation files, cut to its subset."""
    train, validation = (read(DATA / task.name / f"{x}.jsonl") for x in ("train", "validation"))
    if task.labels is not None:
        kept = sorted({record["completion"] for record in train})[: task.labels]
        train, validation = (
            [record for record in records if record["completion"] in kept]
            for records in (train, validation)
        )
    train = train[: task.examples]
    return (
        write(folder / f"{task.name}-train.jsonl", train),
        write(folder / f"{task.name}-validation.jsonl", validation[: task.validation]),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the adapters, task -> validation file, task -> what `malora evaluate` says)."""
    folder = tmp_path_factory.mktemp("tasks")
    files, scores = {}, {}
    for task in TASKS:
        train, files[task.name] = prepare(task, folder)
        out = folder / "adapters" / task.name
        malora("train", "--data", f"{task.name}={train}", "--out", out, *task.options)
        data = f"{task.name}={files[task.name]}"
        flags = ("--compare-base", "--precision", "float32", "--json")
        report = malora("evaluate", "--adapter", out, "--data", data, *flags)
        scores[task.name] = json.loads(report)[task.name]
    return folder / "adapters", files, scores


async def score_over_http(url, model, records, max_new_tokens, gate):
    """(exact match, token accuracy) of a model on the records, asked over HTTP."""
    async with AsyncClient(base_url=url) as client:

        async def exact(record):
            async with gate:
                reply = await client.completions.create(
                    model=model, prompt=record["prompt"], max_tokens=max_new_tokens, temperature=0
                )
            return reply.choices[0].text.strip() == record["completion"].strip()

        async def tokens(record):
            # As in training: the completion's own tokens, then the end of the text.
            prompt = (await client.tokenize(prompt=record["prompt"])).tokens
            completion = await client.tokenize(
                prompt=record["completion"], add_special_tokens=False
            )
            ids = [*prompt, *completion.tokens, end]
            async with gate:
                reply = await client.completions.create(
                    model=model, prompt=ids, max_tokens=0, echo=True, logprobs=1
                )
            logprobs = reply.choices[0].logprobs
            pairs = zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
            hits = [best is not None and own >= max(best.values()) for own, best in pairs]
            return sum(hits[len(prompt) :]), len(ids) - len(prompt)

        end = (await client.tokenize(prompt="<|endoftext|>")).tokens[-1]
        matched = await asyncio.gather(*map(exact, records))
        counted = await asyncio.gather(*map(tokens, records))
    return sum(matched) / len(records), sum(h for h, _ in counted) / sum(n for _, n in counted)


async def test_each_adapter_learns_its_task_and_is_served_as_it_was_evaluated(trained, serve):
    adapters, files, scores = trained
    with serve("--adapters", adapters, "--dtype", "float32") as url:
        gate = asyncio.Semaphore(CONCURRENCY)
        served = await asyncio.gather(  # all tasks' requests mixed in one continuous batch
            *(
                score_over_http(
                    url,
                    task.name,
                    read(files[task.name]),
                    scores[task.name]["max_new_tokens"],
                    gate,
                )
                for task in TASKS
            )
        )
    for task, (exact_match, token_accuracy) in zip(TASKS, served, strict=True):
        score = scores[task.name]
        base = score["base"]
        print(
            f"{task.name}: exact match {exact_match:.3f} served, {score['exact_match']:.3f} "
            f"evaluated, {base['exact_match']:.3f} base; token accuracy {token_accuracy:.3f} "
            f"served, {score['token_accuracy']:.3f} evaluated, {base['token_accuracy']:.3f} base"
        )
        # Among thousands of answers one may turn on two tokens of equal score.
        assert exact_match == pytest.approx(score["exact_match"], abs=2e-3 if WHOLE else 0)
        assert token_accuracy == pytest.approx(score["token_accuracy"], abs=1e-3)
        assert exact_match >= task.exact_match
        assert token_accuracy >= task.token_accuracy
        assert 1 - token_accuracy < 0.6 * (1 - base["token_accuracy"])
        if task.exact_match:
            assert exact_match > base["exact_match"] + 0.4
