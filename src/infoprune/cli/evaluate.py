"""``infoprune evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from infoprune.cli.console import BarProgress, changed_table, comparison_table, console, print_json


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint folder, or any supported model.")],
    data: Annotated[str, typer.Option("--data", help="Evaluation data: 'easy-vqa' (test split), or a .jsonl file.")] = "easy-vqa",
    against: Annotated[Optional[str], typer.Option(help="The dense original, to compare with.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Use a random sample of this many questions.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of the one-sided bounds on the drop.")] = 0.95,
    report: Annotated[Optional[Path], typer.Option(help="Write a self-contained HTML page, with the questions that changed.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds; 0 skips timing.")] = 15,
    prompt_suffix: Annotated[str, typer.Option(help="Appended to every question.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint ships.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON to standard output.")] = False,
) -> None:
    """Accuracy, cost and time of MODEL, side by side with --against."""
    import infoprune
    from infoprune.data import subset
    from infoprune.evaluation.runner import evaluate as run
    from infoprune.model import load
    from infoprune.report.page import check_page, write_page

    if report is not None:
        check_page(report, against=against is not None)
    progress = BarProgress()
    examples = subset(infoprune.load_examples(data, default_split="test", notify=progress.note), limit, seed=seed)
    models = [
        load(name, device=device, trust_remote_code=trust_remote_code, prompt_suffix=prompt_suffix, notify=progress.note)
        for name in (model, against)
        if name is not None
    ]
    result = run(
        models[0],
        examples,
        against=models[1] if against is not None else None,
        timing=repeats > 0,
        repeats=max(repeats, 1),
        confidence=confidence,
        progress=progress,
    )
    if report is not None:
        write_page(result, report, model=model)
    if json_output:
        print_json(result)
        return
    console.print(comparison_table(result))
    if changed := result.get("comparison", {}).get("changed"):
        console.print(changed_table(changed))
