"""Choice of defaults: variants of the training-free method, on validation images that neither the bridge nor calibration saw.

    python benchmarks/selection.py [--shares 0.5 0.31] [--variants default "temperature 2"]

Rows already in the result file are kept, so a stopped run goes on where it was; ``--fresh`` starts again.
"""

from __future__ import annotations

import argparse
import json
import time

import infoprune
from common import RESULTS, log, whole_images, write
from infoprune.evaluation import quality

SHARES = (0.5, 0.31)
VARIANTS = {
    "default": {},
    "without repair": {"repair": False},
    "temperature 2": {"temperature": 2.0},
    "uniform tokens": {"weighting": "uniform"},
    "128 questions": {"examples": 128},
    "floor 0.75": {"floor": 0.75},
}
QUESTIONS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "selection.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not args.fresh else []
    done = {(row["method"], row["budget"]) for row in rows}
    vlm = infoprune.load("demo", notify=log)
    examples = whole_images("validation", QUESTIONS)
    for share in args.shares:
        for name in args.variants:
            method = f"infoprune:{name}"
            if (method, share) in done:
                continue
            start = time.time()
            result = infoprune.compress(vlm, "easy-vqa:train", flops=share, **VARIANTS[name])
            seconds = time.time() - start
            dense, score = quality.score([vlm, result.vlm], examples)
            kept = {part: result.flops.as_dict()[part] / result.dense_flops.as_dict()[part] for part in ("vision_tower", "prefill")}
            rows.append({"method": method, "scope": "model", "recovered": False, "seed": 0, "budget": share,
                         "flops_ratio": result.flops_ratio, "kept": kept, "predicted_loss_nats": result.predicted_loss,
                         "seconds_to_compress": seconds, **quality.comparison(dense, score, examples)})  # fmt: skip
            log(f"{share} {name:24s} {score.accuracy:.2f}% KL {score.kl_nats:.4f} kept {kept}")
            write("selection", rows, seeds=[0], data="easy-vqa:validation", num_questions=len(examples))


if __name__ == "__main__":
    main()
