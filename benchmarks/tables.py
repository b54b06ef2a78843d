"""Write the tables of README and docs, and the curve's picture from ``benchmarks/results``.

    python benchmarks/tables.py [--check]

Tables stand between ``<!-- table:NAME -->`` and ``<!-- end -->``. With ``--check`` nothing is written and a stale table is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("vision", "prefill", "decode", "end_to_end")
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def source(name: str) -> str:
    meta = load(name)["meta"]
    versions = ", ".join(f"{key} {value}" for key, value in meta["versions"].items())
    return f"\n\n`{meta['command']}`, commit {meta['commit']}, {meta['date']}; {meta['hardware']}, {meta['threads']} threads; {versions}."


def demo() -> str:
    rows = []
    for row in load("demo")["rows"]:
        if row["method"] not in ("dense", "infoprune"):
            continue
        dense = row["method"] == "dense"
        times = row["milliseconds"]
        rows.append([
            "dense" if dense else f"`--flops {row['budget']:g}`",
            f"{row['flops_ratio']:.3f}",
            f"{row['params'] / 1e6:.1f} M",
            f"{row['accuracy']:.2f}%",
            "" if dense else f"{row['drop_points']:.2f} [{row['drop_ci95'][0]:.2f}, {row['drop_ci95'][1]:.2f}]",
            "" if dense else f"{row['kl_nats']:.4f}",
            *(f"{times[p]['median']:.1f}" + ("" if dense else f" ({row['speedup_' + p]:.2f}x)") for p in PARTS),
        ])  # fmt: skip
    header = [
        "",
        "FLOPs share",
        "parameters",
        "accuracy",
        "drop, points [95%]",
        "KL, nats",
        "vision, ms",
        "prefill, ms",
        "decode step, ms",
        "end to end, ms",
    ]
    return table(header, rows) + source("demo")


def ablation() -> str:
    rows = [row for row in load("demo")["rows"] if row.get("budget") in (0.5, 0.31)]
    rows.sort(key=lambda row: (-row["budget"], row["method"]))
    cells = []
    for r in rows:
        costs = [f"{r['seconds_to_compress']:.0f} s", f"{r['peak_rss_gb']:.2f} GB"]
        quality = [f"{r['accuracy']:.2f}%", f"{r['kl_nats']:.4f}", f"{r['predicted_loss_nats']:.2g}"]
        cells.append([f"`--flops {r['budget']:g}`", r["method"].partition(":")[2] or "default", *quality, *costs])
    header = ["", "method", "accuracy", "KL, nats per answer token", "predicted loss, nats per example", "time to compress", "peak memory"]
    return table(header, cells)


def cost() -> str:
    rows = load("demo")["rows"]
    cells = [["load the dense model, answer once", "", f"{rows[0]['peak_rss_gb']:.2f} GB", f"{rows[0]['bytes_on_disk'] / 1e6:.0f} MB"]]
    for row in rows[1:]:
        if row["method"] == "infoprune":
            cells.append([f"compress `--flops {row['budget']:g}`, save, reload, compare", f"{row['seconds_to_compress']:.0f} s",
                          f"{row['peak_rss_gb']:.2f} GB", f"{row['bytes_on_disk'] / 1e6:.0f} MB"])  # fmt: skip
    return table(["process", "time to compress", "peak memory", "weights on disk"], cells)


def ffn() -> str:
    rows = load("ffn")["rows"]
    shares = sorted({row["budget"] for row in rows}, reverse=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for method in methods:
        found = {row["budget"]: row for row in rows if row["method"] == method}
        cells.append(
            [method, *(f"{found[s]['accuracy']:.2f}%, {found[s]['kl_nats']:.4f} ({found[s]['kl_over_svd_llm']:.2f})" for s in shares)]
        )
    return table(["method", *(f"{s:g} of the FFN FLOPs" for s in shares)], cells) + source("ffn")


def heads() -> str:
    rows = [row for row in load("heads")["rows"] if row["compensated"]]
    cases = list(dict.fromkeys((row["tower"], row["share_removed"]) for row in rows))
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for case in cases:
            found = [r for r in rows if r["method"] == method and (r["tower"], r["share_removed"]) == case]
            kl = [r["kl_nats"] for r in found]
            spread = f" ({min(kl):.4f} to {max(kl):.4f})" if len(kl) > 1 else ""
            line.append(f"{sum(r['accuracy'] for r in found) / len(found):.1f}%, {sum(kl) / len(kl):.4f}{spread}")
        cells.append(line)
    return table(["criterion, compensated", *(f"{tower}: {share:.0%} removed" for tower, share in cases)], cells) + source("heads")


def tail() -> str:
    found = load("tail")
    return f"{len(found['rows'])} linears, worst relative difference {found['meta']['worst_relative_difference']:.1e}." + source("tail")


TABLES: dict[str, Callable[[], str]] = {"demo": demo, "ablation": ablation, "cost": cost, "ffn": ffn, "heads": heads, "tail": tail}

FILES = {"ablation": "demo", "cost": "demo"}  # tables that share a result file


def draw() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = load("demo")["rows"]
    curve = [row for row in rows if row["method"] in ("dense", "infoprune")]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shares = [row["flops_ratio"] for row in curve]
    left.plot(shares, [row["accuracy"] for row in curve], "o-", label="infoprune")
    for method in dict.fromkeys(row["method"] for row in rows if ":" in row["method"]):
        other = [row for row in rows if row["method"] == method]
        left.plot([r["flops_ratio"] for r in other], [r["accuracy"] for r in other], "s", mfc="none", label=method.partition(":")[2])
    left.set(xlabel="share of the dense FLOPs", ylabel="accuracy, % (easy-VQA test)")
    left.legend()
    for part in ("vision", "prefill", "end_to_end"):
        right.plot(shares, [row.get(f"speedup_{part}", 1.0) for row in curve], "o-", label=part.replace("_", " "))
    right.plot(shares, [1 / share for share in shares], "k:", label="1 / FLOPs share")
    right.set(xlabel="share of the dense FLOPs", ylabel="speed-up, CPU")
    right.legend()
    figure.savefig(ROOT / "docs" / "demo-curve.png", dpi=120)


def main() -> None:
    for document in DOCUMENTS:
        text = before = document.read_text()
        for name, make in TABLES.items():
            pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
            if pattern.search(text) and (RESULTS / f"{FILES.get(name, name)}.json").is_file():
                body = make()
                text = pattern.sub(lambda match, body=body: match.group(1) + body + "\n" + match.group(2), text)
        if "--check" in sys.argv[1:]:
            if text != before:
                sys.exit(f"{document.name}'s tables are stale: run `make tables`.")
        else:
            document.write_text(text)
    if "--check" not in sys.argv[1:]:
        draw()


if __name__ == "__main__":
    main()
