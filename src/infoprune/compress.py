"""The main verb: calibrate, decide, cut, recover; and its replay from a plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infoprune._version import __version__
from infoprune.architecture import Architecture
from infoprune.calibration_batches import CalibrationBatches
from infoprune.certification.run import compress_certified
from infoprune.data import Example
from infoprune.data.seen import digests
from infoprune.decide import decide
from infoprune.errors import BudgetError, InfoPruneError, PlanError
from infoprune.evaluation.cost import count_flops, num_parameters
from infoprune.evaluation.record import weights_digest
from infoprune.memory import release_memory
from infoprune.model import VLM, dense_architecture, precision_name
from infoprune.options import LOW_RANK, NONE, TRAINED, UNTRAINED, WIDTH, CompressionOptions
from infoprune.plan import CompressionPlan, FFNDecision
from infoprune.progress import SILENT, Clock, Progress
from infoprune.site_costs import FlopCosts
from infoprune.solve import solve_sites
from infoprune.speedup import Speed, cut_to_speed
from infoprune.steps import (
    Compressed,
    apply_decisions,
    calibrated,
    calibration_examples,
    calibration_record,
    checked_flops,
    cut_,
    example_pool,
    fingerprint,
    images_state,
    make_plan,
    measure,
    predicted_name,
    statistics_of,
)
from infoprune.surgery import ffn_options
from infoprune.trained_heads import Ground, train_heads
from infoprune.training.loop import Processes, check_trackers
from infoprune.training.options import TrainingOptions, read_by
from infoprune.training.recovery import RecoveryStage, require_peft
from infoprune.training.run import CUT, TrainingRun, split
from infoprune.training.sharding import check_sharding
from infoprune.training.state import WorkFolder

UNREAD = ("trackers", "checkpoint_every")  # options of training that change nothing in what comes out
UNUSED = 0.01  # of the dense FLOPs: what may be left of a budget without a word


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
        in_place: Cut ``vlm`` itself instead of a copy. Not with recovery, a certificate or a speed-up, which need the dense model.
        work: Folder for the state of training or certification, from which an interrupted run goes on; delete it afterwards. ``None``: no
            state is kept. Trackers' files go beside it: to ``small.logs`` for ``small.work``, to ``infoprune.logs`` for ``None``.
        progress: Shows the steps.

    Raises:
        BudgetError, DataError, CalibrationError, CertificateError, CheckpointError, UnsupportedModelError: See their messages;
            ``vlm`` is unchanged.
    """
    options, training = _options_of(options, training, given)
    dense_architecture(vlm)
    check_trackers(training.trackers)
    check_gated_ffns(options, training)
    if options.max_drop is not None:
        if training.recovery != "none":
            raise BudgetError(UNTRAINED)
        return compress_certified(vlm, data, options, work=work, progress=progress)
    clock = Clock()
    with ExitStack() as ending:
        run: TrainingRun | None = None
        pool = example_pool(vlm, data, progress, skip_bad=options.skip_bad)
        if options.heads == TRAINED or training.recovery != "none":
            run = _training_run(vlm, pool, data, options, training, work, progress, ending)
            pool = run.examples
        examples = calibration_examples(vlm, pool, options, progress)
        cut = run.saved_cut(vlm) if run else None
        if cut is None:
            cut = _cut_free(vlm, data, examples, options, run, in_place and training.recovery == "none", clock, progress)
            if run and training.recovery != "none":
                run.save_cut(cut.vlm, cut.as_dict())
        else:
            progress.note("found the cut model of an interrupted run; going on with its recovery")
            cut = _reloaded(vlm, cut, examples)
        seen = {"calibration": digests(examples)}
        if run is not None:
            seen |= {"training": digests(run.examples), "validation": digests(run.validation)}
        cut = replace(cut, vlm=replace(cut.vlm, seen=seen))
        if run is None:
            return cut
        cut = replace(cut, main_process=run.processes.index == 0, trained_with=run.told)
        if training.recovery == "none":
            return cut
        report = run.recover(cut.vlm, vlm, steps_before=training.gate_steps if options.heads == TRAINED else 0)
        seconds = cut.seconds | {"recover": report["seconds"]}  # with those of interrupted runs
        return replace(cut, training=cut.training | {"recovery": report}, seconds=seconds)


def check_gated_ffns(options: CompressionOptions, training: TrainingOptions) -> None:
    """Whether FFNs can have gates, where that is asked for.

    Raises:
        InfoPruneError: They can't; says what to change.
    """
    needed = {
        "heads": (options.heads == TRAINED, "heads=trained"),
        "ffn": (options.ffn != NONE, "ffn=low-rank or ffn=width"),
        "structure": (options.structure != "best", "structure=joint or separate"),
        "allocation": (options.allocation == "global", "allocation=global"),
    }
    for name, (met, wanted) in needed.items():
        if training.gate_ffn and not met:
            raise InfoPruneError(f"gate_ffn needs {wanted}, not {name}={getattr(options, name)}.")


