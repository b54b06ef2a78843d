"""What is wrong with a data set: counted by kind, told once."""

from __future__ import annotations

from collections.abc import Callable

from infoprune.errors import DataError

SHOWN, LONGEST = 3, 200  # cases shown of each kind, characters of a case


class Problems:
    """Counts bad records by kind and remembers the first cases of each."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._cases: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, case: str) -> None:
        """Note one bad record.

        Args:
            kind: What is wrong, in words that follow a count, e.g. ``image missing``.
            case: Where, e.g. a file name or an id.
        """
        self._counts[kind] = self._counts.get(kind, 0) + 1
        cases = self._cases.setdefault(kind, [])
        if len(cases) < SHOWN:
            line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(case.split()))
            cases.append(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")

    @property
    def count(self) -> int:
        """Bad records of all kinds."""
        return sum(self._counts.values())

    @property
    def _found(self) -> str:
        parts = [f"{self.count:,} bad {'record' if self.count == 1 else 'records'}:"]
        for kind, count in self._counts.items():
            more = "; ..." if count > len(self._cases[kind]) else ""
            parts.append(f"\n  {count:,} x {kind}: {'; '.join(self._cases[kind])}{more}")
        return "".join(parts)

    def settle(self, kept: int, *, skip_bad: bool, notify: Callable[[str], None]) -> None:
        """Say what was found.

        Raises:
            DataError: Something is bad and ``skip_bad`` is false, or nothing good is left.
        """
        if not self.count:
            return
        if not kept:
            raise DataError(f"{self.source} has no usable question. {self._found}")
        if not skip_bad:
            raise DataError(
                f"{self.source} can't be used as it is: {kept:,} questions are good. {self._found}\n"
                "Mend the data, or go on with the good questions by --skip-bad (skip_bad=True)."
            )
        notify(f"{self.source}: going on with {kept:,} questions. Skipped: {self._found}")
