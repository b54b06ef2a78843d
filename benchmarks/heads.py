"""Heads alone: our default against every other criterion, with compensation, at equal numbers of removed units.

    python benchmarks/heads.py

Language model: a quarter and a half of the key/value groups. Vision tower: half of the heads. Rankings are global, and a
block may lose all of its units (the first language block keeps one); random is the mean of five draws.
"""

from __future__ import annotations

import infoprune
from common import log, whole_images, write
from infoprune.architecture import TowerName
from infoprune.criteria.heads import CRITERIA, INFORMATION_LOSS, TAYLOR
from infoprune.decide import remove_units
from infoprune.evaluation import quality
from infoprune.options import CompressionOptions
from infoprune.saliency import weight_saliencies
from infoprune.solve import solve_sites
from infoprune.steps import apply_decisions, calibration_statistics

CASES: tuple[tuple[TowerName, float], ...] = (("text", 0.5), ("text", 0.25), ("vision", 0.5))
QUESTIONS = 200
AT_ONCE = 7
DRAWS = 5


def main() -> None:
    vlm = infoprune.load("demo", notify=log)
    assert vlm.architecture is not None
    examples = whole_images("test", QUESTIONS)
    needed = CompressionOptions(flops=1.0, heads=TAYLOR, ffn="none")
    statistics, inputs = calibration_statistics(vlm, "easy-vqa:train", needed)
    saliencies = weight_saliencies(vlm.model, vlm.architecture, inputs)
    for path, site in statistics.sites.items():
        site.saliency = saliencies[path]
    log("calibrated")
    rows = []
    for tower, share in CASES:
        units = sum(s.num_units for s in vlm.architecture.attention if s.tower == tower)
        count = round(share * units)
        for compensate in ("least-squares", "none"):
            names = [(c, seed) for c in CRITERIA for seed in (range(DRAWS) if c == "random" else (0,))]
            if compensate == "none":
                names = [(INFORMATION_LOSS, 0), ("random", 0)]
            for start in range(0, len(names), AT_ONCE):  # several on the same batches, so that the dense model runs once for all
                pruned = []
                for criterion, seed in names[start : start + AT_ONCE]:
                    options = CompressionOptions(
                        flops=1.0, heads=criterion, ffn="none", towers=(tower,), seed=seed, compensate=compensate, repair=False
                    )
                    decisions = remove_units(solve_sites(vlm.model, vlm.architecture, statistics, options), count, options)
                    pruned.append(apply_decisions(vlm, decisions, options, statistics, inputs))
                scored = quality.score([vlm, *pruned], examples)
                for (criterion, seed), score in zip(names[start : start + AT_ONCE], scored[1:], strict=True):
                    method = "infoprune" if criterion == INFORMATION_LOSS else criterion
                    rows.append({"method": method, "scope": "heads", "tower": tower, "share_removed": share, "units_removed": count,
                                 "compensated": compensate != "none", "recovered": False, "seed": seed,
                                 **quality.comparison(scored[0], score, examples)})  # fmt: skip
                    log(f"{tower} {share} {method:18s} {seed} {compensate} acc {score.accuracy:.2f} KL {score.kl_nats:.4f}")
            write("heads", rows, seeds=list(range(DRAWS)), data="easy-vqa:test", num_questions=len(examples))


if __name__ == "__main__":
    main()