def _options_of(
    options: CompressionOptions | None, training: TrainingOptions | None, given: dict[str, Any]
) -> tuple[CompressionOptions, TrainingOptions]:
    own = {f.name for f in fields(TrainingOptions)} & given.keys()
    for whole, names in ((options, given.keys() - own), (training, own)):
        if whole is not None and names:
            raise InfoPruneError(f"Give {type(whole).__name__} or its fields by keyword ({', '.join(sorted(names))}), not both.")
    training = training or TrainingOptions(**{name: given[name] for name in own})
    return options or CompressionOptions(**{name: value for name, value in given.items() if name not in own}), training


def _training_run(
    vlm: VLM, pool: list[Example], data: str | Sequence[Example], options: CompressionOptions, training: TrainingOptions,
    work: Path | None, progress: Progress, ending: ExitStack,
) -> TrainingRun:  # fmt: skip
    if training.recovery == "lora" or training.gate_lora:
        require_peft()
    if training.shard:
        check_sharding()
    if vlm.model.dtype != torch.float32:
        raise InfoPruneError(
            f"Training needs weights in float32, not {precision_name(vlm.model.dtype)}, in which small updates are lost. Load the model "
            "with dtype=torch.float32; precision='bf16' computes in bfloat16 all the same."
        )
    examples, validation = split(vlm.encoder, pool, training, options.seed, progress, skip_bad=options.skip_bad)
    processes = Processes.current(vlm.device, training.trackers, logs_folder(work), _hyperparameters(options, training))
    ending.callback(processes.end)
    if options.speedup is not None and processes.count > 1:
        raise BudgetError("A speed-up is measured in one process; several would each cut another model. Give flops instead.")
    folder = WorkFolder(work) if work is not None else None
    if folder is not None:
        if processes.index == 0:
            told = {
                "model": vlm.model_id,
                "weights": weights_digest(vlm.model),
                "images": images_state(examples + validation),
                "prompt": vlm.encoder.prompt("{question}"),
                "training questions": fingerprint(examples, people=True),
                "validation questions": fingerprint(validation, people=True),
                "library": __version__,
                "processes": processes.count,
            }
            settings = {name: value for name, value in asdict(training).items() if name not in UNREAD}
            assert not told.keys() & (settings | asdict(options)).keys()
            later = {name for name in settings if read_by(name) == "recovery"}
            if (folder.path / CUT).is_dir():
                later |= {"processes", *(name for name in settings if read_by(name) != "gate")}
            if differs := folder.claim(told | asdict(options) | settings, later, RecoveryStage.name):
                progress.note(f"other settings of recovery than in {folder.path} ({', '.join(differs)}): recovery starts anew")
            ending.enter_context(folder.held())
        processes.wait()
    run = TrainingRun(training, examples, validation, options.seed, processes, progress, folder)
    if options.heads == TRAINED:
        run.check_shares("gate_images_per_step")
    if training.recovery != "none":
        run.check_shares("images_per_step")
    return run


def logs_folder(work: Path | None) -> Path:
    """Where trackers write files: beside the work folder, which goes when the work is done; ``infoprune.logs`` without one."""
    return Path("infoprune.logs") if work is None else work.resolve().with_name(f"{work.resolve().name.removesuffix('.work')}.logs")


def _hyperparameters(options: CompressionOptions, training: TrainingOptions) -> dict[str, bool | int | float | str]:
    """All options that are set, for trackers, which take simple types only; lists as text."""
    found = {field.name: getattr(kind, field.name) for kind in (options, training) for field in fields(kind)}
    found = {name: ", ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in found.items()}
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str)}


def _reloaded(vlm: VLM, cut: tuple[VLM, dict[str, Any]], examples: Sequence[Example]) -> Compressed:
    found, report = cut
    probe, dense_flops, workload = measure(vlm, examples)
    flops = count_flops(found.model, dense_architecture(vlm).family, probe, workload.answer_tokens)
    target = replace(found, architecture=vlm.architecture, model_id=vlm.model_id, encoder=vlm.encoder)
    return Compressed(
        target, dense_flops, flops, workload, report[predicted_name(found.plan)], report["dense_parameters"], report["parameters"],
        report["seconds"], probe, report["training"], speed=Speed.from_dict(report["speedup"]) if "speedup" in report else None,
    )  # fmt: skip


