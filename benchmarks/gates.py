"""What training gates buys, and which parts of it: models that are cut by what gates learned, on validation questions.

    python benchmarks/gates.py [--shares S ...] [--seeds N ...] [--variants NAME ...] [--steps N]

For each share of the model's FLOPs, gates train down to the attention's share of it that the training-free allocation gives, once with
the defaults and once without each part, all on one thinned model; once that model, with all gates open, teaches, not the dense one. The
heads they choose go into the same cut, with fewer neurons under the rest of the budget and refitted, as do those of the training-free
choice; no recovery. Questions on some of easy-VQA's validation
images choose between steps of training. The cut models answer questions on others, and on these altered, in words that calibration does
not have (``shifted.VALIDATION``). No test question is used: the defaults of ``TrainingOptions`` come from here. Rows already in the
result file are kept, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import infoprune
from common import RESULTS, command, commit, log, write
from infoprune.cli.console import BarProgress
from infoprune.data import Example, subset
from infoprune.decide import decide
from infoprune.evaluation import quality
from infoprune.options import CompressionOptions
from infoprune.site_costs import FlopCosts
from infoprune.solve import solve_sites
from infoprune.steps import apply_decisions, calibration_statistics, measure
from infoprune.trained_heads import Ground, start_of, thinned
from infoprune.training.heads import Choice
from infoprune.training.loop import Processes
from infoprune.training.options import TrainingOptions
from infoprune.training.run import LearnedHeads, TrainingRun
from shifted import VALIDATION, shifted, shown

WORK = Path(__file__).parent / "work"
SHARES = (1 / 3.2, 0.125)
TRAINING_FREE = "training-free"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "without cross-entropy": {"cross_entropy_weight": 0.0},
    "without distillation": {"distillation_weight": 0.0},
    "without rate": {"rate_weight": 0.0},
    "without KS": {"ks_weight": 0.0},
    "without compensation": {"compensation": "none"},
    "taught by itself": {"teacher": None},
    "close together": {"gate_prior": 10.0},
    "with LoRA": {"gate_lora": 8, "gate_lora_rate": 1e-3},
}
CHOOSING, JUDGING, BEYOND = 500, 600, 400  # questions: gates' validation, the cut models' task, and beyond it


def ground(dense: infoprune.VLM, share: float, seed: int) -> Ground:
    """Calibrate, score and decide training-free."""
    assert dense.architecture is not None
    options = CompressionOptions(flops=share, heads="trained", seed=seed)
    statistics, inputs = calibration_statistics(dense, "easy-vqa:train", options)
    probe, flops, workload = measure(dense, infoprune.load_examples("easy-vqa:train"))
    solved = solve_sites(dense.model, dense.architecture, statistics, options)
    decisions = decide(solved, FlopCosts(workload), flops.total, options)
    return Ground(dense, solved, decisions, statistics, inputs, workload, flops, probe, options)


def parts(seed: int) -> tuple[list[Example], dict[str, list[Example]]]:
    """Questions to choose between steps on, and to judge cut models on, of different validation images."""
    pool = infoprune.load_examples("easy-vqa:validation")
    judging = set(list(shown(VALIDATION.split))[: BEYOND // len(VALIDATION.wordings)])
    task = subset([example for example in pool if example.image in judging], JUDGING, seed=seed)
    beyond = shifted(VALIDATION, WORK / "shifted", BEYOND)
    return [example for example in pool if example.image not in judging][:CHOOSING], {"task": task, "beyond": beyond}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the dense model's FLOPs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration, gates and questions")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    path = RESULTS / "gates.json"
    pool = infoprune.load_examples("easy-vqa:train")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for seed, share in ((seed, share) for seed in args.seeds for share in args.shares):
        known = {row["name"] for row in rows if (row["budget"], row["seed"], row["steps"]) == (share, seed, args.steps)}
        lacking = [name for name in args.variants if name not in known]
        if not lacking:
            continue
        choosing, questions = parts(seed)
        from_here = ground(dense, share, seed)

        def run(choosing: list[Example] = choosing, seed: int = seed, **settings: Any) -> TrainingRun:
            options = TrainingOptions(gate_steps=args.steps, evaluate_every=max(1, args.steps // 3), **settings)
            return TrainingRun(options, pool, choosing, seed, Processes(), BarProgress())

        def judged(choice: Choice, from_here: Ground = from_here, questions: dict[str, list[Example]] = questions) -> dict[str, Any]:
            """Figures of the model that is cut so, beside the dense one, by the kind of question."""
            model = apply_decisions(dense, from_here.decided(choice), from_here.options, from_here.statistics, from_here.inputs)
            scores = {name: quality.score([dense, model], asked) for name, asked in questions.items()}
            return {name: quality.comparison(found[0], found[1], questions[name]) for name, found in scores.items()}

        start = start_of(from_here, run())
        gated = thinned(from_here, start, run())
        log(f"{share:.4g}, seed {seed}: ready")
        facts = {"budget": share, "seed": seed, "steps": args.steps, "commit": commit(), "command": command()}
        if TRAINING_FREE not in known:
            rows.append(named(TRAINING_FREE) | facts | judged(start.choice))
        for name in lacking:
            settings = dict(VARIANTS[name])
            compensation = settings.pop("compensation", from_here.options.compensate)
            taught = replace(gated, teacher=settings.pop("teacher", gated.teacher))
            learned = taught.learn(run(**settings), compensation, start.costs)
            rows.append(named(name) | facts | judged(learned.choice) | told(learned, start.choice))
            log(f"{name}: {learned.best.losses}, cut {rows[-1]['task']['accuracy']:.1f}%, KL {rows[-1]['task']['kl_nats']:.4f}")
            write("gates", rows, seeds=sorted({row["seed"] for row in rows}), data="easy-vqa:validation")


def named(name: str) -> dict[str, str]:
    """How rows are called."""
    return {"method": f"infoprune:{name}", "name": name}


def told(learned: LearnedHeads, start: Choice) -> dict[str, Any]:
    """How gates trained."""
    moved = sum(len(set(units) ^ set(start.kept[path])) for path, units in learned.choice.kept.items())
    return {
        "target_share": learned.cost_share[1], "expected_share": learned.cost_share[0], "gated_nats": learned.best.losses,
        "kept_of_step": learned.best.step, "moved": moved, "gate_seconds": learned.trained.seconds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
