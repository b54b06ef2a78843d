"""Training-free curve of the demo model: accuracy on easy-VQA's whole test split, KL, FLOPs, times, cost of compressing.

    python benchmarks/demo.py [--shares S ...]

With some shares alone, the result file keeps its rows of others, each with its commit; speed-ups are within a run.
Calibration draws from the training split; the test split is used here and nowhere before.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import infoprune
from common import RESULTS, command, commit, log, processor, whole_images, write
from infoprune.evaluation import latency, quality
from infoprune.evaluation.cost import prompt_inputs
from infoprune.evaluation.runner import bytes_on_disk
from infoprune.resolve import family_of

SHARES = (0.75, 0.6, 0.5, 0.4, 0.31)

# Runs in a process of its own, so that its peak memory is its own.
WORKER = """
import json, resource, sys, time
start = time.time()
import infoprune
vlm = infoprune.load("demo")
loaded = time.time()
if sys.argv[1] == "dense":
    from infoprune.evaluation.generation import generate_answers
    generate_answers(vlm, infoprune.load_examples("easy-vqa:test")[:1])
else:
    result = infoprune.compress(vlm, "easy-vqa:train", flops=float(sys.argv[1]), in_place=True)
    seconds = time.time() - loaded
    infoprune.save(result.vlm, sys.argv[2], probe=result.probe, extra=result.as_dict())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
print(json.dumps({"peak": peak, "seconds": 0 if sys.argv[1] == "dense" else seconds}))
"""


def worker(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=None, help="test questions (default: all 9,673)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    args = parser.parse_args()

    examples = whole_images("test", args.questions)
    infoprune.load("demo", notify=log)  # assemble outside the timed processes
    base = worker("dense")
    log(f"dense process: peak {base['peak']:.2f} GB")
    with tempfile.TemporaryDirectory() as scratch:
        made = []
        for number, share in enumerate(args.shares):
            made.append(worker(str(share), f"{scratch}/{number}"))
            log(f"{share}: compressed in {made[-1]['seconds']:.0f} s, peak {made[-1]['peak']:.2f} GB")
        dense = infoprune.load("demo")
        models = [dense, *(infoprune.load(Path(scratch) / str(number)) for number in range(len(args.shares)))]
        reports = [json.loads((Path(scratch) / str(number) / "report.json").read_text()) for number in range(len(args.shares))]
        log("timing, all models interleaved")
        gc.collect()
        probe = prompt_inputs(dense.encoder, examples[0])
        times = latency.measure(models, family_of(dense.model), probe, answer_tokens=2, repeats=25)
        log(f"scoring {len(examples)} questions with {len(models)} models")
        scored = quality.score(models, examples)
        made_here = {"hardware": processor(), "commit": commit(), "command": command()}
        rows = [dense_row(dense, scored[0], times[0], reports[0], base) | made_here]
        for share, model, score, timed, report, cost in zip(args.shares, models[1:], scored[1:], times[1:], reports, made, strict=True):
            rows.append({
                "method": "infoprune", "scope": "model", "recovered": False, "seed": 0, "budget": share,
                "flops_ratio": report["flops_ratio"], **quality.comparison(scored[0], score, examples),
                **latency.speedups(times[0], timed), "milliseconds": timed, "flops": report["flops"],
                "predicted_loss_nats": report["predicted_loss_nats"], "params": report["parameters"], "bytes_on_disk": bytes_on_disk(model),
                "seconds_to_compress": cost["seconds"], "peak_rss_gb": cost["peak"], **made_here,
            })  # fmt: skip
            log(f"{share}: {score.accuracy:.2f}%, KL {score.kl_nats:.4f}, prefill {rows[-1]['speedup_prefill']:.2f}x")
        rows += others(args.shares, len(examples))
        rows.sort(key=lambda row: float(row["flops_ratio"]), reverse=True)
        write("demo", rows, seeds=[0], data="easy-vqa:test", num_questions=len(examples))


def others(shares, questions):
    """Rows of the result file whose shares were not asked for, about as many questions."""
    path = RESULTS / "demo.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in known if row.get("budget") not in (None, *shares) and row["num_questions"] == questions]


def dense_row(vlm, scored, timed, report, base):
    low, high = scored.accuracy_ci95
    return {
        "method": "dense", "scope": "model", "flops_ratio": 1.0, "accuracy": scored.accuracy, "accuracy_ci95": [low, high],
        "num_questions": len(scored.correct), "milliseconds": timed, "flops": report["dense_flops"], "params": report["dense_parameters"],
        "bytes_on_disk": bytes_on_disk(vlm), "peak_rss_gb": base["peak"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