def _cut_free(
    vlm: VLM, data: str | Sequence[Example], examples: list[Example], options: CompressionOptions, run: TrainingRun | None,
    in_place: bool, clock: Clock, progress: Progress,
) -> Compressed:  # fmt: skip
    """Calibrate, decide (heads by training, if the options say so), cut."""
    architecture = dense_architecture(vlm)
    statistics, inputs = calibrated(vlm, examples, options.needs, progress)
    clock.lap("calibrate")
    probe, dense_flops, workload = measure(vlm, examples)
    dense_parameters = num_parameters(vlm.model)
    num_sites = len(architecture.attention) + len(architecture.ffn)
    with progress.task("scoring heads and ranks", num_sites) as advance:
        solved = solve_sites(vlm.model, architecture, statistics, options, lambda: advance(1))
    record, report, speed = calibration_record(vlm, data, examples, options), {}, None
    if options.speedup is not None:
        cut = partial(apply_decisions, vlm, options=options, statistics=statistics, inputs=inputs, record=record, progress=progress)
        target, decisions, speed = cut_to_speed(vlm, solved, workload, probe, options, cut, progress)
    else:
        decisions = decide(solved, FlopCosts(workload), dense_flops.total, options)
        decisions = run.processes.same(decisions) if run else decisions
        clock.lap("decide")
        if run and options.heads == TRAINED:
            ground = Ground(vlm, solved, decisions, statistics, inputs, workload, dense_flops, probe, options)
            decisions, report["heads"] = train_heads(ground, run, clock)
            del ground
        del solved
        plan = make_plan(vlm, decisions, options, record)
        target = vlm if in_place else vlm.copy()
        cut_(target, plan, statistics, inputs, progress)
        if run:
            run.processes.same_weights_(target.model)
        target = replace(target, plan=plan)
    clock.lap("cut")
    assert target.plan is not None
    flops = checked_flops(target, target.plan, probe, workload, dense_flops)
    if options.flops is not None and flops.total < (options.flops - UNUSED) * dense_flops.total:
        progress.note(
            f"{flops.total / dense_flops.total:.3f} of the FLOPs remain where {options.flops:g} might: what is cut comes in larger "
            "pieces, or other options (attention_share, rank_multiple) forbid to keep more."
        )
    del statistics, inputs
    release_memory()
    return Compressed(
        target, dense_flops, flops, workload, decisions.predicted_loss, dense_parameters, num_parameters(target.model), clock.laps, probe,
        report, speed=speed,
    )  # fmt: skip


def _of_ffns(plan: CompressionPlan, architecture: Architecture) -> dict[str, Any]:
    """Options of what ``plan`` does to FFNs, as far as calibration reads them."""
    if not plan.ffn:
        return {"ffn": NONE}
    if any(decision.keep_neurons is not None for decision in plan.ffn.values()):
        return {"ffn": WIDTH}
    separate = any(site.gated and _separate(plan.ffn.get(site.path)) for site in architecture.ffn)
    own = ffn_options(plan)
    return {"ffn": LOW_RANK, "structure": "separate" if separate else "joint", "whitening": own.whitening, "shrinkage": own.shrinkage}


def apply_plan(
    vlm: VLM, plan: CompressionPlan, data: str | Sequence[Example] | None = None, *, skip_bad: bool = False, progress: Progress = SILENT
) -> VLM:
    """Cut ``vlm`` in place by an existing plan, calibrating on the data that the plan names unless ``data`` is given.

    ``skip_bad`` goes on without bad records, see :func:`infoprune.data.load_examples`.

    Raises:
        PlanError: The plan does not fit this model, or names no data and none was given.
    """
    architecture = dense_architecture(vlm)
    plan.check(architecture)
    record = plan.calibration
    source = data if data is not None else (record.data if record else None)
    if source is None or (isinstance(source, str) and source == "examples"):
        raise PlanError("The plan does not say which data to calibrate on; give it with --data.")
    recorded = {} if record is None else record.model_dump(include={"seed", "rare", "weighting", "temperature", "top_k"})
    options = CompressionOptions(
        flops=1.0,
        ffn_metric=ffn_options(plan).metric,
        **_of_ffns(plan, architecture),
        skip_bad=skip_bad,
        **({"examples": record.count} if record else {}),
        **recorded,
    )
    examples = calibration_examples(vlm, source, options, progress)
    if data is None and record is not None and fingerprint(examples) != record.fingerprint:
        progress.note(
            f"Warning: the questions drawn from {source} are not those that the plan was decided on (the data changed, or the plan's run "
            "had set images aside to validate or certify on); the weights will differ, and no certificate holds for them."
        )
    if record is not None and record.prompt_suffix != vlm.encoder.suffix:
        progress.note(f"Warning: the plan was decided on questions followed by {record.prompt_suffix!r}, not {vlm.encoder.suffix!r}.")
    inputs = CalibrationBatches(vlm, examples)
    cut_(vlm, plan, statistics_of(vlm, inputs, options.needs, progress), inputs, progress)
    # What stays is the plan's; where the weights come from is told anew.
    origin = {"model_id": vlm.model_id, "revision": vlm.revision, "library": __version__}
    plan = plan.model_copy(update=origin | {"calibration": calibration_record(vlm, source, examples, options)})
    return replace(vlm, plan=plan, seen={"calibration": digests(examples)})


def _separate(decision: FFNDecision | None) -> bool:
    """Whether gate or up has factors of its own."""
    return decision is not None and (decision.gate_rank is not None or decision.up_rank is not None)
