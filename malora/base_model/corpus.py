"""How the pre-training text is assembled: generated pages of skills, mixed with real text.

Real text comes from two folders and nowhere else: `text_dir` (wikitext2.txt, shakespeare.txt) and
the training splits in `tasks_dir` (clinc150, banking77, text2sql). Of the tasks the model sees the
language alone: utterances, labels and SQL statements stand in separate documents, so that no
prompt is ever followed by its completion, and no prompt keeps the marker ("intent:") that asks
for it. Answering them is left to adapters.
"""

# ruff: noqa: SIM905 (lists of words read best as text)
from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from malora.base_model import records, skills
from malora.base_model.skills import Pool, Skill
from malora.base_model.vocabulary import MARKERS

END = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
DOCUMENT_CHARACTERS = 3000
"""About as many as fit into the model's context."""
PASSAGES = 16 / 70
"""Share of plain text among the real documents; the others are lists of the tasks' lines."""

SKILLS: tuple[tuple[int, Callable[[Random, Pool], Skill]], ...] = (
    (4, skills.dates),
    (2, skills.numbers),
    (2, skills.arithmetic),
    (2, skills.word_lists),
    (1, skills.spelling),
    (2, skills.sentences),
    (3, skills.categories),
    (6, records.extraction),
    (3, records.conversion),
    (2, records.queries),
)


class Corpus:
    """Draws documents, `real_share` (0 to 1) of them of real text, the others generated.

    Real documents are longer than generated ones, so their share of the tokens is larger. The
    last fiftieth of each plain text is kept out of training, in `held_out_text`.
    Raises FileNotFoundError where a source is missing.
    """

    def __init__(self, text_dir: Path, tasks_dir: Path, real_share: float) -> None:
        self.real_share = real_share
        self.texts: list[list[str]] = []
        self.held_out_text: list[str] = []
        for name in ("wikitext2.txt", "shakespeare.txt"):
            paragraphs = _paragraphs((text_dir / name).read_text(encoding="utf-8"))
            kept = len(paragraphs) - len(paragraphs) // 50
            self.texts.append(paragraphs[:kept])
            self.held_out_text.extend(paragraphs[kept:])

        utterances: list[str] = []
        labels: list[str] = []
        for name, marker in (("clinc150", "\nintent:"), ("banking77", "\nrequest:")):
            for prompt, completion in _pairs(tasks_dir / name / "train.jsonl"):
                utterances.append(prompt.removesuffix(marker))
                labels.append(completion.strip())
        queries = _pairs(tasks_dir / "text2sql" / "train.jsonl")
        questions = [p.removesuffix("\nsql:").split(": ", 1)[-1] for p, _ in queries]
        statements = sorted({completion.strip() for _, completion in queries})
        self._lists: tuple[tuple[int, Sequence[str], int], ...] = (
            # (weight, lines, most lines a document)
            (6, sorted(set(utterances)), 40),
            (1, sorted(set(labels)), 30),
            (2, sorted(set(questions)), 30),
            (4, statements, 10),
        )
        words = re.findall(r"[A-Za-z]{2,12}", " ".join(p for text in self.texts for p in text))
        self.pool = Pool(
            sentences=sorted(set(utterances) | set(questions)),
            # Two draws in three are frequent words, the rest any word: rare words teach copying.
            words=sorted(set(words)) + words[:: max(1, len(words) // 40_000)],
        )

    def real_text(self) -> list[str]:
        """All of the real text, once."""
        lists = [line for _, lines, _ in self._lists for line in lines]
        return [p for text in self.texts for p in text] + lists

    def document(self, rng: Random) -> str:
        """One document, without an end mark."""
        draw = rng.random()
        if draw < self.real_share * PASSAGES:
            return _passage(rng, rng.choices(self.texts, (3, 1))[0])
        if draw < self.real_share:
            _, lines, most = rng.choices(self._lists, [w for w, _, _ in self._lists])[0]
            return "\n".join(rng.choices(lines, k=rng.randrange(1, most + 1)))[:DOCUMENT_CHARACTERS]
        make = rng.choices([m for _, m in SKILLS], [w for w, _ in SKILLS])[0]
        skill = make(rng, self.pool)
        if draw < self.real_share + 0.07:
            return _conversation(rng, skill)
        return _page(rng, skill)


def _paragraphs(text: str) -> list[str]:
    return [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]


def _pairs(path: Path) -> list[tuple[str, str]]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [(row["prompt"], row["completion"]) for row in rows]


def _passage(rng: Random, paragraphs: Sequence[str]) -> str:
    start = rng.randrange(len(paragraphs))
    chosen: list[str] = []
    length = 0
    for paragraph in paragraphs[start:]:
        if length > DOCUMENT_CHARACTERS:
            break
        chosen.append(paragraph)
        length += len(paragraph) + 2
    return "\n\n".join(chosen)


def _marker(rng: Random) -> str:
    words = " ".join(rng.choices(MARKERS, k=rng.choice((1, 1, 1, 2))))
    return rng.choice((words, words, words.title(), words.upper()))


_LAYOUTS = (
    "{i} -> {o}~{i} => {o}~{i} = {o}~{i}: {o}~{i} | {o}~{i} ({o})~{i} --- {o}~* {i}: {o}~"
    "- {i} > {o}~Q: {i}\nA: {o}~In: {i}\nOut: {o}~> {i}\n{o}~{i}\n{o}~<{m}>{i}</{m}> {o}~"
    "{i} [{m}: {o}]~{m}({i}) = {o}~{i}, {m} {o}~{o} <- {i}~{o}\t{i}~{i}\t{o}~{m}: {i} -> {o}"
).split("~")
_MARKED = (
    "{i}\n{m}: {o}",
    "{i}\n{m} = {o}",
    "{i}\n\n{m}: {o}",
    "{n}: {i}\n{m}: {o}",
    "{i} {m}: {o}",
)


def _page(rng: Random, skill: Skill) -> str:
    """Examples of one skill in one layout; one example alone has its instruction."""
    layout = rng.choice(_MARKED if rng.random() < 0.5 else _LAYOUTS)
    names = {"m": _marker(rng), "n": _marker(rng)}
    examples = [skill.example(rng) for _ in range(rng.choice((1, 2, 4, 6, 8, 12, 16)))]
    between = rng.choice(("\n", "\n", "\n\n", "\n---\n", "\n###\n"))
    text = between.join(layout.format(i=i, o=o, **names) for i, o in examples)
    if len(examples) == 1 or rng.random() < 0.4:
        head = rng.choice(("{}", "{}.", "{}:", "# {}", "Task: {}"))
        text = f"{head.format(skill.instruction)}\n{text}"
    return text[:DOCUMENT_CHARACTERS]


def _conversation(rng: Random, skill: Skill) -> str:
    """The skill asked for and answered in the chat template's turns."""
    turns = []
    for turn in range(rng.randrange(1, 4)):
        text, answer = skill.example(rng)
        asked = f"{skill.instruction}: {text}" if turn == 0 or rng.random() < 0.5 else text
        turns.append(f"{USER}\n{asked}\n{ASSISTANT}\n{answer}{END}")
    return "\n".join(turns)
