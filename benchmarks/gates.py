"""How gates should start: what they keep after training against the training-free choice that they start from, on validation questions.

    python benchmarks/gates.py [--shares S ...] [--steps N]

For each share of the model's FLOPs, gates train down to the attention's share of it that the training-free allocation gives, with
locations that start at different distances and move at different rates. The figure is the data part of the objective (cross-entropy and
distillation, nats per answer token) of the dense model with gates at exactly 0 and 1, on questions of easy-VQA's validation split. No
test question is used: the defaults of ``TrainingOptions`` come from here.
"""

from __future__ import annotations

import argparse
from typing import Any

import infoprune
from common import log, write
from infoprune.architecture import AttentionSite
from infoprune.cli.console import BarProgress
from infoprune.decide import decide
from infoprune.learned import attention_share, unit_percentiles
from infoprune.options import CompressionOptions
from infoprune.progress import SILENT
from infoprune.site_costs import FlopCosts
from infoprune.solve import solve_sites
from infoprune.steps import calibration_statistics, measure
from infoprune.training.costs import flop_costs
from infoprune.training.loop import Processes
from infoprune.training.options import TrainingOptions
from infoprune.training.run import TrainingRun, split

SHARES = (1 / 3.2, 0.125)
VARIANTS: dict[str, dict[str, float]] = {
    "default": {},
    "close together": {"gate_prior": 6.0},
    "slower": {"gate_rate": 0.1},
    "close together, slower": {"gate_prior": 6.0, "gate_rate": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the dense model's FLOPs")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    assert dense.architecture is not None
    pool = infoprune.load_examples("easy-vqa:train")
    settings = {"gate_steps": args.steps, "evaluate_every": max(1, args.steps // 2), "validation": "easy-vqa:validation"}
    examples, validation = split(pool, TrainingOptions(**settings), 0, SILENT)
    statistics, _ = calibration_statistics(dense, examples, CompressionOptions(flops=0.5, heads="trained"), SILENT)
    log("calibrated")
    rows: list[dict[str, Any]] = []
    for share in args.shares:
        options = CompressionOptions(flops=share, heads="trained")
        _, dense_flops, workload = measure(dense, examples)
        solved = solve_sites(dense.model, dense.architecture, statistics, options)
        target = attention_share(solved, decide(solved, FlopCosts(workload), dense_flops.total, options), workload)
        sites = [item.site for item in solved if isinstance(item.site, AttentionSite)]
        blocks = {item.site.path: item.block for item in solved if item.block is not None}
        costs = flop_costs(sites, workload)
        percentiles = unit_percentiles(solved, costs, target)
        for name, variant in VARIANTS.items():
            training = TrainingOptions(**settings | variant)
            run = TrainingRun(training, examples, validation, 0, Processes(), BarProgress())
            learned = run.learn_heads(dense, sites, blocks, costs, target, percentiles, options.compensate)
            losses = learned.best.losses
            rows.append({
                "method": f"infoprune:{name}", "budget": share, "gate_prior": training.gate_prior, "gate_rate": training.gate_rate,
                "attention_share": target, "expected_share": learned.cost_share[0], "start_nats": losses[0], "end_nats": losses[args.steps],
                "kept_nats": learned.best.loss, "kept_of_step": learned.best.step, "seconds": learned.trained.seconds,
            })  # fmt: skip
            log(f"{share:.3f}, {name}: {losses}")
            write("gates", rows, seeds=[0], data="easy-vqa:validation", num_questions=len(validation), steps=args.steps)


if __name__ == "__main__":
    main()
