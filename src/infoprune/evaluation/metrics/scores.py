"""What a metric says about a model's answers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np

from infoprune.data import Example

Rounding = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Group:
    """Questions of one kind: their percent, and how many they are."""

    percent: float
    count: int


@dataclass(frozen=True)
class Scores:
    """Answers judged by one metric.

    Attributes:
        metric: Its name, as in :data:`infoprune.evaluation.metrics.METRICS`.
        per_example: (questions,) score of each answer within 0 to 1, unrounded.
        counted: (questions,) boolean; false where the benchmark's accuracy leaves a question out (GQA: those outside the balanced set).
        overall: Percent, rounded as the reference script rounds what it prints; ``exact``: not rounded.
        breakdown: Percent and count by the names and values of :attr:`infoprune.data.Example.kinds`, over counted questions.
        further: The benchmark's other figures, e.g. GQA's consistency, each as its script prints it.
        notes: What could not be computed, and why.
    """

    metric: str
    per_example: np.ndarray
    counted: np.ndarray
    overall: float
    breakdown: Mapping[str, Mapping[str, Group]] = field(default_factory=dict)
    further: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the single scores, for reports."""
        groups = {name: {value: vars(group) for value, group in values.items()} for name, values in self.breakdown.items()}
        return {
            "metric": self.metric, "overall": self.overall, "num_questions": int(self.counted.sum()), "breakdown": groups,
            "further": dict(self.further), "notes": list(self.notes),
        }  # fmt: skip


def total(values: Iterable[float]) -> float:
    """Sum from the left, rounding each time, as the reference scripts' Pythons did; Python's own ``sum`` is more exact since 3.12."""
    return functools.reduce(operator.add, values, 0.0)


def two_decimals_half_up(values: Sequence[float]) -> float:
    """Percent as VQA's script gives it: its Python 2 rounds what lies exactly between two figures away from zero."""
    percent = 100 * total(values) / len(values)
    return float(Decimal(percent).quantize(Decimal("0.01"), ROUND_HALF_UP))


def two_decimals_printed(values: Sequence[float]) -> float:
    """Percent as GQA's script prints it."""
    return float(f"{total(values) / len(values) * 100:.2f}")


def four_decimals_of_share(values: Sequence[float]) -> float:
    """Percent of the share that lmms-eval and TextVQA's evaluator print with four decimals."""
    return round(100 * float(f"{total(values) / len(values):.4f}"), 2)


def unrounded(values: Sequence[float]) -> float:
    """Percent."""
    return 100 * total(values) / len(values)


def gathered(
    metric: str,
    per_example: Sequence[float],
    examples: Sequence[Example],
    rounding: Rounding,
    *,
    counted: Sequence[bool] | None = None,
    further: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Scores:
    """Scores with their overall figure and breakdown."""
    counts = np.ones(len(examples), dtype=bool) if counted is None else np.asarray(counted, dtype=bool)
    groups: dict[str, dict[str, list[float]]] = {}
    for value, example, counts_too in zip(per_example, examples, counts, strict=True):
        for name, kind in example.kinds.items() if counts_too else ():
            groups.setdefault(name, {}).setdefault(kind, []).append(value)
    breakdown = {
        name: {kind: Group(rounding(values), len(values)) for kind, values in sorted(groups[name].items())} for name in sorted(groups)
    }
    overall = rounding([value for value, counts_too in zip(per_example, counts, strict=True) if counts_too])
    return Scores(metric, np.asarray(per_example, dtype=float), counts, overall, breakdown, dict(further or {}), tuple(notes))
