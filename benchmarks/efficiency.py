"""What compressing costs: time and peak memory of a whole process, loading and saving included, against loading the dense model.

python benchmarks/efficiency.py
"""

from __future__ import annotations

import tempfile

from common import log, write
from demo import worker

SHARES = (0.5, 0.31)


def main() -> None:
    dense = worker("dense")
    rows = [{"method": "dense", "peak_rss_gb": dense["peak"]}]
    with tempfile.TemporaryDirectory() as scratch:
        for share in SHARES:
            made = worker(str(share), f"{scratch}/{share}", "{}")
            rows.append({"method": "infoprune", "budget": share, "seconds_to_compress": made["seconds"], "peak_rss_gb": made["peak"],
                         "peak_over_dense": made["peak"] / dense["peak"]})  # fmt: skip
            log(f"{share}: {made['seconds']:.0f} s, {made['peak']:.2f} GB, {rows[-1]['peak_over_dense']:.2f} of the dense process")
    write("efficiency", rows, seeds=[0])


if __name__ == "__main__":
    main()
