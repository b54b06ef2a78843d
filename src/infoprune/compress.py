"""The main verb: calibrate, decide, cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from infoprune._version import __version__
from infoprune.architecture import Architecture, AttentionSite
from infoprune.calibrate import Statistics, calibrate
from infoprune.certification.certificate import Certificate
from infoprune.data import Example, load_examples, subset
from infoprune.decide import Decisions, SolvedSite, attention_share, decide, solve_sites, unit_percentiles, with_units
from infoprune.errors import BudgetError, DataError, PlanError, UnsupportedModelError
from infoprune.evaluation.cost import (
    Flops,
    Workload,
    count_flops,
    count_workload,
    num_parameters,
    predicted_flops,
    prompt_inputs,
    typical_example,
)
from infoprune.evaluation.quality import can_share_prefix
from infoprune.memory import release_memory
from infoprune.model import VLM
from infoprune.options import TRAINED, UNTRAINED, CompressionOptions
from infoprune.packing import PackedBatch, answer_logits, batches
from infoprune.plan import CalibrationRecord, CompressionPlan
from infoprune.progress import SILENT, Clock, Progress
from infoprune.repair import cut_and_repair_
from infoprune.surgery import apply_, ffn_options
from infoprune.training.costs import flop_costs, time_costs
from infoprune.training.gates import HeadGates
from infoprune.training.heads import check_agreement, masked_logits
from infoprune.training.loop import Processes
from infoprune.training.options import TrainingOptions
from infoprune.training.run import LearnedHeads, TrainingRun, split
from infoprune.training.state import WorkFolder

QUESTIONS_PER_IMAGE = 3  # of calibration; see ``benchmarks/selection.py``
ROWS_PER_BATCH = 4  # bounds the memory of activations kept for the backward pass


@dataclass(frozen=True)
class Compressed:
    """Outcome of :func:`compress`.

    Attributes:
        vlm: The compressed model, with its plan.
        dense_flops, flops: Counted on the real models, before and after.
        workload: What they were counted over.
        predicted_loss: Second-order prediction of the information lost by the cut, in nats per example.
        dense_parameters, parameters: Before and after.
        seconds: Wall time by step.
        probe: Inputs of one example, to compare a saved checkpoint on.
        training: What gate training and recovery were like, by stage.
        main_process: False in all but one of several processes; that one saves.
        certificate: Of the accuracy that was kept, where ``max_drop`` asked for one.
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
            "predicted_loss_nats": self.predicted_loss,
            "dense_parameters": self.dense_parameters,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "training": self.training,
            **certified,
        }


def compress(
    vlm: VLM,
    data: str | Sequence[Example],
    *,
    options: CompressionOptions | None = None,
    training: TrainingOptions | None = None,
    in_place: bool = False,
    work: Path | None = None,
    progress: Progress = SILENT,
    **given: Any,
) -> Compressed:
    """Compress a vision-language model: training-free, or with trained heads and recovery where the options ask for them.

    Args:
        vlm: A dense model from :func:`infoprune.load`.
        data: Calibration and training data: a specification for :func:`infoprune.data.load_examples`, or examples. Never the test data.
        options: How; or give the fields of :class:`CompressionOptions` by keyword, e.g. ``flops=0.5``.
        training: How to train; or give the fields of :class:`TrainingOptions` by keyword, e.g. ``recovery="full"``.
        in_place: Cut ``vlm`` itself instead of a copy. Not with recovery or a certificate, which need the dense model.
        work: Folder for the state of training or certification, from which an interrupted run goes on; delete it afterwards. ``None``: no
            state is kept.
        progress: Shows the steps.

    Raises:
        BudgetError, DataError, CalibrationError, CertificateError, CheckpointError, UnsupportedModelError: See their messages;
            ``vlm`` is unchanged.
    """
    options, training = _options_of(options, training, given)
    _dense_architecture(vlm)
    if options.max_drop is not None:
        if training.recovery != "none":
            raise BudgetError(UNTRAINED)
        from infoprune.certification.run import compress_certified  # made of the functions below

        return compress_certified(vlm, data, options, work=work, progress=progress)
    clock = Clock()
    run: TrainingRun | None = None
    pool = example_pool(data, progress, skip_bad=options.skip_bad)
    if options.heads == TRAINED or training.recovery != "none":
        run = _training_run(vlm, pool, data, options, training, work, progress)
        pool = run.examples
    examples = subset(pool, options.examples, seed=options.seed, per_image=QUESTIONS_PER_IMAGE)
    cut = run.saved_cut() if run else None
    if cut is None:
        cut = _cut_free(vlm, data, examples, options, run, in_place and training.recovery == "none", clock, progress)
        if run and training.recovery != "none":
            run.save_cut(cut.vlm, cut.as_dict())
    else:
        progress.note("found the cut model of an interrupted run; going on with its recovery")
        cut = _reloaded(vlm, cut, examples)
    if run is None or training.recovery == "none":
        return cut
    report = run.recover(cut.vlm, vlm)
    clock.lap("recover")
    return replace(cut, training=cut.training | {"recovery": report}, seconds=cut.seconds | clock.laps)


