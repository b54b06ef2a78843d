"""Find the cheapest plan whose drop of accuracy is certified: calibrate once, cut and score along a path, stop at the first that fails.

All plans are decided from calibration data before anything is scored, so that their order does not depend on the data that certify;
:func:`infoprune.evaluation.certify.fixed_sequence` says why that is all the procedure needs.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from infoprune._version import __version__
from infoprune.certification.certificate import (
    GENERATED,
    SCORE,
    Certificate,
    CertificationData,
    Measured,
    PathStep,
    plan_digest,
    rank_correlation,
)
from infoprune.certification.data import CertificationSplit, check_enough, split_data
from infoprune.certification.path import PlannedPath, Scored, judge, kl_questions, plan_path, score_dense, score_plan
from infoprune.checkpoint import save
from infoprune.data import Example
from infoprune.data.seen import DIGITS, digests
from infoprune.errors import CertificateError, CheckpointError
from infoprune.evaluation.certify import by_image, p_value
from infoprune.evaluation.cost import Flops, num_parameters
from infoprune.evaluation.generation import MAX_NEW_TOKENS
from infoprune.evaluation.metrics import EXACT
from infoprune.evaluation.quality import settings_not_scored
from infoprune.evaluation.record import weights_digest
from infoprune.memory import release_memory
from infoprune.model import VLM, load, precision_name
from infoprune.options import CompressionOptions
from infoprune.plan import CalibrationRecord, CompressionPlan
from infoprune.progress import SILENT, Clock, Progress
from infoprune.steps import Compressed, fingerprint, images_state
from infoprune.training.state import WorkFolder


def compress_certified(
    vlm: VLM, data: str | Sequence[Example], options: CompressionOptions, *, work: Path | None = None, progress: Progress = SILENT
) -> Compressed:
    """Compress as far as ``options.max_drop`` is certified; see :func:`infoprune.compress.compress`.

    At most one compressed copy is in memory beside the dense model: the last plan that passed waits on disk.

    Raises:
        CertificateError: Too little data to certify anything, or the mildest plan did not pass.
    """
    assert options.max_drop is not None
    clock = Clock()
    split = split_data(vlm, data, options, progress)
    check_enough(split.sizes, options, progress)
    if split.metric == EXACT and (ignored := settings_not_scored(vlm)):
        progress.note(
            f"Warning: the checkpoint generates with {', '.join(ignored)}, which may change its answers; the certificate is of the "
            "likeliest tokens as they are."
        )
    with _workplace(vlm, split, options, work) as folder:
        place = _Workplace(folder)
        path = plan_path(vlm, split.calibration, data if isinstance(data, str) else "examples", options, clock, progress)
        dense = place.dense()
        if dense is None:
            dense = score_dense(vlm, split, progress, folder=folder)
            place.keep_dense(dense)
        try:
            check_telling(dense, split, options)
        except CertificateError:
            place.discard()  # what mends it are other settings, which would be refused beside this work
            raise
        steps, scores = _walk(path, dense, split, place, progress)
        passed = sum(step.measured is not None and step.measured.certified for step in steps) - 1
        if passed < 0:
            place.discard()
            raise CertificateError(_none_passed(path.shares[0], steps[0], options))
        target = place.model(vlm, path.plans[passed]) or path.cut(passed, progress)
        clock.lap("certify")
    certificate = _certificate(vlm, steps, steps[passed].plan, dense, split, path.record, options)
    target = replace(target, seen={"calibration": digests(split.calibration)}, certified=weights_digest(target.model))
    return Compressed(
        target, path.dense_flops, scores[passed].flops, path.workload, path.decisions[passed].predicted_loss, num_parameters(vlm.model),
        scores[passed].parameters, clock.laps, path.probe, certificate=certificate,
    )  # fmt: skip


def check_telling(dense: np.ndarray, split: CertificationSplit, options: CompressionOptions) -> None:
    """A drop can't be larger than what the dense model scores, so that where this is little every model would pass.

    Raises:
        CertificateError: A model that scores nothing at all would be certified.
    """
    assert options.max_drop is not None
    if p_value(by_image(dense, split.images), options.max_drop / 100, options.confidence) > 1 - options.confidence:
        return
    raise CertificateError(
        f"The dense model scores {100 * float(dense.mean()):.1f}% on the certification data by the metric '{split.metric}', so that one "
        f"which answers nothing would be certified, too: a drop of at most {options.max_drop:g} points says nothing here. Put the "
        "questions so that answers are like the references (--prompt-suffix), judge by another metric (--certify-metric), or ask for a "
        "smaller drop."
    )


def _walk(
    path: PlannedPath, dense: np.ndarray, split: CertificationSplit, place: _Workplace, progress: Progress
) -> tuple[list[PathStep], list[Scored]]:
    """Cut, score and judge plan after plan up to the first that fails; all steps, and the scores of those that were tried."""
    options = path.options
    assert options.max_drop is not None
    steps = [
        PathStep(share=share, plan=plan_digest(plan), predicted_loss_nats=decisions.predicted_loss)
        for share, plan, decisions in zip(path.shares, path.plans, path.decisions, strict=True)
    ]
    scores: list[Scored] = []
    for index, step in enumerate(steps):
        scored, cut = place.scored(index, step.plan), None
        if scored is None:
            cut = path.cut(index, progress)
            scored = score_plan(path, cut, index, split, progress, folder=place.folder)
        measured = judge(dense, scored, split, options.max_drop, options.confidence)
        if cut is not None:
            place.keep(index, step.plan, scored, replace(cut, plan=path.plans[index]) if measured.certified else None)
        del cut  # before the next one is made
        release_memory()
        progress.note(_told(step.share, measured, options))
        ratio = scored.flops.total / path.dense_flops.total
        steps[index] = step.model_copy(update={"flops_ratio": ratio, "parameters": scored.parameters, "measured": measured})
        scores.append(scored)
        if not measured.certified:
            break
    return steps, scores


def _told(share: float, measured: Measured, options: CompressionOptions) -> str:
    bound = measured.drop_bounds["betting"]
    verdict = "certified" if measured.certified else f"not certified; the limit is {options.max_drop:g}"
    return (
        f"{share:g} of the FLOPs: drop {measured.drop_points:+.2f} points, at most {bound:.2f} with {100 * options.confidence:g}% "
        f"confidence, KL {measured.kl_nats:.4f} nats per answer token: {verdict}"
    )


def _none_passed(share: float, step: PathStep, options: CompressionOptions) -> str:
    measured = step.measured
    assert measured is not None
    return (
        f"Even the mildest plan, {share:g} of the FLOPs, is not certified to lose at most {options.max_drop:g} points: it lost "
        f"{measured.drop_points:.2f}, and the bound is {measured.drop_bounds['betting']:.2f} points. Start with a milder share (--share), "
        "allow a larger --max-drop, or give more data; but certify on images that no try has seen (--certify): the confidence holds for "
        "one look at them, and those of this run have been looked at."
    )


def _certificate(
    vlm: VLM, steps: Sequence[PathStep], plan: str, dense: np.ndarray, split: CertificationSplit, record: CalibrationRecord,
    options: CompressionOptions,
) -> Certificate:  # fmt: skip
    assert options.max_drop is not None
    if options.certify is None:
        source = f"{record.data}, images that calibration did not see"
    else:
        source = options.certify if isinstance(options.certify, str) else "examples"
    return Certificate(
        library=__version__,
        max_drop_points=options.max_drop,
        confidence=options.confidence,
        score=SCORE if split.metric == EXACT else GENERATED,
        plan=plan,
        **_asked(vlm, split),
        dense_accuracy=100 * float(dense.mean()),
        data=CertificationData(
            source=source,
            fingerprint=fingerprint(split.certification, people=split.metric != EXACT),
            calibration=record.fingerprint,
            num_questions=len(split.certification),
            num_images=len(split.sizes),
            largest_image=int(split.sizes.max()),
            kl_questions=kl_questions(split),
            images=tuple(image[:DIGITS] for image in dict.fromkeys(split.images)),
        ),
        path=tuple(steps),
        rank_correlation=rank_correlation(tuple(steps)),
    )


def _asked(vlm: VLM, split: CertificationSplit) -> dict[str, Any]:
    """How answers came about and are judged: what may not differ between the models that are compared, nor within an interrupted run."""
    first = split.certification[0]
    put = first.prompt and re.sub(re.escape(first.question), "{question}", first.prompt, count=1, flags=re.IGNORECASE)
    return {
        "metric": split.metric,
        "prompt": vlm.encoder.prompt_of(replace(first, question="{question}", prompt=put)),
        "precision": precision_name(vlm.model.dtype),
        "max_new_tokens": None if split.metric == EXACT else MAX_NEW_TOKENS,
    }


# --- what is kept meanwhile --------------------------------------------------------------------------------------------------------


@contextmanager
def _workplace(vlm: VLM, split: CertificationSplit, options: CompressionOptions, work: Path | None) -> Iterator[Path]:
    """The folder that keeps scores and the last plan that passed: ``work``, where an interrupted run goes on, or a temporary one."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="infoprune-") as folder:
            yield Path(folder)
        return
    told = {
        "model": vlm.model_id,
        "weights": weights_digest(vlm.model),
        "calibration": fingerprint(split.calibration),
        "images": images_state(split.calibration + split.certification),
        "certification": fingerprint(split.certification, people=split.metric != EXACT),
        "certify_metric": split.metric,
    }
    settings = {key: value for key, value in asdict(replace(options, certify=None)).items() if key != "certify"}
    folder = WorkFolder(work)
    folder.claim(settings | told | _asked(vlm, split) | {"library": __version__})
    with folder.held():
        yield work


