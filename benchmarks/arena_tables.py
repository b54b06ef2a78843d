"""Tables of the arena, of real models' shapes and of compaction efficiency."""

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


def arena_rows() -> list[dict[str, Any]]:
    """Rows that did not fail and were not recovered."""
    rows = load("arena")["rows"] if (RESULTS / "arena.json").is_file() else []
    return [row for row in rows if "error" not in row and not row["recovered"]]


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


def scale() -> str:
    """What the factor means for published sizes."""
    cells = []
    for row in load("scale")["rows"]:
        speed = [f"{row[f'speedup_{part}']:.2f}x" for part in ("vision", "prefill", "decode")]
        parts = [f"{row['of_dense'][tower]:.0%}" for tower in ("vision", "text")]
        cells.append([
            row["model"], row["image"], row["cut"], f"{row['dense_flops'] / 1e12:.2f} T", *parts,
            f"{row['share_of_blocks']:.3f}", f"{row['largest_factor']:.0f}x",
            f"{row['weights_gb_dense']:.2f} to {row['weights_gb_compressed']:.2f} GB",
            f"{row['cache_kb_per_token_dense']:.0f} to {row['cache_kb_per_token_compressed']:.0f} kB", *speed,
        ])  # fmt: skip
    header = ["model", "image", "FFNs", "FLOPs", "in vision blocks", "in language blocks", "share each block keeps", "at most",
              "weights, 16 bits", "cache per token, 16 bits", "vision layers", "prefill layers", "decode layers"]  # fmt: skip
    return table(header, cells) + source("scale")


def efficiency() -> str:
    """Speed-up, share of FLOPs and their product."""
    cells = []
    for row in (r for r in load("efficiency")["rows"] if "parts" in r and r["method"] != "dense"):
        line = [f"{row['budget']:.3g}", row["cut"], row["engine"], str(row["batch"])]
        for part in ("vision", "prompt"):
            p = row["parts"][part]
            line += [f"{p['flops_ratio']:.3f}", f"{p['speedup']:.2f}x", f"{p['efficiency']:.2f}", f"{p['of_bound']:.0%}"]
        cells.append(line)
    header = ["share", "FFNs", "run by", "batch"]
    header += [f"{part}: {name}" for part in ("vision", "prompt") for name in ("FLOPs", "speed-up", "efficiency", "of peak")]
    return table(header, cells) + source("efficiency")


def decode() -> str:
    """One further token: time and bytes."""
    cells = []
    for row in (r for r in load("efficiency")["rows"] if r.get("part") == "decode"):
        read, time = row["bytes_read"], row["milliseconds"]["median"]
        cells.append([
            "dense" if row["method"] == "dense" else f"{row['budget']:.3g}, {row['cut']}",
            *(f"{read[name] / 1e6:.1f} MB" for name in ("layers", "head", "cache")), f"{time:.1f}", f"{row['speedup_decode']:.2f}x",
            f"{sum(read.values()) / time / 1e6:.1f} GB/s",
        ])  # fmt: skip
    return table(["", "layers", "language head", "cache", "ms per token", "speed-up", "read per time"], cells) + source("efficiency")


def compressing() -> str:
    """Stages of compression over what they can't do without."""
    cells = [
        [row["stage"], f"{row['seconds']:.1f} s", f"{row['bound_seconds']:.1f} s", f"{row['over_bound']:.2f}"]
        for row in load("compressing")["rows"]
    ]
    text = f"\n\n{load('compressing')['meta']['num_questions']} calibration questions."
    return table(["stage", "time", "bound", "time over bound"], cells) + text + source("compressing")


ARENA_TABLES: dict[str, Callable[[], str]] = {
    f"arena_{scope}_{data}": partial(arena, scope, data) for scope in SCOPES for data in ("test", "shifted")
}
ARENA_TABLES |= {"arena_cost": arena_cost, "scale": scale, "efficiency": efficiency, "decode": decode, "compressing": compressing}
