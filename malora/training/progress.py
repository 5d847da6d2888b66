"""Progress that suits where it goes: a moving bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressReport:
    """A count towards `total`, on standard error."""

    def __init__(self, title: str, total: int = 0) -> None:
        self.title = title
        self.total = total
        self._done = self._first = 0
        self._started = time.monotonic()
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Begin where an earlier run stopped; the rate then counts this run alone."""
        self.total = total
        self._done = self._first = done
        self._started = time.monotonic()
        self._bar.update(self._task, total=total, completed=done)

    def advance(self, amount: int) -> None:
        self._done += amount
        self._bar.update(self._task, completed=self._done)

    def note(self, text: str) -> None:
        """Say how it goes: beside the bar, or off a terminal as a line of its own."""
        self._bar.update(self._task, note=text)
        if not self._console.is_terminal:
            rate = (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)
            self.print(f"{self.title} {self._done}/{self.total} ({rate:.1f}/s) {text}")

    def print(self, line: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
