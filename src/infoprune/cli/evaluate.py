"""``infoprune evaluate``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from infoprune.cli.console import BarProgress, changed_table, comparison_table, console, metric_table, print_json

if TYPE_CHECKING:
    from infoprune.data import Example, Loaded


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint folder, or any supported model.")],
    data: Annotated[
        Optional[str],
        typer.Option(
            "--data", help="easy-vqa[:SPLIT] (default), a .jsonl file, or vqav2, textvqa, gqa as NAME[:SPLIT]\\[@FOLDER or HUB-ID]."
        ),
    ] = None,
    against: Annotated[Optional[str], typer.Option(help="The dense original, to compare with.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Use a random sample of this many questions.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without bad records of the data; they are counted.")] = False,
    ocr: Annotated[bool, typer.Option("--ocr", help="TextVQA: put the words that a reader found in the image into the prompt.")] = False,
    confidence: Annotated[float, typer.Option(help="Of the one-sided bounds on the drop.")] = 0.95,
    report: Annotated[Optional[Path], typer.Option(help="Write a self-contained HTML page, with the questions that changed.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds; 0 skips timing.")] = 15,
    generate: Annotated[bool, typer.Option("--generate", help="Judge generated answers instead of scoring the reference answers.")] = False,
    metric: Annotated[
        Optional[str], typer.Option(help="With --generate: official, lmms-eval or exact (default: official for benchmarks, else exact).")
    ] = None,
    answers: Annotated[
        Optional[Path], typer.Option(help="Keep answers or scores in this .jsonl file, and go on there after an interruption.")
    ] = None,
    results: Annotated[
        Optional[Path], typer.Option(help="With --generate: write a benchmark's result file, as its evaluation server takes it.")
    ] = None,
    max_new_tokens: Annotated[Optional[int], typer.Option(help="With --generate: the longest answer (default 16).")] = None,
    images_per_batch: Annotated[int, typer.Option(help="Whose questions are asked together; fewer take less memory.")] = 8,
    precision: Annotated[
        Optional[str], typer.Option(help="fp32, bf16, fp16, or auto: half on CUDA (default auto with --generate, else fp32).")
    ] = None,
    prompt_suffix: Annotated[str, typer.Option(help="Appended to every question, in place of all that a benchmark adds.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint ships.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON to standard output.")] = False,
) -> None:
    """Accuracy, cost and time of MODEL, side by side with --against."""
    # Of several processes one speaks, and does all where there is nothing to share; the launcher numbers them before anything else runs.
    first = os.environ.get("RANK", "0") == "0"
    if not (first or generate):
        return
    import torch

    from infoprune.certification.certificate import certificate_of
    from infoprune.cli.device import own_device
    from infoprune.data import load_counted, parse_spec, subset
    from infoprune.data.seen import seen_warnings
    from infoprune.errors import InfoPruneError
    from infoprune.evaluation.generation import MAX_NEW_TOKENS, dtype_for, generate_answers, longer_references
    from infoprune.evaluation.metrics import metric_for, score_answers
    from infoprune.evaluation.quality import settings_not_scored
    from infoprune.evaluation.results import check_results, write_results
    from infoprune.evaluation.runner import check_comparable
    from infoprune.evaluation.runner import evaluate as run
    from infoprune.fitting import fitting
    from infoprune.model import DEMO, check_device, load
    from infoprune.progress import Progress
    from infoprune.report.page import check_page, write_page
    from infoprune.steps import fingerprint
    from infoprune.training.loop import Processes

    _check_generate(generate, {"--results": results, "--metric": metric, "--max-new-tokens": max_new_tokens})
    _check_numbers(limit, confidence, answers, images_per_batch)
    if ocr and prompt_suffix:
        raise InfoPruneError("--prompt-suffix takes the place of all that a benchmark adds to questions, words by --ocr too: take one.")
    if report is not None:
        check_page(report, against=against is not None)
    progress = BarProgress() if first else Progress()
    if data is None and model != DEMO and against != DEMO:
        progress.note("Warning: there is no --data, so this asks about easy-VQA's drawn shapes. Give data like what the model is for.")
    data = "easy-vqa" if data is None else data
    device = own_device(device)
    check_device(device)
    processes = Processes.current(torch.device(device)) if generate else Processes()
    dtype = dtype_for(precision or ("auto" if generate else "fp32"), torch.device(device))
    spec = parse_spec(data)
    judge = metric_for(spec.name, metric)
    if results is not None:
        check_results(results, spec.name)
    loaded = load_counted(data, default_split="test", skip_bad=skip_bad, unanswered=results is not None, ocr=ocr, notify=progress.note)
    if generate and all(example.answered for example in loaded.examples):
        score_answers([""] * len(loaded.examples), loaded.examples, judge)  # refuses what it can't judge before any work is done
    models = [
        load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code, prompt_suffix=prompt_suffix, notify=progress.note)
        for name in (against, model)
        if name is not None
    ]
    if against is not None:
        check_comparable(models[1], models[0])
    for vlm in models:
        loaded = fitting(vlm.encoder, loaded, data, skip_bad=skip_bad, notify=progress.note)
    examples = subset(loaded.examples, limit, seed=seed)
    certificate, warnings = certificate_of(model, (example.image for example in examples))
    warnings += seen_warnings(models[-1].seen, (example.image for example in examples))
    for warning in warnings:
        progress.note(f"Warning: {warning}")
    generated = None
    if not generate and (ignored := settings_not_scored(models[-1])):
        progress.note(
            f"Warning: the checkpoint generates with {', '.join(ignored)}, which may change its answers; scoring takes the likeliest "
            "tokens as they are. --generate answers with these settings."
        )
    if generate:
        files = (_beside(answers, "against"), answers)[-len(models) :]
        sizes = {
            "max_new_tokens": MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
            "images_per_batch": images_per_batch,
        }
        told = {"processes": processes, "progress": progress}
        if count := longer_references(models[-1], examples, sizes["max_new_tokens"]):
            progress.note(
                f"Warning: the reference answers to {count:,} questions are longer than the {sizes['max_new_tokens']} tokens that are "
                "generated, so no answer can equal them. Raise --max-new-tokens."
            )
        generated = [generate_answers(vlm, examples, record=file, **sizes, **told) for vlm, file in zip(models, files, strict=True)]
    elif spec.benchmark is not None:
        progress.note("Scored by exact match with one reference answer; --generate gives the benchmark's own metric.")
    if processes.index:
        return
    if results is not None and generated is not None:
        write_results(results, generated[-1], examples, dataset=spec.name)
        progress.note(f"Wrote the answers to {len(examples):,} questions to {results}.{_incomplete(loaded, examples)}")
        if not all(example.answered for example in examples):
            lost = "" if report is None else f", and {report} is not written"
            progress.note(f"Questions without reference answers are among them, so nothing is judged here{lost}.")
            if json_output:
                print_json({"results": str(results), "num_questions": len(examples), "skipped": loaded.skipped})
            return
    result = run(
        models[-1], examples, against=models[0] if against is not None else None, answers=generated, metric=judge, timing=repeats > 0,
        repeats=max(repeats, 1), confidence=confidence, record=_beside(answers, "scores") if generate else answers,
        images_per_batch=images_per_batch, progress=progress,
    )  # fmt: skip
    result["skipped"], result["warnings"] = loaded.skipped, warnings
    sample = limit if len(examples) < len(loaded.examples) else None
    result["data"] = {"source": data, "sample": sample, "seed": seed, "ocr": ocr, "fingerprint": fingerprint(examples)}
    if json_output:
        print_json(result)
    else:
        console.print(comparison_table(result))
        if generated is not None:
            console.print(metric_table(result["models"]))
        if changed := result.get("comparison", {}).get("changed"):
            console.print(changed_table(changed))
    if report is not None:  # behind what is printed, which a full disk shall not take along
        write_page(result, report, certificate)


def _beside(answers: Path | None, what: str) -> Path | None:
    """The file for something else than the answers, called after theirs."""
    return answers and answers.with_name(f"{answers.stem}-{what}{answers.suffix}")


def _incomplete(loaded: Loaded, examples: Sequence[Example]) -> str:
    """What an evaluation server would miss, as a sentence to add."""
    missing = {"bad records skipped": loaded.skipped, "questions left out by --limit": len(loaded.examples) - len(examples)}
    told = "; ".join(f"{what}: {count:,}" for what, count in missing.items() if count)
    return f" Warning: it may be incomplete ({told}); evaluation servers want every question of a split." if told else ""


def _check_numbers(limit: int | None, confidence: float, answers: Path | None, images_per_batch: int) -> None:
    """Raise where a number, or the file of answers, can't be meant."""
    from infoprune.errors import InfoPruneError
    from infoprune.evaluation.certify import check_confidence

    check_confidence(confidence)
    if limit is not None and limit < 1:
        raise InfoPruneError(f"--limit must be at least 1, not {limit}.")
    if images_per_batch < 1:
        raise InfoPruneError(f"--images-per-batch must be at least 1, not {images_per_batch}.")
    if answers is not None and (not answers.name or answers.is_dir()):
        raise InfoPruneError(f"--answers must name a file, not '{answers}'.")


def _check_generate(generate: bool, given: Mapping[str, object]) -> None:
    """Raise where an option that is about generated answers comes without them."""
    from infoprune.errors import InfoPruneError

    if not generate and (named := [name for name, value in given.items() if value is not None]):
        raise InfoPruneError(f"{' and '.join(named)} {'is' if len(named) == 1 else 'are'} about generated answers; add --generate.")
