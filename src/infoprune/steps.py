"""The steps that compression is made of: data, calibration, plans, cutting, counting. Each can be used by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from infoprune._version import __version__
from infoprune.calibrate import calibrate
from infoprune.calibration_batches import CalibrationBatches
from infoprune.certification.certificate import Certificate
from infoprune.data import Example
from infoprune.data.seen import image_digest
from infoprune.decisions import Decisions
from infoprune.errors import DataError, PlanError
from infoprune.evaluation.cost import (
    Flops,
    Workload,
    count_flops,
    count_workload,
    predicted_flops,
    prompt_inputs,
    typical_example,
)
from infoprune.evaluation.quality import can_share_prefix
from infoprune.fitting import load_fitting
from infoprune.model import VLM, dense_architecture
from infoprune.options import LOW_RANK, NONE, WIDTH, CompressionOptions, Needs
from infoprune.packing import PackedBatch, batches
from infoprune.plan import CalibrationRecord, CompressionPlan
from infoprune.progress import SILENT, Progress
from infoprune.rare import sample_with_rare
from infoprune.repair import cut_and_repair_
from infoprune.saliency import weight_saliencies
from infoprune.sensitivity import head_sensitivities
from infoprune.site_statistics import Statistics
from infoprune.speedup import Speed
from infoprune.surgery import apply_, ffn_options

QUESTIONS_PER_IMAGE = 3  # of calibration; see ``benchmarks/selection.py``


def predicted_name(plan: CompressionPlan | None) -> str:
    """What the predicted loss of a plan is called: nats where the task's metric weighs errors."""
    return "predicted_squared_error" if plan is not None and plan.method.get("ffn_metric") == "identity" else "predicted_loss_nats"


