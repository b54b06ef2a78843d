"""A path of plans decided from calibration data alone, and what each scores on the data that certify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infoprune.calibration_batches import CalibrationBatches
from infoprune.certification.certificate import Measured
from infoprune.certification.data import CertificationSplit
from infoprune.data import Example
from infoprune.decide import decide
from infoprune.decisions import Decisions
from infoprune.errors import BudgetError
from infoprune.evaluation.certify import by_image, p_value, upper_bounds
from infoprune.evaluation.cost import Flops, Workload, num_parameters
from infoprune.evaluation.generation import MAX_NEW_TOKENS, generate_answers
from infoprune.evaluation.metrics import EXACT, score_answers
from infoprune.evaluation.quality import Quality, paired_drop, score
from infoprune.evaluation.record import weights_digest
from infoprune.model import VLM
from infoprune.options import CompressionOptions
from infoprune.plan import CalibrationRecord, CompressionPlan
from infoprune.progress import SILENT, Clock, Progress
from infoprune.site_costs import FlopCosts
from infoprune.site_statistics import Statistics
from infoprune.solve import solve_sites
from infoprune.steps import (
    apply_decisions,
    calibration_record,
    calibration_statistics,
    checked_flops,
    make_plan,
    measure,
)

KL_IMAGES = 128  # of the certification images give the KL, for which the dense model runs along; all give the accuracy


@dataclass(frozen=True)
class PlannedPath:
    """Plans from mild to aggressive, decided on calibration data alone, and what cutting by them needs."""

    vlm: VLM
    options: CompressionOptions
    record: CalibrationRecord
    shares: list[float]
    decisions: list[Decisions]
    plans: list[CompressionPlan]
    statistics: Statistics
    inputs: CalibrationBatches
    probe: dict[str, torch.Tensor]
    dense_flops: Flops
    workload: Workload

    def cut(self, index: int, progress: Progress = SILENT) -> VLM:
        """A copy of the dense model, cut by one of the plans."""
        options = self.options.at(self.shares[index])
        return apply_decisions(self.vlm, self.decisions[index], options, self.statistics, self.inputs, self.record, progress)


def plan_path(
    vlm: VLM, calibration: Sequence[Example], source: str, options: CompressionOptions, clock: Clock, progress: Progress = SILENT
) -> PlannedPath:
    """Calibrate once and decide a plan for every share that can be reached.

    Raises:
        BudgetError: Not even the first share can be reached.
    """
    statistics, inputs = calibration_statistics(vlm, calibration, options, progress)
    clock.lap("calibrate")
    probe, dense_flops, workload = measure(vlm, calibration)
    record = calibration_record(vlm, source, calibration, options)
    assert vlm.architecture is not None
    with progress.task("scoring heads and ranks", len(vlm.architecture.attention) + len(vlm.architecture.ffn)) as advance:
        solved = solve_sites(vlm.model, vlm.architecture, statistics, options, lambda: advance(1))
    shares: list[float] = []
    decisions: list[Decisions] = []
    plans: list[CompressionPlan] = []
    for share in options.shares:
        own = options.at(share)
        try:
            found = decide(solved, FlopCosts(workload), dense_flops.total, own)
        except BudgetError as error:
            if not shares:
                raise
            progress.note(f"the path ends at {shares[-1]:g} of the FLOPs: {error}")
            break
        shares.append(share)
        decisions.append(found)
        plans.append(make_plan(vlm, found, own, record))
    clock.lap("decide")
    return PlannedPath(vlm, options, record, shares, decisions, plans, statistics, inputs, probe, dense_flops, workload)


@dataclass(frozen=True)
class Scored:
    """One plan on the certification data: (questions,) scores within 0 to 1, KL per answer token, and the cut model's cost."""

    scores: np.ndarray
    kl_nats: float
    flops: Flops
    parameters: int


def score_plan(
    path: PlannedPath, cut: VLM, index: int, split: CertificationSplit, progress: Progress = SILENT, *, folder: Path | None = None
) -> Scored:
    """Scores of all certification questions, KL on those about the first ``KL_IMAGES`` images.

    What is found is kept in ``folder``, under the digest of the weights that gave it: a cut that differs in its last bits asks anew.
    """

    def record(what: str) -> Path | None:
        return None if folder is None else folder / f"{what}-{index:02d}-{digest}.jsonl"

    flops = checked_flops(cut, path.plans[index], path.probe, path.workload, path.dense_flops)
    count, digest = kl_questions(split), weights_digest(cut.model)
    first = score([path.vlm, cut], split.certification[:count], record=record("kl"), progress=progress)[1]
    assert first.kl_nats is not None
    if split.metric != EXACT:
        scores = judged_answers(cut, split, record("answers"), progress)
    else:
        rest = split.certification[count:]
        others = score([cut], rest, record=record("scores"), progress=progress) if rest else []
        scores = np.concatenate([first.scores, *(q.scores for q in others)])
    return Scored(scores.astype(float), first.kl_nats, flops, num_parameters(cut.model))


def score_dense(vlm: VLM, split: CertificationSplit, progress: Progress = SILENT, *, folder: Path | None = None) -> np.ndarray:
    """(questions,) scores of the model itself, by the metric of ``split``."""
    if split.metric != EXACT:
        return judged_answers(vlm, split, None if folder is None else folder / "answers-dense.jsonl", progress)
    record = None if folder is None else folder / "scores-dense.jsonl"
    return score([vlm], split.certification, record=record, progress=progress)[0].scores.astype(float)


def judged_answers(vlm: VLM, split: CertificationSplit, record: Path | None, progress: Progress) -> np.ndarray:
    """(questions,) scores of greedy answers; an interrupted run goes on from its ``record``."""
    answers = generate_answers(vlm, split.certification, max_new_tokens=MAX_NEW_TOKENS, record=record, progress=progress)
    return score_answers(answers, split.certification, split.metric).per_example


def kl_questions(split: CertificationSplit) -> int:
    """Questions about the first ``KL_IMAGES`` certification images, which come first."""
    images = list(dict.fromkeys(split.images))
    return len(split.images) if len(images) <= KL_IMAGES else split.images.index(images[KL_IMAGES])


def judge(dense: np.ndarray, scored: Scored, split: CertificationSplit, max_drop: float, confidence: float) -> Measured:
    """Bounds and test of one plan; ``max_drop`` in points."""
    data = by_image(dense - scored.scores, split.images)
    drop, interval = paired_drop(Quality(dense), Quality(scored.scores), split.certification, images=split.images)
    p = p_value(data, max_drop / 100, confidence)
    return Measured(
        accuracy=100 * float(scored.scores.mean()), drop_points=drop, drop_ci95=interval,
        drop_bounds=upper_bounds(data, confidence, target=max_drop / 100).points(), p_value=p, kl_nats=scored.kl_nats,
        certified=p <= 1 - confidence,
    )  # fmt: skip