@dataclass(frozen=True)
class _Workplace:
    """Files of one run: scores and answers of the dense model, of each plan, and the last plan that passed as a checkpoint."""

    folder: Path

    def dense(self) -> np.ndarray | None:
        found = self._read("dense")
        return None if found is None else np.array(found["scores"], dtype=float)

    def keep_dense(self, scores: np.ndarray) -> None:
        self._write("dense", {"scores": scores.tolist()})

    def scored(self, index: int, plan: str) -> Scored | None:
        """What an interrupted run found of the plan with this digest."""
        found = self._read(f"plan-{index:02d}")
        if found is None or found["plan"] != plan:
            return None
        flops = Flops(**{name: value for name, value in found["flops"].items() if name != "total"})
        return Scored(np.array(found["scores"], dtype=float), found["kl_nats"], flops, found["parameters"])

    def keep(self, index: int, plan: str, scored: Scored, passed: VLM | None) -> None:
        if passed is not None:
            save(passed, self.folder / "passed", dtype=passed.model.dtype, overwrite=True)
        self._write(f"plan-{index:02d}", {
            "plan": plan, "kl_nats": scored.kl_nats, "parameters": scored.parameters, "flops": scored.flops.as_dict(),
            "scores": scored.scores.tolist(),
        })  # fmt: skip

    def model(self, vlm: VLM, plan: CompressionPlan) -> VLM | None:
        """The model cut by ``plan``, if that is the one on disk."""
        folder = self.folder / "passed"
        if not (folder / "plan.json").is_file() or CompressionPlan.read(folder) != plan:
            return None
        loaded = load(folder, device=str(vlm.device), dtype=vlm.model.dtype, trust_remote_code=vlm.trusted)
        return replace(vlm, model=loaded.model, plan=plan)

    def discard(self) -> None:
        """Forget everything: there is nothing to go on with."""
        WorkFolder(self.folder).discard()

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). Delete it to score again.") from error

    def _write(self, name: str, value: dict[str, Any]) -> None:
        aside = self.folder / f"{name}.partial"
        aside.write_text(json.dumps(value), encoding="utf-8")
        aside.rename(self.folder / f"{name}.json")
