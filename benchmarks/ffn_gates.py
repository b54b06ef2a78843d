"""Gates on FFN sizes along with the heads': the models cut by what they learn, beside the training-free allocation they start from.

    python benchmarks/ffn_gates.py [--shares S ...] [--steps N] [--seeds N ...] [--ffn width]

One compression with ``heads=trained`` and ``gate_ffn`` per share and seed; its report has all that is told here: cross-entropy of the
dense model with gates at 0 and 1 over training, and accuracy and cross-entropy of the three models that are cut and refitted, with the
sizes learned, with those that the learned heads are allocated, and with all of the start's. Questions are of easy-VQA's validation
split, the same on which the three are chosen between; no test question is used.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import infoprune
from common import RESULTS, command, commit, log, write
from infoprune.cli.console import BarProgress

SHARES = (0.5, 0.31)
VALIDATION = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the dense model's FLOPs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ffn", default="low-rank", choices=["low-rank", "width"], help="whose sizes are learned")
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    path = RESULTS / "ffn_gates.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for seed, share in ((seed, share) for seed in args.seeds for share in args.shares):
        if any((row["budget"], row["seed"], row["steps"], row["ffn"]) == (share, seed, args.steps, args.ffn) for row in rows):
            continue
        result = infoprune.compress(
            dense, "easy-vqa:train", flops=share, seed=seed, heads="trained", ffn=args.ffn, gate_ffn=True, gate_steps=args.steps,
            evaluate_every=max(args.steps // 4, 1), validation="easy-vqa:validation", validation_questions=VALIDATION,
            progress=BarProgress(),
        )  # fmt: skip
        report = result.training["heads"]
        plan = result.vlm.plan
        assert plan is not None
        rows.append({
            "budget": share, "seed": seed, "steps": args.steps, "ffn": plan.method["ffn"], "flops_ratio": result.flops_ratio,
            "cut": report["cut"], "kept": report["kept"], "masked_nats": report["validation"], "kept_of_step": report["kept_of_step"],
            "cost_share": report["cost_share"], "target_share": report["target_share"], "agreement": report["agreement"],
            "seconds": result.seconds, "sizes": report["sizes"], "commit": commit(), "command": command(),
        })  # fmt: skip
        log(f"{share:g}, seed {seed}: {report['cut']}, masked {report['validation']}")
        write("ffn_gates", rows, seeds=sorted({row["seed"] for row in rows}), data="easy-vqa:validation", num_questions=VALIDATION)


if __name__ == "__main__":
    main()
