"""FFN alone: KL of our factorisation against SVD-LLM's input whitening at a uniform ratio, at equal FFN FLOPs, in one run.

    python benchmarks/ffn.py

The language model's FFNs only; statistics of the same calibration questions for all methods.
"""

from __future__ import annotations

import infoprune
from common import log, whole_images, write
from infoprune.decide import decide
from infoprune.evaluation import quality
from infoprune.evaluation.cost import ffn_flops
from infoprune.options import CompressionOptions
from infoprune.peers import PEERS
from infoprune.site_costs import FlopCosts
from infoprune.solve import solve_sites
from infoprune.steps import apply_decisions, calibration_statistics, measure

SHARES = (0.5, 0.3, 0.2)
SVD_LLM = PEERS["svd-llm"].options
METHODS = {
    "svd-llm": SVD_LLM,
    "infoprune:centred": SVD_LLM | {"centred": True},
    "infoprune:joint": SVD_LLM | {"centred": True, "structure": "joint"},
    "infoprune:task-metric": SVD_LLM | {"centred": True, "structure": "joint", "ffn_metric": "task"},
    "infoprune:relevance": {"allocation": "uniform", "repair": False, "shrinkage": 0.0},
    "infoprune:allocation": {"repair": False, "shrinkage": 0.0},
    "infoprune:repair": {"shrinkage": 0.0},
    "infoprune": {"ffn": "low-rank"},
}
QUESTIONS = 300


def main() -> None:
    vlm = infoprune.load("demo", notify=log)
    assert vlm.architecture is not None
    examples = whole_images("test", QUESTIONS)
    statistics = {}
    for weighting in ("uniform", "relevance"):
        statistics[weighting] = calibration_statistics(
            vlm, "easy-vqa:train", CompressionOptions(flops=1.0, weighting=weighting, structure="best")
        )
        log(f"calibrated, {weighting} weights")
    _, dense_flops, workload = measure(vlm, examples)
    ffn = sum(ffn_flops(site, None, workload) for site in vlm.architecture.ffn if site.tower == "text")
    rows = []
    for share in SHARES:
        budget = 1 - (1 - share) * ffn / dense_flops.total
        models, notes = [vlm], []
        for method, fields in METHODS.items():
            options = CompressionOptions(**({"flops": budget, "heads": "none", "towers": ("text",)} | fields))
            found, inputs = statistics[options.weighting]
            solved = solve_sites(vlm.model, vlm.architecture, found, options)
            decisions = decide(solved, FlopCosts(workload), dense_flops.total, options)
            models.append(apply_decisions(vlm, decisions, options, found, inputs))
            kept = sum(ffn_flops(s, decisions.ffn.get(s.path), workload) for s in vlm.architecture.ffn if s.tower == "text")
            notes.append((method, kept / ffn))
        log(f"share {share}: scoring")
        scored = quality.score(models, examples)
        for (method, kept), score in zip(notes, scored[1:], strict=True):
            rows.append({"method": method, "scope": "ffn", "recovered": False, "seed": 0, "budget": share, "ffn_flops_ratio": kept,
                         **quality.comparison(scored[0], score, examples)})  # fmt: skip
            baseline = next(r for r in rows if r["budget"] == share and r["method"] == "svd-llm")
            rows[-1]["kl_over_svd_llm"] = rows[-1]["kl_nats"] / baseline["kl_nats"]
            relative = rows[-1]["kl_over_svd_llm"]
            log(f"{share} {method:24s} kept {kept:.3f} acc {score.accuracy:.2f} KL {score.kl_nats:.4f} = {relative:.2f} of SVD-LLM")
        write("ffn", rows, seeds=[0], data="easy-vqa:test", num_questions=len(examples))


if __name__ == "__main__":
    main()
