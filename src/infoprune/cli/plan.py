"""``infoprune plan show`` and ``infoprune plan apply``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from infoprune.certification.certificate import Certificate
from infoprune.cli.console import BarProgress, console, plain, print_json
from infoprune.plan import CompressionPlan

DROPPED = "nothing: dropped whole"


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    plan = typer.Typer(help="Look at a compression plan, or cut a model by it.", no_args_is_help=True)
    plan.command("show")(show)
    plan.command("apply")(apply)
    app.add_typer(plan, name="plan")


def show(
    plan: Annotated[Path, typer.Argument(help="A plan.json, or a compressed checkpoint folder.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan as JSON to standard output.")] = False,
) -> None:
    """Print what a plan keeps."""
    loaded = CompressionPlan.read(plan)
    if json_output:
        print_json(loaded.model_dump(mode="json"))
        return
    budget = ", ".join(f"{name}={value:g}" for name, value in loaded.budget.items()) or "none stated"
    table = Table(title=plain(f"{loaded.model_type} '{loaded.model_id}', budget {budget}"))
    table.add_column("site")
    table.add_column("keeps")
    for path, head in loaded.heads.items():
        kept = f"units {', '.join(map(str, head.keep_units))} of {head.num_units}"
        table.add_row(plain(path), kept if head.keep_units else DROPPED)
    for path, ffn in loaded.ffn.items():
        kept = ", ".join(f"{name.replace('_', ' ')} {rank}" for name, rank in ffn.ranks.items())
        if ffn.keep_neurons is not None:
            kept = f"{len(ffn.keep_neurons)} neurons of {ffn.num_neurons}" if ffn.keep_neurons else DROPPED
        table.add_row(plain(path), kept)
    console.print(table)
    if (certificate := Certificate.read(plan) if plan.is_dir() else None) is not None:
        console.print(plain(f"Certificate: {certificate.statement}"), highlight=False)


def apply(
    plan: Annotated[Path, typer.Argument(help="A plan.json, or a compressed checkpoint folder.")],
    model: Annotated[str, typer.Argument(help="The dense model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the compressed checkpoint.")],
    data: Annotated[Optional[str], typer.Option("--data", help="Calibration data; default: what the plan names.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without bad records of the data; they are counted.")] = False,
    prompt_suffix: Annotated[Optional[str], typer.Option(help="Appended to every question (default: what the plan names).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint ships.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty output folder.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON to standard output.")] = False,
) -> None:
    """Cut MODEL by PLAN; weights are solved again from calibration data."""
    import infoprune
    from infoprune.checkpoint import check_output_folder
    from infoprune.evaluation.cost import num_parameters, prompt_inputs
    from infoprune.steps import example_pool

    loaded = CompressionPlan.read(plan)
    output = check_output_folder(output, source=model, overwrite=overwrite)
    progress = BarProgress()
    recorded = loaded.calibration.prompt_suffix if loaded.calibration else ""
    vlm = infoprune.load(
        model, device=device, trust_remote_code=trust_remote_code, notify=progress.note,
        prompt_suffix=recorded if prompt_suffix is None else prompt_suffix,
    )  # fmt: skip
    before = num_parameters(vlm.model)
    cut = infoprune.apply_plan(vlm, loaded, data, skip_bad=skip_bad, progress=progress)
    source = data or (loaded.calibration.data if loaded.calibration else "")
    probe = prompt_inputs(cut.encoder, example_pool(vlm, source, progress, skip_bad=skip_bad)[0])
    probe = {name: value.to(cut.device) for name, value in probe.items()}
    infoprune.save(cut, output, probe=probe, dtype=vlm.stored, overwrite=overwrite, notify=progress.note)
    after = num_parameters(cut.model)
    if json_output:
        print_json({"output": str(output), "dense_parameters": before, "parameters": after})
    else:
        console.print(f"Saved to [bold]{escape(str(output))}[/]: {before / 1e6:.1f} M parameters became {after / 1e6:.1f} M.")