def _options_of(
    options: CompressionOptions | None, training: TrainingOptions | None, given: dict[str, Any]
) -> tuple[CompressionOptions, TrainingOptions]:
    own = {f.name for f in fields(TrainingOptions)} & given.keys()
    training = training or TrainingOptions(**{name: given[name] for name in own})
    return options or CompressionOptions(**{name: value for name, value in given.items() if name not in own}), training


def _training_run(
    vlm: VLM, pool: list[Example], data: str | Sequence[Example], options: CompressionOptions, training: TrainingOptions,
    work: Path | None, progress: Progress,
) -> TrainingRun:  # fmt: skip
    examples, validation = split(pool, training, options.seed, progress, skip_bad=options.skip_bad)
    processes = Processes.current(vlm.device, training.trackers, str(work or "."))
    folder = WorkFolder(work) if work is not None else None
    if folder is not None:
        if processes.index == 0:
            told = {"model": vlm.model_id, "data": fingerprint(examples), "validation": fingerprint(validation), "library": __version__}
            folder.claim(told | asdict(options) | asdict(training) | {"processes": processes.count})
        processes.wait()
    return TrainingRun(training, examples, validation, options.seed, processes, progress, folder)


def _reloaded(vlm: VLM, cut: tuple[VLM, dict[str, Any]], examples: Sequence[Example]) -> Compressed:
    found, report = cut
    probe, dense_flops, workload = measure(vlm, examples)
    flops = count_flops(found.model, _dense_architecture(vlm).family, probe, workload.answer_tokens)
    target = replace(found, architecture=vlm.architecture, model_id=vlm.model_id, encoder=vlm.encoder)
    return Compressed(
        target, dense_flops, flops, workload, report["predicted_loss_nats"], report["dense_parameters"], report["parameters"],
        report["seconds"], probe, report["training"],
    )  # fmt: skip


def _cut_free(
    vlm: VLM, data: str | Sequence[Example], examples: list[Example], options: CompressionOptions, run: TrainingRun | None,
    in_place: bool, clock: Clock, progress: Progress,
) -> Compressed:  # fmt: skip
    """Calibrate, decide (heads by training, if the options say so), cut."""
    architecture = _dense_architecture(vlm)
    inputs = _batches(vlm, examples)
    statistics = _statistics(vlm, inputs, options, progress)
    clock.lap("calibrate")
    probe, dense_flops, workload = measure(vlm, examples)
    dense_parameters = num_parameters(vlm.model)
    num_sites = len(architecture.attention) + len(architecture.ffn)
    with progress.task("scoring heads and ranks", num_sites) as advance:
        solved = solve_sites(vlm.model, architecture, statistics, options, lambda: advance(1))
    decisions = decide(solved, architecture, workload, dense_flops.total, options)
    clock.lap("decide")
    target = vlm if in_place else vlm.copy()
    report: dict[str, Any] = {}
    if options.heads == TRAINED:
        assert run is not None
        learned = _learn_heads(target, solved, decisions, workload, probe, options, run)
        report["heads"] = learned.as_dict()
        clock.lap("train heads")
        if run.options.gate_lora:  # the weights have moved, and with them what calibration saw
            statistics = _statistics(target, inputs, options, progress)
            solved = solve_sites(target.model, architecture, statistics, options)
        decisions = decide(with_units(solved, learned.kept, options), architecture, workload, dense_flops.total, options)
        report["heads"]["agreement"] = _check_gates(target, solved, decisions, statistics, inputs, options)
    del solved
    plan = make_plan(vlm, decisions, options, calibration_record(data, examples, options))
    _cut(target, plan, statistics, inputs, progress)
    clock.lap("cut")
    flops = checked_flops(target, plan, probe, workload, dense_flops)
    del statistics, inputs
    release_memory()
    return Compressed(
        replace(target, plan=plan), dense_flops, flops, workload, decisions.predicted_loss,
        dense_parameters, num_parameters(target.model), clock.laps, probe, report, run is None or run.processes.index == 0,
    )  # fmt: skip


