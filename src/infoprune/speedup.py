"""Cut a model until it is as many times faster as was asked for: decide by measured costs, cut, time the whole, correct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from infoprune.decide import decide
from infoprune.decisions import Decisions
from infoprune.demo.sources import cache_directory
from infoprune.errors import BudgetError, out_of_memory
from infoprune.evaluation import latency
from infoprune.evaluation.cost import Workload
from infoprune.memory import release_memory
from infoprune.model import VLM
from infoprune.options import CompressionOptions
from infoprune.progress import SILENT, Progress
from infoprune.site_costs import TimeCosts
from infoprune.solve import SolvedSite
from infoprune.timing.measure import cost_table

TOLERANCE = 0.05  # of the speed-up asked for; a miss by more is corrected
CORRECTIONS = 2
REPEATS, WARMUP = 9, 2  # of timing a cut model beside the dense one


@dataclass(frozen=True)
class Attempt:
    """One cut: the speed-up that it was decided for, the one that its parts add up to, and the measured one with its times."""

    budget: float
    predicted: float
    measured: float
    dense_ms: float
    compressed_ms: float


@dataclass(frozen=True)
class Speed:
    """How much faster a cut model is, from prompt to answer.

    Attributes:
        asked: The speed-up that was asked for.
        attempts: The first cut and its corrections.
        kept: Which of them is the model.
    """

    asked: float
    attempts: tuple[Attempt, ...]
    kept: int

    def as_dict(self) -> dict[str, Any]:
        """For the report: the kept attempt's figures, and all attempts."""
        own = {name: value for name, value in asdict(self.attempts[self.kept]).items() if name != "budget"}
        return {"asked": self.asked, **own, "attempts": [asdict(attempt) for attempt in self.attempts], "kept": self.kept}

    @classmethod
    def from_dict(cls, report: dict[str, Any]) -> Speed:
        """The inverse of :meth:`as_dict`."""
        return cls(report["asked"], tuple(Attempt(**attempt) for attempt in report["attempts"]), report["kept"])


def cut_to_speed(
    vlm: VLM,
    solved: list[SolvedSite],
    workload: Workload,
    probe: dict[str, torch.Tensor],
    options: CompressionOptions,
    cut: Callable[[Decisions], VLM],
    progress: Progress = SILENT,
) -> tuple[VLM, Decisions, Speed]:
    """Decide by what sites take on this machine, and :func:`reach` ``options.speedup``.

    Args:
        vlm: The dense model; unchanged.
        solved: Its sites.
        workload: What is to be faster: image, prompt and answer.
        probe: The inputs of that example.
        options: The speed-up, and what may be cut.
        cut: Makes a cut copy of ``vlm``.
        progress: Shows the steps.

    Raises:
        BudgetError: By what its parts take, the model can't be cut to be as fast; says what it can.
    """
    assert options.speedup is not None and vlm.architecture is not None
    family = vlm.architecture.family
    folder = cache_directory() / "timing"
    table = cost_table(vlm, solved, workload, probe, multiple=options.rank_multiple, folder=folder, progress=progress)
    costs = TimeCosts(table, workload)

    def decided(speedup: float) -> Decisions:
        return decide(solved, costs, table.end_to_end, replace(options, speedup=speedup))

    def timed(found: VLM) -> tuple[float, float]:
        both = latency.measure(
            [vlm, found], family, probe, answer_tokens=workload.answer_tokens, repeats=REPEATS, warmup=WARMUP, progress=progress
        )
        return both[0]["end_to_end"]["median"], both[1]["end_to_end"]["median"]

    return reach(options.speedup, table.end_to_end, decided, cut, timed, progress.note)


def reach(
    asked: float,
    dense_seconds: float,
    decided: Callable[[float], Decisions],
    cut: Callable[[Decisions], VLM],
    timed: Callable[[VLM], tuple[float, float]],
    note: Callable[[str], None],
) -> tuple[VLM, Decisions, Speed]:
    """Cut for ``asked``; while the measured speed-up is off by more than :data:`TOLERANCE`, decide again for what corrects that.

    The budget of a correction is the last one, times the speed-up asked for over the measured one, but at most half the way back to no
    speed-up; that decisions may stay below their budget, because sites come in large pieces, is corrected with the rest. Decisions that
    were timed before end it. A miss that remains after :data:`CORRECTIONS` is told, and no error: of all cuts the one nearest to
    ``asked`` is kept, one that is fast enough before others.

    Args:
        asked: The speed-up.
        dense_seconds: Of the dense model, in the unit of ``Decisions.predicted_cost``.
        decided: Decisions for a predicted speed-up; may raise :class:`BudgetError`.
        cut: A model from decisions.
        timed: Times of the dense and of a cut model, in ms, measured side by side.
        note: Called with one line for people.
    """
    attempts: list[Attempt] = []
    tried: list[Decisions] = []
    kept: tuple[VLM, Decisions, int] | None = None
    budget = asked
    while len(attempts) <= CORRECTIONS:
        try:
            decisions = decided(budget)
        except BudgetError as error:
            if not attempts:
                raise
            note(f"no further correction: {error}")
            break
        assert decisions.predicted_cost is not None
        if decisions in tried:
            note(f"no further correction: what can be cut comes in pieces too large to come nearer to {asked:g}")
            break
        tried.append(decisions)
        try:
            model = cut(decisions)
            dense_ms, compressed_ms = timed(model)
        except RuntimeError as error:
            if kept is None or not out_of_memory(error):
                raise
            note("no further correction: the memory is not enough for a third model beside the dense one and the one that is kept")
            break
        attempt = Attempt(budget, dense_seconds / decisions.predicted_cost, dense_ms / compressed_ms, dense_ms, compressed_ms)
        attempts.append(attempt)
        note(f"predicted to be {attempt.predicted:.2f} times faster, measured {attempt.measured:.2f} times; asked for {asked:g}")
        if kept is None or _rank(attempt, asked) < _rank(attempts[kept[2]], asked):
            kept = model, decisions, len(attempts) - 1
        del model  # at most one copy beside the kept one
        release_memory()
        if abs(attempt.measured / asked - 1) <= TOLERANCE:
            break
        budget = max(budget * asked / attempt.measured, (1 + budget) / 2)
    assert kept is not None
    speed = Speed(asked, tuple(attempts), kept[2])
    if attempts[kept[2]].measured < (1 - TOLERANCE) * asked:
        note(f"the speed-up asked for, {asked:g}, was missed: the fastest cut is {attempts[kept[2]].measured:.2f} times faster")
    elif attempts[kept[2]].measured > (1 + TOLERANCE) * asked:
        note(
            f"the model is {attempts[kept[2]].measured:.2f} times faster where {asked:g} was asked for: of the cuts tried that are "
            "fast enough this one is nearest"
        )
    return kept[0], kept[1], speed


def _rank(attempt: Attempt, asked: float) -> tuple[bool, float]:
    """Least for the best: fast enough before too slow, then by distance."""
    slow = attempt.measured < (1 - TOLERANCE) * asked
    return slow, abs(attempt.measured / asked - 1)
