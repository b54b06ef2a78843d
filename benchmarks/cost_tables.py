"""Tables of what saved FLOPs are worth: real models' shapes, time over FLOPs, speed-ups asked for, the cost of compressing."""

from __future__ import annotations

from collections.abc import Callable

from result_tables import load, source, table


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


def speedup() -> str:
    """Speed-ups asked for, promised and found."""
    cells = []
    for row in load("speedup")["rows"]:
        first = row["attempts"][0]
        ratios = first["predicted"], first["measured"], row["measured"], row["speedup_end_to_end"], row["speedup_prefill"]
        asked, *found = (f"{ratio:.2f}x" for ratio in (row["asked"], *ratios))
        cells.append([asked, *found, str(len(row["attempts"])), f"{row['flops_ratio']:.3f}", f"{row['seconds']:.0f} s"])
    header = ["asked for", "first cut: predicted", "measured", "last cut", "all in turn", "prefill", "cuts", "FLOPs share", "took"]
    return table(header, cells) + source("speedup")


COST_TABLES: dict[str, Callable[[], str]] = {"scale": scale, "efficiency": efficiency, "decode": decode}
COST_TABLES |= {"compressing": compressing, "speedup": speedup}
