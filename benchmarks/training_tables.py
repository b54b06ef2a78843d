"""Tables of what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from result_tables import load, source, table

MANY = 10  # points
FORMS = {"accuracy": "{:.1f}%", "moved": "{:.0f}", "gate_seconds": "{:.0f}", "nats": "{:.2f}"}
ARMS = ("trained", "training-free", "random")
HEADS_OF = {"training-free": "training-free heads", "trained": "trained heads"}
START = "training-free heads by time"  # where what gates learned lost against what they start from, which --gate-cost time prices


def headline() -> str:
    rows = [r for r in load("headline")["rows"] if r.get("part") == "curve" and "error" not in r]
    rows.sort(key=lambda r: (-r["budget"], r["name"]))
    cells = []
    for r in rows:
        low, high = r["drop_ci95"]
        speed = [f"{r['speedup_' + part]:.2f}x" for part in ("prefill", "decode", "end_to_end")] if "speedup_prefill" in r else ["", "", ""]
        minutes = (sum(stage["seconds"] for stage in r["training"].values()) + r["seconds"].get("choose heads", 0)) / 60
        beyond = f"{r['beyond']['accuracy']:.1f}%, {r['beyond']['kl_nats']:.2f}" if "beyond" in r else ""
        cells.append([_name(r), f"{r['params'] / 1e6:.1f} M", f"{r['accuracy']:.2f}%",
                      f"{r['drop_points']:.2f} [{low:.2f}, {high:.2f}]", f"{r['kl_nats']:.4f}", beyond, *speed,
                      f"{minutes:.0f} min"])  # fmt: skip
    header = ["fewer FLOPs", "parameters", "accuracy", "drop, points [95%]", "KL, nats", "beyond the task: accuracy, KL"]
    dense = next((r["beyond"] for r in rows if "beyond" in r), None)
    told = "" if dense is None else (
        f"\n\nBeyond the task: {dense['num_questions']} questions in {len(dense['wordings'])} other ways to ask, about altered images "
        f"(`benchmarks/shifted.py`); the dense model answers {dense['dense_accuracy']:.1f}% of them. "
        f"Ways that lose more than {MANY} points: "
        + "; ".join(f"{_name(row)} {_lost(row)}" for row in rows if "beyond" in row) + "."
    )  # fmt: skip
    return table([*header, "prefill", "decode step", "end to end", "training"], cells) + told + source("headline")


def _name(row: dict[str, Any]) -> str:
    lost = row["training"].get("heads", {}).get("kept") == "start"
    return f"{1 / row['flops_ratio']:.2f}x, {START if lost else HEADS_OF[row['name']]}"


def _lost(row: dict[str, Any]) -> int:
    """Ways of asking in which many answers are lost."""
    return sum(dense - now > MANY for dense, now in row["beyond"]["wordings"].values())


def headline_ways() -> str:
    """Right answers of the curve's models by the way of asking."""
    rows = [r for r in load("headline")["rows"] if "beyond" in r]
    rows.sort(key=lambda r: (-r["budget"], r["name"]))
    ways = rows[0]["beyond"]["wordings"]
    cells = [
        [way.replace("{}", "…"), f"{dense:.0f}%", *(f"{row['beyond']['wordings'][way][1]:.0f}%" for row in rows)]
        for way, (dense, _) in ways.items()
    ]
    return table(["", "dense", *map(_name, rows)], cells) + source("headline")


def arms() -> str:
    """Models whose heads were trained, chosen training-free, or drawn, before and after the same recovery."""
    rows = sorted((r for r in load("arms")["rows"] if "error" not in r), key=lambda r: (-r["budget"], ARMS.index(r["name"]), r["seed"]))
    cells = []
    for (budget, name), found in _alike(rows):
        figures = [_spread(found, *key) for key in (("as_cut", "accuracy"), ("as_cut", "kl_nats"), ("accuracy",), ("kl_nats",))]
        cells.append([f"{1 / budget:.3g}x", name, str(len(found)), *figures])
    header = ["fewer FLOPs", "heads", "seeds", "as cut: accuracy", "KL, nats", "recovered: accuracy", "KL, nats"]
    dense = ", ".join(dict.fromkeys(f"{row['dense_accuracy']:.2f}%" for row in rows))
    questions = ", ".join(dict.fromkeys(f"{row['num_questions']:,}" for row in rows))
    kept = [row["training"]["heads"].get("kept", "trained") for row in rows if row["name"] == "trained"]
    text = f"\n\n{questions} test questions; dense {dense}. "
    text += f"In {kept.count('trained')} of {len(kept)} runs validation questions kept what gates learned, else what they started from."
    return table(header, cells) + text + source("arms")