@dataclass(frozen=True)
class Compressed:
    """Outcome of :func:`compress`.

    Attributes:
        vlm: The compressed model, with its plan.
        dense_flops, flops: Counted on the real models, before and after.
        workload: What they were counted over.
        predicted_loss: Second-order prediction of the information lost by the cut, in nats per example; under the identity metric the
            squared error of the cut blocks' outputs.
        dense_parameters, parameters: Before and after.
        seconds: Wall time by step.
        probe: Inputs of one example, to compare a saved checkpoint on.
        training: What gate training and recovery were like, by stage.
        trained_with: Options of training, and what it was validated on; empty where nothing was trained.
        main_process: False in all but one of several processes; that one saves.
        certificate: Of the accuracy that was kept, where ``max_drop`` asked for one.
        speed: How much faster it is, where ``speedup`` asked for that.
    """

    vlm: VLM
    dense_flops: Flops
    flops: Flops
    workload: Workload
    predicted_loss: float
    dense_parameters: int
    parameters: int
    seconds: dict[str, float]
    probe: dict[str, torch.Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    main_process: bool = True
    certificate: Certificate | None = None
    speed: Speed | None = None
    trained_with: dict[str, Any] = field(default_factory=dict)

    @property
    def flops_ratio(self) -> float:
        """Compressed / dense FLOPs over the workload."""
        return self.flops.total / self.dense_flops.total

    def as_dict(self) -> dict[str, Any]:
        """Figures for ``report.json``."""
        certified = {} if self.certificate is None else {"certificate": self.certificate.model_dump(mode="json")}
        return {
            "flops_ratio": self.flops_ratio,
            "dense_flops": self.dense_flops.as_dict(),
            "flops": self.flops.as_dict(),
            "workload": {name: value for name, value in self.workload.__dict__.items() if name != "attention"},
            predicted_name(self.vlm.plan): self.predicted_loss,
            "dense_parameters": self.dense_parameters,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "training": self.training,
            **({"trained_with": self.trained_with} if self.trained_with else {}),
            **certified,
            **({} if self.speed is None else {"speedup": self.speed.as_dict()}),
        }


def example_pool(vlm: VLM, data: str | Sequence[Example], progress: Progress, *, skip_bad: bool = False) -> list[Example]:
    """All examples that ``data`` names and ``vlm`` takes."""
    pool = load_fitting(vlm.encoder, data, skip_bad=skip_bad, notify=progress.note) if isinstance(data, str) else list(data)
    if not pool:
        raise DataError("There are no calibration examples.")
    return pool


def calibration_examples(
    vlm: VLM, data: str | Sequence[Example], options: CompressionOptions, progress: Progress = SILENT
) -> list[Example]:  # fmt: skip
    """The calibration sample: a few questions on each of as many images as that takes, rare images among them."""
    pool = example_pool(vlm, data, progress, skip_bad=options.skip_bad)
    return sample_with_rare(
        vlm, pool, options.examples, options.rare, seed=options.seed, per_image=QUESTIONS_PER_IMAGE, progress=progress
    )  # fmt: skip


def calibration_statistics(
    vlm: VLM, data: str | Sequence[Example], options: CompressionOptions, progress: Progress = SILENT
) -> tuple[Statistics, CalibrationBatches]:
    """Moments of a dense model over the calibration sample, and the batches they came from."""
    examples = calibration_examples(vlm, data, options, progress)
    return calibrated(vlm, examples, options.needs, progress)


def calibrated(vlm: VLM, examples: Sequence[Example], needs: Needs, progress: Progress = SILENT) -> tuple[Statistics, CalibrationBatches]:
    """Statistics of a dense model over ``examples``, with all that deciding needs, and the batches of their moments."""
    inputs = CalibrationBatches(vlm, examples)
    statistics = statistics_of(vlm, inputs, needs, progress)
    if needs.sensitivities:
        # One backward pass per question: over the row that it is in, not over several.
        rows = batches(vlm.encoder, examples, images_per_batch=1, share_prefix=can_share_prefix(vlm))
        with progress.task("differentiating in the heads", len(examples)) as advance:
            found = head_sensitivities(
                vlm.model, dense_architecture(vlm), (row.to(vlm.device) for row, _ in rows), advance, recompute=inputs.recompute
            )
        for path, sensitivity in found.items():
            statistics.sites[path].sensitivity = sensitivity
    return statistics, inputs


def calibration_record(
    vlm: VLM, data: str | Sequence[Example], examples: Sequence[Example], options: CompressionOptions
) -> CalibrationRecord:
    """Where the statistics of ``vlm`` over ``examples``, drawn from ``data``, came from."""
    return CalibrationRecord(
        data=data if isinstance(data, str) else "examples", count=len(examples), seed=options.seed, rare=options.rare,
        weighting=options.weighting,
        temperature=options.temperature, top_k=options.top_k, fingerprint=fingerprint(examples),
        prompt_suffix=vlm.encoder.suffix,
    )  # fmt: skip


def fingerprint(examples: Sequence[Example], *, people: bool = False) -> str:
    """Digest of what was asked about which images (by file name), for the record; ``people``: and of all that people answered."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.image.name}\0{example.prompt or example.question}\0{example.answer}\n".encode())
        if people:
            digest.update(repr(example.answers).encode())
    return digest.hexdigest()[:16]


def images_state(examples: Sequence[Example]) -> str:
    """Digest of the images' names and contents: whether files are still those that unfinished work has seen.

    Raises:
        DataError: One is not there.
    """
    digest = hashlib.sha256()
    for image in dict.fromkeys(example.image for example in examples):
        try:
            content = image_digest(image)
        except OSError as error:
            raise DataError(f"Cannot read the image {image}: {error.strerror}. Check that the path is right.") from error
        digest.update(f"{image.name}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def measure(vlm: VLM, examples: Sequence[Example]) -> tuple[dict[str, torch.Tensor], Flops, Workload]:
    """A typical example's inputs, the FLOPs of answering it, and its workload."""
    example, answer_tokens = typical_example(vlm.encoder, examples)
    probe = {name: value.to(vlm.device) for name, value in prompt_inputs(vlm.encoder, example).items()}
    return probe, *count_workload(vlm.model, dense_architecture(vlm), probe, answer_tokens)


def make_plan(vlm: VLM, decisions: Decisions, options: CompressionOptions, record: CalibrationRecord | None = None) -> CompressionPlan:
    """The plan that records ``decisions`` and how they came about."""
    own = {WIDTH: ("neurons",), LOW_RANK: ("structure", "whitening", "shrinkage")}.get(str(options.ffn), ())
    names = ("heads", "ffn", "ffn_metric", "centred", *own, "allocation", "repair")
    method = {name: getattr(options, name) for name in names}
    if options.layers != NONE:  # whole layers leave nothing: no bias, and nothing to refit
        method = {"layers": options.layers, "centred": False, "repair": False}
    return CompressionPlan(
        library=__version__,
        model_type=dense_architecture(vlm).family.model_type,
        model_id=vlm.model_id,
        revision=vlm.revision,
        budget=options.budget,
        method=method,
        calibration=record,
        heads=decisions.heads,
        ffn=decisions.ffn,
    )


def apply_decisions(
    vlm: VLM, decisions: Decisions, options: CompressionOptions, statistics: Statistics, inputs: Sequence[PackedBatch],
    record: CalibrationRecord | None = None, progress: Progress = SILENT,
) -> VLM:  # fmt: skip
    """A cut copy of ``vlm``; for those who decide by other means than :func:`compress`."""
    target, plan = vlm.copy(), make_plan(vlm, decisions, options, record)
    cut_(target, plan, statistics, inputs, progress)
    return replace(target, plan=plan)


def cut_(vlm: VLM, plan: CompressionPlan, statistics: Statistics, inputs: Sequence[PackedBatch], progress: Progress) -> None:
    """Cut ``vlm`` in place, refitting layer by layer where the plan says so."""
    architecture = dense_architecture(vlm)
    if not plan.method.get("repair", True):
        with progress.task("cutting", len(plan.heads) + len(plan.ffn)) as advance:
            apply_(vlm.model, architecture, plan, statistics, progress=lambda: advance(1))
        return
    with progress.task("cutting and repairing", len(architecture.attention)) as advance:
        cut_and_repair_(
            vlm.model, architecture, plan, statistics, inputs, ffn_options(plan), progress=lambda: advance(1), notify=progress.note
        )


def checked_flops(cut: VLM, plan: CompressionPlan, probe: dict[str, torch.Tensor], workload: Workload, dense: Flops) -> Flops:
    """FLOPs counted on a cut model.

    Raises:
        PlanError: They are not what the plan predicts.
    """
    architecture = dense_architecture(cut)
    flops = count_flops(cut.model, architecture.family, probe, workload.answer_tokens)
    expected = predicted_flops(architecture, plan, workload, dense.total)
    if abs(flops.total - expected) > 0.005 * dense.total:
        raise PlanError(f"The compressed model takes {flops.total:,} FLOPs where the plan predicts {expected:,}; please report this.")
    return flops


def statistics_of(vlm: VLM, inputs: CalibrationBatches, needs: Needs, progress: Progress) -> Statistics:
    """Moments of a dense model over ``inputs``, and what else of ``needs`` is taken from them: all that cutting asks for."""
    architecture, recompute = dense_architecture(vlm), inputs.recompute
    with progress.task("calibrating", inputs.num_questions) as advance:
        found = calibrate(
            vlm.model, architecture, inputs, **needs.moments, recompute=recompute and needs.gradients, progress=advance
        )  # fmt: skip
    if needs.saliencies:
        with progress.task("gradients of weights", inputs.num_questions) as advance:
            for path, saliency in weight_saliencies(vlm.model, architecture, inputs, recompute=recompute, progress=advance).items():
                found.sites[path].saliency = saliency
    return found
