"""Metrics by name: ``BENCHMARK/official`` is the benchmark's own script, ``BENCHMARK/lmms-eval`` what most recent papers quote.

Both contain their scripts' quirks, so that figures can be compared to the last digit. ``exact`` is case-sensitive equality with the one
reference answer, white space around it aside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

from infoprune.data import Example
from infoprune.data.sources import BENCHMARKS
from infoprune.errors import DataError
from infoprune.evaluation.metrics import gqa, vqa
from infoprune.evaluation.metrics.scores import (
    Group,
    Rounding,
    Scores,
    four_decimals_of_share,
    gathered,
    two_decimals_half_up,
    unrounded,
)

__all__ = ["EXACT", "METRICS", "MODES", "Group", "Scores", "counted_only", "metric_for", "score_answers"]

EXACT = "exact"
MODES = ("official", "lmms-eval")
TEXTVQA_ANSWERS = 10

Metric = Callable[[Sequence[str], Sequence[Example]], Scores]


def _exact(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    right = [float(answer.strip() == example.answer.strip()) for answer, example in zip(answers, examples, strict=True)]
    return gathered(EXACT, right, examples, unrounded)


def _vqa(
    answers: Sequence[str], examples: Sequence[Example], *, name: str, accuracy: Callable[[str, Sequence[str]], float], rounding: Rounding
) -> Scores:
    fewest, most = (TEXTVQA_ANSWERS, TEXTVQA_ANSWERS) if name == "textvqa/official" else (2, sys.maxsize)
    others = [example for example in examples if not fewest <= len(example.answers) <= most]
    if others:
        raise DataError(
            f"{name} weighs the answers of {'exactly' if fewest == most else 'at least'} {fewest} people, which {len(others):,} of "
            f"{len(examples):,} questions do not have; the first is {others[0].question!r} with {len(others[0].answers)}. "
            f"Use '{EXACT}' for data with one answer a question."
        )
    found = [float(accuracy(answer, example.answers)) for answer, example in zip(answers, examples, strict=True)]
    return gathered(name, found, examples, rounding)


METRICS: dict[str, Metric] = {
    EXACT: _exact,
    **{
        name: partial(_vqa, name=name, accuracy=accuracy, rounding=rounding)
        for name, accuracy, rounding in (
            ("vqav2/official", vqa.vqav2_official, two_decimals_half_up),
            ("vqav2/lmms-eval", vqa.vqav2_lmms_eval, four_decimals_of_share),
            ("textvqa/official", vqa.textvqa_official, four_decimals_of_share),
            ("textvqa/lmms-eval", vqa.textvqa_lmms_eval, four_decimals_of_share),
        )
    },
    **gqa.METRICS,
}


def metric_for(dataset: str, mode: str | None = None) -> str:
    """The metric that judges a data set.

    Args:
        dataset: Name of :class:`infoprune.data.DataSpec`.
        mode: ``official``, ``lmms-eval``, or the full name of a metric; ``None``: ``official`` for benchmarks, ``exact`` for all else.

    Raises:
        DataError: No such metric, or not for this data set.
    """
    name = mode if mode in METRICS else f"{dataset}/{mode or MODES[0]}"
    if mode is None and dataset not in BENCHMARKS:
        name = EXACT
    if name not in METRICS:
        raise DataError(
            f"There is no metric '{mode}' for {dataset}. Metrics are {', '.join(METRICS)}; of a benchmark, {' or '.join(MODES)}."
        )
    return name


def counted_only(examples: Sequence[Example], metric: str) -> list[Example]:
    """The examples that ``metric`` counts, see :attr:`Scores.counted`; known without any answer."""
    if metric != "gqa/official":
        return list(examples)
    return [example for example, use in zip(examples, gqa.counted_questions(examples), strict=True) if use]


def score_answers(answers: Sequence[str], examples: Sequence[Example], metric: str) -> Scores:
    """Judge a model's answers.

    Args:
        answers: One per example, as the model gave them.
        examples: What was asked, each with its reference.
        metric: A name in :data:`METRICS`; :func:`metric_for` chooses.

    Raises:
        DataError: No such metric, no examples, another number of answers than of examples, or examples without what the metric needs.
    """
    if metric not in METRICS:
        raise DataError(f"There is no metric '{metric}'. Metrics are {', '.join(METRICS)}.")
    if len(answers) != len(examples):
        raise DataError(f"{len(answers):,} answers do not fit {len(examples):,} questions.")
    if not examples:
        raise DataError("There are no answers to score.")
    unanswered = sum(not example.answered for example in examples)
    if unanswered:
        raise DataError(f"{unanswered:,} of {len(examples):,} questions have no reference answer, so their answers can't be scored.")
    return METRICS[metric](answers, examples)
