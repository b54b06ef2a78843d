"""Choice of defaults: variants of the training-free method on validation images that neither the bridge nor calibration saw.

    python benchmarks/selection.py [--scope model] [--shares 0.5 0.31] [--seeds 0] [--questions N] [--variants default "shrinkage 0"]

Each answers the validation questions, and others about altered images in words that calibration does not have (``shifted.VALIDATION``,
which shares neither with the test's shift). With the scope ``ffn`` heads stay, and shares are of the FFNs' FLOPs. Rows already in the
result file are kept, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
from typing import Any

import infoprune
from arena import Arena, Entry
from common import log
from infoprune.options import CompressionOptions
from shifted import VALIDATION

SHARES = (0.5, 0.31)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "low-rank": {"ffn": "low-rank"},
    "width": {"ffn": "width"},
    "shrinkage 0": {"shrinkage": 0.0},
    "shrinkage 0.1": {"shrinkage": 0.1},
    "shrinkage 0.5": {"shrinkage": 0.5},
    "floor 0.75": {"floor": 0.75},
    "without repair": {"repair": False},
    "uniform tokens": {"weighting": "uniform"},
    "temperature 2": {"temperature": 2.0},
    "128 questions": {"examples": 128},
    "384 questions": {"examples": 384},
    "1536 questions": {"examples": 1536},
    "rare images": {"rare": 0.1},
}
QUESTIONS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration sample")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of the task (default: 400; there are 1,961)")
    parser.add_argument("--scope", default="model", choices=["model", "ffn"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    arena = Arena(infoprune.load("demo", notify=log), args.questions, VALIDATION, "selection")
    part, heads = arena.shares_of()[args.scope], {"heads": "none"} if args.scope == "ffn" else {}
    wanted = [
        Entry(
            args.scope, f"infoprune:{name}", share, seed,
            CompressionOptions(flops=1 - (1 - share) * part, seed=seed, **heads, **VARIANTS[name]),
        )
        for seed in args.seeds
        for share in args.shares
        for name in args.variants
    ]  # fmt: skip
    arena.run(wanted, timed_seed=None)


if __name__ == "__main__":
    main()
