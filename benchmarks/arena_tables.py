"""Tables of the arena."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from result_tables import RESULTS, load, source, table

SCOPES = ("heads", "ffn", "model")


def mean(values: Sequence[float]) -> float:
    """Over seeds."""
    return statistics.fmean(values)


def arena_rows(*, recovered: bool = False) -> list[dict[str, Any]]:
    """Rows that did not fail, before recovery or after it."""
    rows = load("arena")["rows"] if (RESULTS / "arena.json").is_file() else []
    return [row for row in rows if "error" not in row and row["recovered"] == recovered]


def methods_of(rows: Iterable[dict[str, Any]], scope: str) -> list[str]:
    """Ours first, then its variants, then the peers."""
    found = list(dict.fromkeys(row["method"] for row in rows if row["scope"] == scope))
    return sorted(found, key=lambda name: (name != "infoprune", not name.startswith("infoprune"), name))


def arena(scope: str, data: str) -> str:
    """Accuracy and KL of every method at every share, mean over seeds; the least KL of a share is bold."""
    everything = load("arena")
    rows = [row for row in arena_rows() if row["scope"] == scope]
    shares = sorted({row["budget"] for row in rows}, reverse=True)
    found: dict[tuple[str, float], tuple[float, float]] = {}
    for method in methods_of(rows, scope):
        for share in shares:
            own = [r if data == "test" else r["shifted"] for r in rows if r["method"] == method and r["budget"] == share]
            if own:
                found[method, share] = mean([r["accuracy"] for r in own]), mean([r["kl_nats"] for r in own])
    least = {share: min(kl for (_, s), (_, kl) in found.items() if s == share) for share in shares}
    cells = []
    for method in methods_of(rows, scope):
        line = [f"**{method}**" if method == "infoprune" else method]
        for share in shares:
            if (method, share) not in found:
                line.append("")
                continue
            accuracy, kl = found[method, share]
            line.append(f"{accuracy:.1f}% / " + (f"**{kl:.4f}**" if kl == least[share] else f"{kl:.4f}"))
        cells.append(line)
    first = rows[0] if data == "test" else rows[0]["shifted"]
    cells.insert(0, ["dense", *[f"{first['accuracy'] + first['drop_points']:.1f}% / 0"] * len(shares)])
    seeds = {row["seed"] for row in rows}
    meta = everything["meta"]
    asked = meta["num_questions"] if data == "test" else meta["num_shifted"]
    text = f"\n\nAccuracy / KL in nats per answer token, {asked:,} questions, seeds {', '.join(map(str, sorted(seeds)))}."
    return table(["method", *(f"{share:g}" for share in shares)], cells) + text + failures(scope) + source("arena", rows)


def arena_recovered() -> str:
    """Whole models after one recovery, at every share: on the task and beyond it."""
    rows = arena_rows(recovered=True)
    shares = sorted({row["budget"] for row in rows}, reverse=True)
    cells = []
    for method in methods_of(rows, "model"):
        line = [f"**{method}**" if method == "infoprune" else method]
        for share in shares:
            own = [row for row in rows if (row["method"], row["budget"], row["scope"]) == (method, share, "model")]
            line += [told([pick(row) for row in own]) if own else "" for pick in (lambda r: r, lambda r: r["shifted"])]
        cells.append(line)
    header = ["method", *(f"{share:g}{data}" for share in shares for data in ("", ", beyond the task"))]
    steps, seeds = sorted({row["steps"] for row in rows}), sorted({row["seed"] for row in rows})
    text = f"\n\nAccuracy / KL in nats per answer token, {' or '.join(map(str, steps))} steps, seeds {', '.join(map(str, seeds))}."
    return table(header, cells) + text + source("arena", rows)


def told(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy and KL, mean over seeds."""
    return f"{mean([r['accuracy'] for r in rows]):.1f}% / {mean([r['kl_nats'] for r in rows]):.4f}"


def failures(scope: str) -> str:
    """What could not be made, and why."""
    failed = [row for row in load("arena")["rows"] if row["scope"] == scope and "error" in row]
    told = dict.fromkeys(f"{row['method']} at {row['budget']:g}" for row in failed)
    return f" Out of reach: {', '.join(told)}." if told else ""


def arena_cost(share: float = 0.5) -> str:
    """What the models of the scope ``model`` cost at one share."""
    rows = [row for row in arena_rows() if row["scope"] == "model" and row["budget"] == share and "speedup_prefill" in row]
    cells = []
    for row in sorted(rows, key=lambda r: methods_of(rows, "model").index(r["method"])):
        seconds = row["seconds"]
        cells.append([
            row["method"], f"{row['flops_ratio']:.3f}", f"{row['bytes'] / 1e6:.0f} MB",
            *(f"{row['speedup_' + part]:.2f}x" for part in ("vision", "prefill", "decode", "end_to_end")),
            f"{seconds['calibrate']:.0f} s", f"{seconds['decide'] + seconds['cut']:.0f} s",
        ])  # fmt: skip
    header = ["method", "FLOPs share", "weights", "vision", "prefill", "decode step", "end to end", "calibrate", "decide and cut"]
    return table(header, cells) + source("arena", rows)


ARENA_TABLES: dict[str, Callable[[], str]] = {
    f"arena_{scope}_{data}": partial(arena, scope, data) for scope in SCOPES for data in ("test", "shifted")
}
ARENA_TABLES |= {"arena_recovered": arena_recovered, "arena_cost": arena_cost}
