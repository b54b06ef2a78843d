"""``infoprune ask``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from infoprune.cli.console import BarProgress, console, plain, print_json


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("ask")(ask)


def ask(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, 'demo', or a hub id.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    against: Annotated[Optional[str], typer.Option(help="A second model to ask the same, side by side.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    prompt_suffix: Annotated[str, typer.Option(help="Appended to the question.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint ships.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the answers as JSON to standard output.")] = False,
) -> None:
    """Ask MODEL a QUESTION about an IMAGE."""
    from infoprune.data import Example
    from infoprune.errors import DataError
    from infoprune.evaluation.generation import generate_answers
    from infoprune.model import load

    if not question.strip():
        raise DataError("The question is empty.")
    example = Example(image, question.strip(), "")
    example.load_image()  # a bad path should fail before a model is loaded
    progress, answers = BarProgress(), []
    for name in (model, against):
        if name is not None:
            vlm = load(name, device=device, trust_remote_code=trust_remote_code, prompt_suffix=prompt_suffix, notify=progress.note)
            generate_answers(vlm, [example], max_new_tokens=1)  # warm up, so that the time below is the model's
            start = time.perf_counter()
            answer = generate_answers(vlm, [example], max_new_tokens=max_new_tokens)[0]
            answers.append({"model": name, "answer": answer, "milliseconds": 1000 * (time.perf_counter() - start)})
    if json_output:
        print_json({"question": question, "answers": answers})
        return
    table = Table(title=plain(question))
    for column in ("model", "answer", "time"):
        table.add_column(column, justify="right" if column == "time" else "left")
    for item in answers:
        table.add_row(plain(item["model"]), plain(item["answer"]), f"{item['milliseconds']:.0f} ms")
    console.print(table)
