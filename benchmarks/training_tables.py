"""Tables of what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from result_tables import load, source, table

MANY = 10  # points
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
    return _groups("arms", "heads")


def terms() -> str:
    return _groups("terms", "objective")


def _groups(file: str, title: str) -> str:
    """Rows with the same name and budget together, whatever their seeds."""
    rows = [r for r in load(file)["rows"] if "error" not in r]
    cells = []
    for budget, name in dict.fromkeys((row["budget"], row["name"]) for row in rows):
        found = [row for row in rows if (row["budget"], row["name"]) == (budget, name)]
        line = [f"{1 / budget:.3g}x", name, str(len(found))]
        for key, form in (("accuracy", "{:.2f}%"), ("drop_points", "{:.2f}"), ("kl_nats", "{:.4f}")):
            values = [row[key] for row in found]
            spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
            line.append(form.format(sum(values) / len(values)) + spread)
        cells.append(line)
    questions = ", ".join(dict.fromkeys(f"{row['num_questions']:,}" for row in rows))
    header = ["fewer FLOPs", title, "seeds", "accuracy", "drop, points", "KL, nats"]
    return table(header, cells) + f"\n\n{questions} test questions." + source(file)


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
    "terms": terms,
    "training_speed": training_speed,
    "ffn_gates": ffn_gates,
}
