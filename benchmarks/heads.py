"""Heads alone: our default against every other criterion, with compensation, at equal numbers of removed units.

    python benchmarks/heads.py

Language model: a quarter and a half of the key/value groups. Vision tower: half of the heads. Rankings are global, at least one unit
stays per block; random is the mean of five draws.
"""

from __future__ import annotations

import numpy as np

import infoprune
from common import log, whole_images, write
from infoprune.compress import apply_decisions, calibration_statistics
from infoprune.criteria.heads import CRITERIA, INFORMATION_LOSS
from infoprune.decide import CompressionOptions, remove_units, solve_sites
from infoprune.evaluation import quality

CASES = (("text", 0.25), ("text", 0.5), ("vision", 0.5))
QUESTIONS = 600
DRAWS = 5


def main() -> None:
    vlm = infoprune.load("demo", notify=log)
    assert vlm.architecture is not None
    examples = whole_images("test", QUESTIONS)
    statistics, inputs = calibration_statistics(vlm, "easy-vqa:train", CompressionOptions(flops=1.0))
    log("calibrated")
    rows = []
    for tower, share in CASES:
        units = sum(s.num_units for s in vlm.architecture.attention if s.tower == tower)
        count = round(share * units)
        for compensate in (True, False):
            names = [(c, seed) for c in CRITERIA for seed in (range(DRAWS) if c == "random" else (0,))]
            if not compensate:
                names = [(INFORMATION_LOSS, 0), ("random", 0)]
            for criterion, seed in names:
                options = CompressionOptions(
                    flops=1.0, heads=criterion, ffn="none", towers=(tower,), seed=seed, compensate=compensate, repair=False
                )
                solved = solve_sites(vlm.model, vlm.architecture, statistics, options)
                decisions = remove_units(solved, count, options)
                pruned = apply_decisions(vlm, decisions, options, statistics, inputs)
                scored = quality.score([vlm, pruned], examples)
                method = "infoprune" if criterion == INFORMATION_LOSS else criterion
                rows.append({"method": method, "scope": "heads", "tower": tower, "share_removed": share, "units_removed": count,
                             "compensated": compensate, "recovered": False, "seed": seed,
                             **quality.comparison(scored[0], scored[1], examples)})  # fmt: skip
                log(f"{tower} {share} {method:18s} {seed} compensated={compensate} acc {scored[1].accuracy:.2f} KL {scored[1].kl_nats:.4f}")
            write("heads", rows, seeds=list(range(DRAWS)), data="easy-vqa:test", num_questions=len(examples))
        random = [
            r["kl_nats"]
            for r in rows
            if r["method"] == "random" and r["tower"] == tower and r["share_removed"] == share and r["compensated"]
        ]
        log(f"{tower} {share}: random mean {np.mean(random):.4f} sd {np.std(random):.4f}")


if __name__ == "__main__":
    main()
