"""``infoprune compress``."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape
from rich.table import Table

from infoprune.cli.console import BarProgress, console, print_json
from infoprune.peers import PEERS, peer

if TYPE_CHECKING:
    import torch

    from infoprune.model import VLM
    from infoprune.options import CompressionOptions
    from infoprune.plan import CompressionPlan
    from infoprune.progress import Progress
    from infoprune.training.options import TrainingOptions

DEFAULT_DATA = "easy-vqa"
METHODS = f"The options of another method: {', '.join(PEERS)}. Options given beside it win."


# Options that are read with --max-drop alone.
CERTIFICATES = ("confidence", "shares", "certify", "certify_images", "certify_per_image", "certify_metric")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compress")(compress)


def compress(
    model: Annotated[Optional[str], typer.Argument(help="'demo', a checkpoint folder, or a hub id.")] = None,
    data: Annotated[
        Optional[str],
        typer.Option(
            "--data", help="Calibration data: NAME[:SPLIT]\\[@FOLDER or HUB-ID] or a .jsonl; NAME: easy-vqa (default), vqav2, textvqa, gqa."
        ),
    ] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder for the compressed checkpoint.")] = None,
    flops: Annotated[Optional[float], typer.Option(help="Share of the dense FLOPs that remains, e.g. 0.5.")] = None,
    speedup: Annotated[
        Optional[float],
        typer.Option(help="How many times faster from prompt to answer, measured on this machine, instead of --flops; e.g. 1.8."),
    ] = None,
    ks: Annotated[Optional[float], typer.Option(help="KS tolerance instead of a budget, e.g. 0.1.")] = None,
    max_drop: Annotated[
        Optional[float], typer.Option(help="Largest drop of accuracy in points, certified, instead of a budget, e.g. 0.5.")
    ] = None,
    confidence: Annotated[Optional[float], typer.Option(help="Of the certificate (default 0.95).")] = None,
    certify: Annotated[Optional[str], typer.Option(help="Data to certify on (default: images of --data kept out of calibration).")] = None,
    certify_images: Annotated[Optional[int], typer.Option(help="Images to certify on at most.")] = None,
    certify_per_image: Annotated[Optional[int], typer.Option(help="Questions on one image to certify on at most.")] = None,
    certify_metric: Annotated[
        Optional[str], typer.Option(help="exact, official or lmms-eval: what may drop (default: official for benchmarks, else exact).")
    ] = None,
    share: Annotated[
        Optional[list[float]], typer.Option(help="FLOPs shares to try with --max-drop, from mild to aggressive; repeatable.")
    ] = None,
    method: Annotated[Optional[str], typer.Option(help=METHODS)] = None,
    heads: Annotated[Optional[str], typer.Option(help="Head criterion, 'trained' or 'none'. Default: information-loss.")] = None,
    ffn: Annotated[
        Optional[str],
        typer.Option(help="'width' (fewer neurons; the default), 'low-rank' (the default where an option is about ranks) or 'none'."),
    ] = None,
    neurons: Annotated[
        Optional[str], typer.Option(help="Which neurons stay: energy (default), fluctuation, taylor, magnitude, random.")
    ] = None,
    layers: Annotated[
        Optional[str], typer.Option(help="'block-influence': drop whole layers, and cut nothing else. Default: none.")
    ] = None,
    towers: Annotated[Optional[list[str]], typer.Option(help="Towers to cut: vision, text; repeat for both (default).")] = None,
    compensate: Annotated[
        Optional[str], typer.Option(help="In the place of removed heads: 'least-squares' (default), 'mean' (into the bias) or 'none'.")
    ] = None,
    ffn_metric: Annotated[Optional[str], typer.Option(help="'task' (default: output gradients) or 'identity'.")] = None,
    structure: Annotated[Optional[str], typer.Option(help="Gate and up: 'joint' (default), 'separate' or 'best'.")] = None,
    centred: Annotated[
        Optional[bool], typer.Option("--centred/--no-centred", help="Factorise covariances, means into the biases (default: yes).")
    ] = None,
    whitening: Annotated[
        Optional[str], typer.Option(help="Moment of the FFNs' inputs: 'full' (default), 'diagonal' (mean magnitudes) or 'none'.")
    ] = None,
    shrinkage: Annotated[
        Optional[float], typer.Option(help="Of those moments towards equal energy everywhere: what other data may need (default 0.3).")
    ] = None,
    allocation: Annotated[
        Optional[str], typer.Option(help="Of the budget: 'global' (default: least loss), 'uniform', 'tolerance' or 'effective-rank'.")
    ] = None,
    top_k: Annotated[Optional[int], typer.Option(help="Take the Fisher information over the most probable tokens (default: all).")] = None,
    weighting: Annotated[Optional[str], typer.Option(help="Token weights in the moments: 'relevance' (default) or 'uniform'.")] = None,
    examples: Annotated[Optional[int], typer.Option(help="Calibration questions (default 768).")] = None,
    rare: Annotated[Optional[float], typer.Option(help="Share of them about images that a random sample lacks (default 0).")] = None,
    skip_bad: Annotated[Optional[bool], typer.Option("--skip-bad", help="Go on without bad records of the data; they are counted.")] = None,
    repair: Annotated[Optional[bool], typer.Option("--repair/--no-repair", help="Sequential least-squares repair (default: yes).")] = None,
    recovery: Annotated[Optional[str], typer.Option(help="Train after the cut: 'none' (default), 'lora' or 'full'.")] = None,
    gate_steps: Annotated[Optional[int], typer.Option(help="Updates of the gates, with --heads trained (default 100).")] = None,
    gate_cost: Annotated[Optional[str], typer.Option(help="What gates pay for: 'flops' (default) or 'time', measured here.")] = None,
    attention_share: Annotated[
        Optional[float], typer.Option(help="Share of the attention's cost that gates keep (default: as the training-free allocation).")
    ] = None,
    gate_ffn: Annotated[
        Optional[bool], typer.Option("--gate-ffn/--no-gate-ffn", help="Gate ranks or widths of FFNs along with the heads (default: no).")
    ] = None,
    recovery_steps: Annotated[Optional[int], typer.Option(help="Updates of recovery (default 200).")] = None,
    recovery_rate: Annotated[
        Optional[float], typer.Option(help="Peak learning rate of recovery (default: full 1e-3 of each tensor's magnitude, lora 1e-4).")
    ] = None,
    images_per_step: Annotated[
        Optional[int], typer.Option(help="Images of one update of recovery, with all their questions (default 8).")
    ] = None,
    validation: Annotated[
        Optional[str], typer.Option(help="Data to stop early on (default: one image in twenty of --data, kept out of training).")
    ] = None,
    patience: Annotated[Optional[int], typer.Option(help="Validations without gain before recovery stops (default 0: never).")] = None,
    precision: Annotated[Optional[str], typer.Option(help="Of training: 'fp32', 'bf16' or 'auto' (default).")] = None,
    weights: Annotated[
        Optional[str], typer.Option(help="Precision of the saved weights: fp32, bf16, fp16, or auto: the original's (default).")
    ] = None,
    shard: Annotated[
        Optional[bool], typer.Option("--shard/--no-shard", help="Spread the trained model over the processes. Never ran on GPUs so far.")
    ] = None,
    tracker: Annotated[
        Optional[list[str]],
        typer.Option(help="Experiment tracker: tensorboard (files go to OUTPUT.logs, beside the output), wandb, mlflow; repeatable."),
    ] = None,
    rank_multiple: Annotated[Optional[int], typer.Option(help="Ranks in multiples of this (default 8; 64 suits GPUs).")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of every draw (default 0).")] = None,
    recipe: Annotated[
        Optional[Path],
        typer.Option(help="YAML file with the same options (--share is shares, --tracker is trackers: lists); the command line wins."),
    ] = None,
    prompt_suffix: Annotated[Optional[str], typer.Option(help="Appended to every question.")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda or mps (default cpu).")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint ships.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty output folder.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON to standard output.")] = False,
) -> None:
    """Compress MODEL to a smaller, faster checkpoint that loads with from_pretrained."""
    import torch

    import infoprune
    from infoprune.checkpoint import check_output_folder
    from infoprune.cli.device import own_device
    from infoprune.cli.recipe import read_recipe
    from infoprune.errors import CheckpointError, InfoPruneError
    from infoprune.model import DEMO, named_precision
    from infoprune.options import BUDGETS, TRAINED, CompressionOptions
    from infoprune.progress import Progress
    from infoprune.training.loop import check_trackers
    from infoprune.training.options import TrainingOptions
    from infoprune.training.state import WorkFolder

    given: dict[str, Any] = {
        "model": model, "data": data, "output": output, "flops": flops, "speedup": speedup, "ks": ks, "max_drop": max_drop,
        "confidence": confidence, "certify": certify, "certify_images": certify_images, "certify_per_image": certify_per_image,
        "certify_metric": certify_metric,
        "shares": tuple(share) if share else None, "heads": heads, "ffn": ffn, "neurons": neurons, "layers": layers,
        "towers": tuple(towers) if towers else None, "ffn_metric": ffn_metric, "structure": structure, "weighting": weighting,
        "method": method, "compensate": compensate, "centred": centred, "whitening": whitening, "shrinkage": shrinkage,
        "allocation": allocation, "top_k": top_k, "examples": examples, "rare": rare, "repair": repair,
        "rank_multiple": rank_multiple, "seed": seed,
        "prompt_suffix": prompt_suffix,
        "device": device, "recovery": recovery, "gate_steps": gate_steps, "gate_cost": gate_cost,
        "attention_share": attention_share, "gate_ffn": gate_ffn, "recovery_steps": recovery_steps, "recovery_rate": recovery_rate,
        "images_per_step": images_per_step, "validation": validation, "patience": patience, "precision": precision, "weights": weights,
        "shard": shard,
        "trackers": tuple(tracker) if tracker else None, "skip_bad": skip_bad,
    }  # fmt: skip
    settings = read_recipe(recipe) if recipe else {}
    if any(given[name] is not None for name in BUDGETS):  # the command line's replaces the recipe's, whichever kind it is
        certified = () if given["max_drop"] is not None else CERTIFICATES
        settings = {key: value for key, value in settings.items() if key not in (*BUDGETS, *certified)}
    settings |= {key: value for key, value in given.items() if value is not None}
    if "method" in settings:
        settings = peer(settings.pop("method")).options | settings
    if not settings.get("model") or not settings.get("output"):
        raise InfoPruneError("Say which model to compress and where to: infoprune compress MODEL --flops 0.5 -o DIR (or in the recipe).")
    options = CompressionOptions(**_for(CompressionOptions, settings))
    training = TrainingOptions(**_for(TrainingOptions, settings))
    named = settings.get("weights", "auto")
    saved_precision = None if named == "auto" else named_precision(named)
    if options.max_drop is not None and saved_precision not in (None, torch.float32):
        raise InfoPruneError(f"A certificate is about weights in float32; they can't be saved in {named}. Leave out --weights.")
    _check_used(settings, options, training)
    check_trackers(training.trackers)
    target = check_output_folder(settings["output"], source=settings["model"], overwrite=overwrite)
    trains = options.heads == TRAINED or training.recovery != "none"
    # Of several processes one speaks, and does all where there is nothing to share; the launcher numbers them before anything else runs.
    first = os.environ.get("RANK", "0") == "0"
    if not (first or trains):
        return
    progress = BarProgress() if first else Progress()
    work = target.with_name(f"{target.name}.work") if trains or options.max_drop is not None else None
    if "data" not in settings and settings["model"] != DEMO:
        progress.note(
            f"Warning: there is no --data, so this calibrates on {DEFAULT_DATA}: drawn shapes. Give data like what the model is for."
        )
    vlm = infoprune.load(
        settings["model"], device=own_device(settings.get("device", "cpu")), trust_remote_code=trust_remote_code,
        prompt_suffix=settings.get("prompt_suffix", ""), notify=progress.note,
    )  # fmt: skip
    warn_of_little_room(target.parent, vlm, saved_precision, progress)
    result = infoprune.compress(
        vlm, settings.get("data", DEFAULT_DATA), options=options, training=training, in_place=True, work=work, progress=progress
    )
    if not result.main_process:
        return
    saved_as = saved_precision or vlm.stored
    if saved_as is not None and result.certificate is not None and saved_as != vlm.model.dtype:
        progress.note("the weights are saved in float32, in which they were certified, though the original's are not")
        saved_as = None
    report = result.as_dict()
    try:
        infoprune.save(
            result.vlm, target, probe=result.probe, extra=report, certificate=result.certificate, overwrite=overwrite,
            notify=progress.note, dtype=saved_as,
        )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_kept(result.vlm.plan, target, settings['model'], work)}".rstrip()) from error
    if work is not None:
        WorkFolder(work).discard()  # only now: until the checkpoint is in place, the work could still be lost
    if json_output:
        print_json(report | {"output": str(target)})
        return
    console.print(_summary(report))
    if result.certificate is not None:
        console.print(result.certificate.statement, style="bold", markup=False, highlight=False)
    saved = escape(str(target))
    console.print(f"Saved to [bold]{saved}[/]. It loads with `import infoprune` and AutoModelForImageTextToText.from_pretrained.")


def warn_of_little_room(folder: Path, vlm: VLM, precision: torch.dtype | None, progress: Progress) -> None:
    """A note where the disk has less room than the dense weights take; how much less the compressed ones take is not known yet."""
    size = (precision or vlm.stored or vlm.model.dtype).itemsize
    weights, free = size * sum(p.numel() for p in vlm.model.parameters()), shutil.disk_usage(folder).free
    if free < weights:
        progress.note(
            f"Warning: {folder} has {free / 1e9:.2f} GB left, and the dense model's weights take {weights / 1e9:.2f} GB; the checkpoint "
            "may not fit."
        )


def _kept(plan: CompressionPlan | None, target: Path, model: str, work: Path | None) -> str:
    """What is left of the work where the checkpoint could not be saved, in a sentence; the plan is written beside ``target``."""
    if work is not None:
        return f"The work so far is in {work}; the same command goes on from there."
    file = target.with_name(f"{target.name}.plan.json")
    try:
        assert plan is not None
        file.write_text(plan.to_json(), encoding="utf-8")
    except OSError:
        file.unlink(missing_ok=True)
        return ""
    again = shlex.join(["infoprune", "plan", "apply", str(file), model, "-o", str(target)])
    return f"What was decided is in {file}; `{again}` makes the checkpoint from it."


def _for(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in {field.name for field in fields(kind)}}


def _check_used(settings: dict[str, Any], options: CompressionOptions, training: TrainingOptions) -> None:
    """Raise where an option is given that nothing reads which was asked for: most likely another one was forgotten."""
    from infoprune.errors import InfoPruneError
    from infoprune.options import TRAINED
    from infoprune.training.options import read_by

    gates, recovers = options.heads == TRAINED, training.recovery != "none"
    kinds = {field.name: read_by(field.name) for field in fields(type(training))}
    cases = [
        (not gates, [name for name, kind in kinds.items() if kind == "gate"], "--heads trained"),
        (not recovers, [name for name, kind in kinds.items() if kind == "recovery" and name != "recovery"], "--recovery full or lora"),
        (not (gates or recovers), [name for name in kinds if name != "recovery"], "--recovery full or lora, or --heads trained"),
        (options.max_drop is None, ["confidence", "shares"], "--max-drop"),
    ]
    for unread, names, needed in cases:
        if unread and (found := [name for name in names if name in settings]):
            raise InfoPruneError(
                f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} read only with {needed}: add it, or leave out."
            )


def _summary(report: dict[str, Any]) -> Table:
    table = Table(title="compressed")
    for column in ("", "dense", "compressed", "share"):
        table.add_column(column, justify="left" if not column else "right")
    for part in ("total", "vision_tower", "projector", "prefill", "decode_step", "lm_head"):
        dense, now = report["dense_flops"][part], report["flops"][part]
        table.add_row(f"FLOPs, {part.replace('_', ' ')}", f"{dense / 1e9:.3f} G", f"{now / 1e9:.3f} G", f"{now / max(dense, 1):.3f}")
    dense, now = report["dense_parameters"], report["parameters"]
    table.add_row("parameters", f"{dense / 1e6:.1f} M", f"{now / 1e6:.1f} M", f"{now / dense:.3f}")
    if speed := report.get("speedup"):
        asked = f"asked {speed['asked']:.2f}x, predicted {speed['predicted']:.2f}x"
        dense, now = speed["dense_ms"], speed["compressed_ms"]
        table.add_row(f"end to end, {asked}", f"{dense:.1f} ms", f"{now:.1f} ms", f"{speed['measured']:.2f}x")
    if "predicted_loss_nats" in report:
        table.add_row("predicted loss", "", f"{report['predicted_loss_nats']:.4f} nats / example", "")
    table.add_row("seconds", "", " + ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items()), "")
    return table
