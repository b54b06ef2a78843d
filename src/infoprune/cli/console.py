"""What all verbs print with: progress and errors to standard error, results to standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from infoprune.progress import Progress

# In a file or a pipe there is no width to fit into; 80 columns would cut module paths.
console = Console(width=None if sys.stdout.isatty() else 140)
error_console = Console(stderr=True)


class BarProgress(Progress):
    """Bars on a terminal; one line per step, and now and then its figures or the time left, where output is a file."""

    EVERY = 25  # parts between two lines of figures in a file
    SECONDS = 30  # between two lines without figures

    def __init__(self) -> None:
        self._show: Callable[[str], object] = lambda figures: None

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`infoprune.progress.Progress`."""
        if not error_console.is_terminal:
            error_console.print(f"{description} ({total})", highlight=False)
            done_so_far, started, told = 0, time.monotonic(), 0

            def count(done: int) -> None:
                nonlocal done_so_far, told
                done_so_far += done
                seconds = time.monotonic() - started
                if told is not None and seconds // self.SECONDS > told and 0 < done_so_far < total:
                    told = seconds // self.SECONDS
                    left = round(seconds * (total - done_so_far) / done_so_far / 60, 1)
                    error_console.print(f"  {done_so_far}/{total}  {left} min left", highlight=False)

            def line(figures: str) -> None:
                nonlocal told
                told = None  # figures are enough
                if (done_so_far + 1) % self.EVERY == 0:
                    error_console.print(f"  {done_so_far + 1}/{total}  {figures}", highlight=False, soft_wrap=True)

            self._show = line
            yield count
            return
        columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bars(*columns, TextColumn("{task.fields[figures]}"), console=error_console) as bars:
            task = bars.add_task(description, total=total, figures="")
            self._show = lambda figures: bars.update(task, figures=figures)
            yield lambda done: bars.update(task, advance=done)

    def status(self, values: dict[str, float]) -> None:
        """See :class:`infoprune.progress.Progress`."""
        self._show("  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def note(self, message: str) -> None:
        """See :class:`infoprune.progress.Progress`."""
        error_console.print(plain(message), highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def comparison_table(result: dict[str, Any]) -> Table:
    """Dense and compressed side by side, from :func:`infoprune.evaluation.runner.evaluate`."""
    records = result["models"]
    compared = result.get("comparison")
    table = Table(
        title=f"{records[0]['num_questions']:,} questions, {records[0]['flops']['answer_tokens']} answer tokens each",
        caption=f"answers {result['answers']} in {result['dtype']}, {_judge(records)}; prompt: {escape(repr(result['prompt']))}",
    )
    table.add_column("")
    for name in ("dense", "compressed") if compared else (records[0]["model"],):
        table.add_column(escape(name), justify="right")
    if compared:
        table.add_column("dense / compressed", justify="right")

    def row(label: str, values: list[float], form: Callable[[float], str], ratio: bool = True) -> None:
        cells = [form(value) for value in values]
        if compared:
            cells.append(f"{values[0] / values[1]:.2f}x" if ratio and values[1] else "")
        table.add_row(label, *cells)

    def accuracy(record: dict[str, Any]) -> str:
        low, high = record["accuracy_ci95"]
        return f"{record['accuracy']:.2f}% [{low:.1f}, {high:.1f}]"

    cells = [accuracy(record) for record in records]
    if compared:
        low, high = compared["drop_ci95"]
        cells.append(f"drop {compared['drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]")
    table.add_row("accuracy [95% interval]", *cells)
    if compared:
        bounds, test = compared["drop_bounds"], compared["mcnemar"]
        for name, label in (("betting", "betting"), ("empirical_bernstein", "empirical Bernstein"), ("bootstrap", "bootstrap")):
            table.add_row(f"drop at most, {100 * compared['confidence']:g}%: {label}", "", "", f"{bounds[name]:+.2f}")
        low, high = compared["agreement_ci95"]
        alone = (f"{test[name]:,}" for name in ("dense_only", "compressed_only"))
        table.add_row("right (score > 0.5) in this one alone", *alone, f"McNemar p {test['p_value']:.3g}")
        table.add_row("same answer [95% interval]", "", f"{compared['agreement']:.2f}% [{low:.1f}, {high:.1f}]", "")
        table.add_row("KL(dense || compressed)", "0", f"{compared['kl_nats']:.4f} nats", "")
    row("parameters", [r["params"] for r in records], lambda v: f"{v / 1e6:.1f} M")
    if all(r["bytes_on_disk"] for r in records):
        row("bytes on disk", [r["bytes_on_disk"] for r in records], lambda v: f"{v / 1e6:.0f} MB")
    for part in ("total", "vision_tower", "projector", "prefill", "decode_step", "lm_head"):
        row(f"FLOPs, {part.replace('_', ' ')}", [r["flops"][part] for r in records], lambda v: f"{v / 1e9:.3f} G")
    if "milliseconds" in records[0]:
        for part in records[0]["milliseconds"]:
            row(f"time, {part.replace('_', ' ')}", [r["milliseconds"][part]["median"] for r in records], lambda v: f"{v:.1f} ms")
    if result["peak_rss_gb"] is not None:
        table.add_row("peak memory, this process", f"{result['peak_rss_gb']:.2f} GB", *([""] * (len(table.columns) - 2)))
    return table


def _judge(records: list[dict[str, Any]]) -> str:
    metric = records[0]["metric"]["metric"] if "metric" in records[0] else "exact"
    return "exact match" if metric == "exact" else f"metric {metric}"


def plain(text: object) -> Text:
    """Text from elsewhere as it is: no markup, and no control characters, which a terminal would obey."""
    return Text("".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in str(text)))


def metric_table(records: list[dict[str, Any]]) -> Table:
    """What the metric of generated answers says, overall and by kind of question; names of kinds are data, never markup."""
    judged = [record["metric"] for record in records]
    table = Table(
        title=f"{judged[0]['metric']}, {judged[0]['num_questions']:,} questions", caption=" ".join(map(escape, judged[0]["notes"]))
    )
    for column in ("", *(("dense", "compressed") if len(records) > 1 else ("percent",)), "questions"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("overall", *(f"{found['overall']:.2f}" for found in judged), f"{judged[0]['num_questions']:,}")
    for name, value in judged[0]["further"].items():
        table.add_row(plain(name), *(f"{found['further'].get(name, value):.2f}" for found in judged), "")
    for name, groups in judged[0]["breakdown"].items():
        for kind, group in groups.items():
            cells = [f"{found['breakdown'][name][kind]['percent']:.2f}" for found in judged]
            table.add_row(plain(f"{name}: {kind}"), *cells, f"{group['count']:,}")
    return table


def changed_table(changed: list[dict[str, Any]], limit: int = 5) -> Table:
    """The worst of the questions that were answered differently; texts are data, never markup."""
    table = Table(title=f"{len(changed):,} answers changed" + (f"; the worst {limit}" if len(changed) > limit else ""))
    for column in ("image", "question", "reference", "dense", "compressed"):
        table.add_column(column, overflow="fold")
    table.add_column("KL, nats", justify="right")
    for item in changed[:limit]:
        texts = (Path(item["image"]).name, *(item[key] for key in ("question", "answer", "dense_answer", "compressed_answer")))
        table.add_row(*map(plain, texts), "" if item["kl_nats"] is None else f"{item['kl_nats']:.3f}")
    return table
