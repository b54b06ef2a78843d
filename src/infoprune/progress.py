"""How long work reports itself: an interface for the library, bars for the command line, silence by default."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Says nothing; the command line's version draws bars."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A step of ``total`` parts; the yielded function is called with the number of parts just done."""
        yield lambda done: None

    def status(self, values: dict[str, float]) -> None:
        """Figures that go with the part just done."""

    def note(self, message: str) -> None:
        """One line for people."""


SILENT = Progress()


class Clock:
    """Wall time by step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
