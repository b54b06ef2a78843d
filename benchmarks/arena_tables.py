"""Tables of the arena."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from result_tables import RESULTS, load, source, table

SCOPES = ("heads", "ffn", "model")
SHORT = (0.5, 0.31)  # shares of the short table


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
    """Accuracy and KL of every method at every share, over seeds; the least KL of a share is bold."""
    everything = load("arena")
    rows = [row for row in arena_rows() if row["scope"] == scope]
    shares = sorted({row["budget"] for row in rows}, reverse=True)
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["budget"]), []).append(row if data == "test" else row["shifted"])
    kl = {key: mean([r["kl_nats"] for r in own]) for key, own in found.items()}
    least = {share: min(value for (_, s), value in kl.items() if s == share) for share in shares}
    cells = []
    for method in methods_of(rows, scope):
        line = [f"**{method}**" if method == "infoprune" else method]
        line += [told(found[method, share], bold=kl[method, share] == least[share]) if (method, share) in found else "" for share in shares]
        cells.append(line)
    first = rows[0] if data == "test" else rows[0]["shifted"]
    cells.insert(0, ["dense", *[f"{first['accuracy'] + first['drop_points']:.1f}% / 0"] * len(shares)])
    meta = everything["meta"]
    asked = meta["num_questions"] if data == "test" else meta["num_shifted"]
    text = f"\n\nAccuracy / KL in nats per answer token, {asked:,} questions; {seeds_of(rows)}."
    return table(["method", *(f"{share:g}" for share in shares)], cells) + text + failures(scope) + source("arena", rows)


def told(rows: Sequence[dict[str, Any]], *, bold: bool = False) -> str:
    """Accuracy and KL, mean over seeds; of several the range of KL, too."""
    values = [row["kl_nats"] for row in rows]
    kl = f"**{mean(values):.4f}**" if bold else f"{mean(values):.4f}"
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{mean([row['accuracy'] for row in rows]):.1f}% / {kl}{spread}"


def seeds_of(rows: Iterable[dict[str, Any]]) -> str:
    """Which seeds the rows are of, and on how many questions they were calibrated."""
    rows = list(rows)
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    told = "seed 0" if seeds == "0" else f"where a range of KL is told, means over seeds {seeds}, else seed 0"
    counts = {count: sorted({row["method"] for row in rows if row["examples"] == count}) for count in {row["examples"] for row in rows}}
    if len(counts) == 1:
        return f"{told}; calibrated on {min(counts)} questions"
    usual = max(counts, key=lambda count: len(counts[count]))
    others = "; ".join(f"{', '.join(names)} on {count}" for count, names in counts.items() if count != usual)
    return f"{told}; calibrated on {usual} questions, but {others}"


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
    steps = " or ".join(str(count) for count in sorted({row["steps"] for row in rows}))
    asked = f"{rows[0]['num_questions']:,} questions of each kind"
    text = f"\n\nAccuracy / KL in nats per answer token, {asked}, {steps} steps; {seeds_of(rows)}."
    return table(header, cells) + text + source("arena", rows)


def arena_short() -> str:
    """The default beside the peers, whole models: accuracy on the task and beyond it, as cut and after recovery; a digest."""
    cells = []
    for method in (name for name in methods_of(arena_rows(), "model") if ":" not in name):
        line = [f"**{method}**" if method == "infoprune" else method]
        for recovered in (False, True):
            for share in SHORT:
                own = [r for r in arena_rows(recovered=recovered) if (r["scope"], r["method"], r["budget"]) == ("model", method, share)]
                both = [mean([row["accuracy"] for row in part]) for part in (own, [row["shifted"] for row in own]) if part]
                line.append(" / ".join(f"{value:.1f}%" for value in both))
        cells.append(line)
    return table(["method", *(f"{share:g}{state}" for state in ("", ", recovered") for share in SHORT)], cells)


def selection() -> str:
    """Variants of the training-free method on validation questions, over seeds: on the task and beyond it."""
    rows = [row for row in load("selection")["rows"] if "error" not in row]
    found: dict[tuple[bool, float, int, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["scope"] == "ffn", -row["budget"], row["num_questions"], variant_of(row))):
        found.setdefault((row["scope"] == "ffn", row["budget"], row["num_questions"], variant_of(row)), []).append(row)
    cells = []
    for (alone, share, questions, variant), own in found.items():
        what = f"FFNs alone, {share:g}" if alone else f"`--flops {share:g}`"
        other = [row["shifted"] for row in own]
        worst = [f"{100 * row['worst_image']:.0f}%" for row in own if "worst_image" in row]
        cells.append([what, variant, f"{questions:,}", told(own), ", ".join(worst), f"{other[0]['num_questions']:,}", told(other)])
    text = f"\n\nAccuracy / KL in nats per answer token, and the worst image's share of all KL, seed by seed; {seeds_of(rows)}."
    header = ["", "variant", "questions", "on the task", "worst image", "questions", "beyond the task"]
    return table(header, cells) + text + source("selection")


def variant_of(row: dict[str, Any]) -> str:
    """As the table calls it."""
    name, comma, rest = row["method"].partition(":")[2].partition(",")
    return {"low-rank": "low rank", "width": "fewer neurons", "shrinkage 0": "low rank, no shrinkage"}.get(name, name) + comma + rest


def rare() -> str:
    """Images with few massive tokens, and how many of them the spread of token energy finds."""
    found = load("rare")
    cells = [
        [f"at most {row['most']}", f"{row['images']}", f"{row['among_least_spread']} ({row['among_least_spread'] / row['images']:.0%})"]
        for row in found["rows"]
        if row["images"]
    ]
    meta = found["meta"]
    of = f"{meta['num_images']:,} images; behind layer {meta['layer']}, where the median image has {meta['median_massive']}"
    header = ["massive tokens", "images", "of them among as many of the least spread"]
    return table(header, cells) + f"\n\n{of} massive tokens." + source("rare")


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
ARENA_TABLES |= {
    "arena_short": arena_short,
    "arena_recovered": arena_recovered,
    "arena_cost": arena_cost,
    "selection": selection,
    "rare": rare,
}