def _learn_heads(
    vlm: VLM, solved: list[SolvedSite], decisions: Decisions, workload: Workload, probe: dict[str, torch.Tensor],
    options: CompressionOptions, run: TrainingRun,
) -> LearnedHeads:  # fmt: skip
    """Gates start from the training-free choice under the same cost, by default with the share that the allocation gives attention."""
    blocks = {item.site.path: item.block for item in solved if item.block is not None}
    sites = [item.site for item in solved if isinstance(item.site, AttentionSite)]
    target = run.options.attention_share or attention_share(solved, decisions, workload)
    costs = flop_costs(sites, workload) if run.options.gate_cost == "flops" else run.agreed(time_costs(vlm.model, sites, probe))
    return run.learn_heads(vlm, sites, blocks, costs, target, unit_percentiles(solved, costs, target), compensated=options.compensate)


def _check_gates(
    vlm: VLM, solved: list[SolvedSite], decisions: Decisions, statistics: Statistics, inputs: Sequence[PackedBatch],
    options: CompressionOptions,
) -> float:  # fmt: skip
    """The gated model with gates at 0 and 1 answers like the model without those heads; see ``heads.check_agreement``."""
    blocks = {item.site.path: item.block for item in solved if item.block is not None}
    sites = [item.site for item in solved if isinstance(item.site, AttentionSite)]
    kept = {s.path: list(decisions.heads[s.path].keep_units) if s.path in decisions.heads else list(range(s.num_units)) for s in sites}
    masked = masked_logits(vlm.model, HeadGates(sites).to(vlm.device), blocks, kept, inputs[0], compensated=options.compensate)
    without = apply_decisions(vlm, replace(decisions, ffn={}), replace(options, repair=False), statistics, inputs[:1])
    with torch.no_grad():
        return check_agreement(masked, answer_logits(without.model, inputs[0]))


def measure(vlm: VLM, examples: Sequence[Example]) -> tuple[dict[str, torch.Tensor], Flops, Workload]:
    """A typical example's inputs, the FLOPs of answering it, and its workload."""
    example, answer_tokens = typical_example(vlm.encoder, examples)
    probe = {name: value.to(vlm.device) for name, value in prompt_inputs(vlm.encoder, example).items()}
    return probe, *count_workload(vlm.model, _dense_architecture(vlm), probe, answer_tokens)


def checked_flops(cut: VLM, plan: CompressionPlan, probe: dict[str, torch.Tensor], workload: Workload, dense: Flops) -> Flops:
    """FLOPs counted on a cut model.

    Raises:
        PlanError: They are not what the plan predicts.
    """
    architecture = _dense_architecture(cut)
    flops = count_flops(cut.model, architecture.family, probe, workload.answer_tokens)
    expected = predicted_flops(architecture, plan, workload, dense.total)
    if abs(flops.total - expected) > 0.005 * dense.total:
        raise PlanError(f"The compressed model takes {flops.total:,} FLOPs where the plan predicts {expected:,}; please report this.")
    return flops


def calibration_record(data: str | Sequence[Example], examples: Sequence[Example], options: CompressionOptions) -> CalibrationRecord:
    """Where the statistics of ``examples``, drawn from ``data``, came from."""
    return CalibrationRecord(
        data=data if isinstance(data, str) else "examples", count=len(examples), seed=options.seed, weighting=options.weighting,
        temperature=options.temperature, fingerprint=fingerprint(examples),
    )  # fmt: skip