def gates() -> str:
    """Cut models by what gates learned, with and without each part, on validation questions."""
    rows = load("gates")["rows"]
    cells = []
    for (budget, name), found in _alike(rows):
        gated = _spread([{"nats": min(r["gated_nats"].values())} for r in found], "nats") if "gated_nats" in found[0] else ""
        moved, seconds = (_spread(found, key) if key in found[0] else "" for key in ("moved", "gate_seconds"))
        figures = [_spread(found, kind, key) for kind in ("task", "beyond") for key in ("accuracy", "kl_nats")]
        cells.append([f"{1 / budget:.3g}x", name, str(len(found)), seconds, moved, gated, *figures])
    header = [
        "fewer FLOPs",
        "gates",
        "seeds",
        "seconds",
        "units moved",
        "gated model, nats",
        "cut: accuracy",
        "KL, nats",
        "beyond: accuracy",
        "KL, nats",
    ]
    kinds = {kind: {(row[kind]["num_questions"], round(row[kind]["dense_accuracy"], 1)) for row in rows} for kind in ("task", "beyond")}
    text = "; ".join(f"{kind}: {', '.join(f'{n:,} validation questions, dense {a}%' for n, a in sorted(v))}" for kind, v in kinds.items())
    return table(header, cells) + f"\n\n{text}." + source("gates")


def _alike(rows: list[dict[str, Any]]) -> list[tuple[tuple[float, str], list[dict[str, Any]]]]:
    """Rows with the same name and budget together, whatever their seeds."""
    keys = dict.fromkeys((row["budget"], row["name"]) for row in rows)
    return [(key, [row for row in rows if (row["budget"], row["name"]) == key]) for key in keys]


def _spread(rows: list[dict[str, Any]], *path: str) -> str:
    """Mean of a figure over rows, and its range."""
    values = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value[key]
        values.append(value)
    form = FORMS.get(path[-1], "{:.4f}")
    spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(sum(values) / len(values)) + spread


def training_speed() -> str:
    found = load("training_speed")
    meta = found["meta"]
    cells = [
        [r["method"].partition(":")[2], f"{r['questions_per_second']:.1f}", f"{r['flops_per_question'] / 1e9:.1f}",
         f"{r['bound_questions_per_second']:.0f}", f"{r['share_of_bound']:.0%}"]
        for r in found["rows"]
    ]  # fmt: skip
    packing = meta["packing_speedup"]
    text = (
        f"\n\nMatrix products of {meta['precision']} reach {meta['peak_flops'] / 1e12:.2f} TFLOP/s here. Packing the questions of an image "
    )
    text += f"into one row makes an update {packing['median']:.1f} times faster ({packing['min']:.1f} to {packing['max']:.1f})."
    header = ["stage", "questions a second", "GFLOPs a question", "bound, questions a second", "share of the bound"]
    return table(header, cells) + text + source("training_speed")


def ffn_gates() -> str:
    """Models cut by what gates on heads and FFNs learn, beside the training-free allocation, on validation questions."""
    found = load("ffn_gates")
    names = {"start": "training-free", "trained heads": "heads learned, FFNs allocated", "trained": "heads and FFN sizes learned"}
    cells = []
    for row in sorted(found["rows"], key=lambda row: (-row["budget"], row["ffn"], row["seed"])):
        for name, told in names.items():
            if name in row["cut"]:
                figures = row["cut"][name]
                kept = "kept" if row["kept"] == name else ""
                cells.append([f"`--flops {row['budget']:g}`", row["ffn"], str(row["seed"]), told, f"{figures['accuracy']:.1f}%",
                              f"{figures['cross_entropy']:.4f}", kept])  # fmt: skip
    text = f"\n\n{found['meta']['num_questions']} validation questions, on which the three were chosen between; no recovery."
    return table(["", "FFNs", "seed", "what is learned", "accuracy", "cross-entropy, nats", ""], cells) + text + source("ffn_gates")


TRAINING_TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "headline_ways": headline_ways,
    "arms": arms,
    "gates": gates,
    "training_speed": training_speed,
    "ffn_gates": ffn_gates,
}