def make_plan(vlm: VLM, decisions: Decisions, options: CompressionOptions, record: CalibrationRecord | None = None) -> CompressionPlan:
    """The plan that records ``decisions`` and how they came about."""
    method = ("heads", "ffn", "ffn_metric", "centred", "structure", "allocation", "repair")
    return CompressionPlan(
        library=__version__,
        model_type=_dense_architecture(vlm).family.model_type,
        model_id=vlm.model_id,
        revision=getattr(vlm.model.config, "_commit_hash", None),
        budget={name: value for name, value in (("flops", options.flops), ("ks", options.ks)) if value is not None},
        method={name: getattr(options, name) for name in method},
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
    _cut(target, plan, statistics, inputs, progress)
    return replace(target, plan=plan)


def apply_plan(
    vlm: VLM, plan: CompressionPlan, data: str | Sequence[Example] | None = None, *, skip_bad: bool = False, progress: Progress = SILENT
) -> VLM:
    """Cut ``vlm`` in place by an existing plan, calibrating on the data that the plan names unless ``data`` is given.

    ``skip_bad`` goes on without bad records, see :func:`infoprune.data.load_examples`.

    Raises:
        PlanError: The plan does not fit this model, or names no data and none was given.
    """
    architecture = _dense_architecture(vlm)
    plan.check(architecture)
    record = plan.calibration
    source = data if data is not None else (record.data if record else None)
    if source is None or (isinstance(source, str) and source == "examples"):
        raise PlanError("The plan does not say which data to calibrate on; give it with --data.")
    options = CompressionOptions(
        flops=1.0,
        ffn_metric=ffn_options(plan).metric,
        structure="separate" if any(d.gate_rank for d in plan.ffn.values()) else "joint",
        **(
            {"examples": record.count, "seed": record.seed, "weighting": record.weighting, "temperature": record.temperature}
            if record
            else {}
        ),
    )
    examples = calibration_examples(source, options.examples, options.seed, progress, skip_bad=skip_bad)
    inputs = _batches(vlm, examples)
    _cut(vlm, plan, _statistics(vlm, inputs, options, progress), inputs, progress)
    return replace(vlm, plan=plan)


def calibration_examples(
    data: str | Sequence[Example], count: int, seed: int, progress: Progress = SILENT, *, skip_bad: bool = False
) -> list[Example]:
    """The calibration sample: a few questions on each of as many images as that takes."""
    return subset(example_pool(data, progress, skip_bad=skip_bad), count, seed=seed, per_image=QUESTIONS_PER_IMAGE)


def example_pool(data: str | Sequence[Example], progress: Progress, *, skip_bad: bool = False) -> list[Example]:
    """All examples that ``data`` names."""
    pool = load_examples(data, default_split="train", skip_bad=skip_bad, notify=progress.note) if isinstance(data, str) else list(data)
    if not pool:
        raise DataError("There are no calibration examples.")
    return pool


def calibration_statistics(
    vlm: VLM, data: str | Sequence[Example], options: CompressionOptions, progress: Progress = SILENT
) -> tuple[Statistics, list[PackedBatch]]:
    """Moments of a dense model over the calibration sample, and the batches they came from."""
    inputs = _batches(vlm, calibration_examples(data, options.examples, options.seed, progress, skip_bad=options.skip_bad))
    return _statistics(vlm, inputs, options, progress), inputs


def fingerprint(examples: Sequence[Example]) -> str:
    """Digest of what was asked about which images (by file name), for the record."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.image.name}\0{example.question}\0{example.answer}\n".encode())
    return digest.hexdigest()[:16]


def _dense_architecture(vlm: VLM) -> Architecture:
    if vlm.architecture is None:
        raise UnsupportedModelError(
            f"'{vlm.model_id}' is already compressed. Compress the original model instead, with the smaller budget."
        )
    return vlm.architecture


def _batches(vlm: VLM, examples: Sequence[Example]) -> list[PackedBatch]:
    share = can_share_prefix(vlm)
    found = batches(vlm.encoder, examples, images_per_batch=ROWS_PER_BATCH, share_prefix=share)
    return [batch.to(vlm.device) for batch, _ in found]


def _statistics(vlm: VLM, inputs: Sequence[PackedBatch], options: CompressionOptions, progress: Progress) -> Statistics:
    with progress.task("calibrating", sum(batch.num_questions for batch in inputs)) as advance:
        return calibrate(
            vlm.model,
            _dense_architecture(vlm),
            inputs,
            weighting=options.weighting,
            gradients=options.needs_gradients,
            branches=options.structure != "joint" and options.ffn_metric == "task",
            temperature=options.temperature,
            seed=options.seed,
            progress=advance,
        )


def _cut(vlm: VLM, plan: CompressionPlan, statistics: Statistics, inputs: Sequence[PackedBatch], progress: Progress) -> None:
    architecture = _dense_architecture(vlm)
    if not plan.method.get("repair", True):
        with progress.task("cutting", len(plan.heads) + len(plan.ffn)) as advance:
            apply_(vlm.model, architecture, plan, statistics, progress=lambda: advance(1))
        return
    with progress.task("cutting and repairing", len(architecture.attention)) as advance:
        cut_and_repair_(vlm.model, architecture, plan, statistics, inputs, ffn_options(plan), progress=lambda: advance(1))
