"""Generated answers of the dense demo model on the whole test split, beside the teacher-forced score that the other tables use.

    python benchmarks/generate.py [--also FOLDER ...]

Both are exact match. Models and processors come from Transformers' auto classes, in float32; `runner.py` compares the answers with those
of ``generate`` one by one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import infoprune
from common import log, whole_images, write
from infoprune.cli.console import BarProgress
from infoprune.evaluation import quality
from infoprune.evaluation.generation import generate_answers
from infoprune.evaluation.metrics import score_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=None, help="test questions (default: all 9,673)")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="folders of compressed models")
    args = parser.parse_args()

    examples = whole_images("test", args.questions)
    models = {"dense": infoprune.load("demo", notify=log)} | {folder.name: infoprune.load(folder) for folder in args.also}
    rows: list[dict[str, Any]] = []
    for (name, model), scored in zip(models.items(), quality.score(list(models.values()), examples), strict=True):
        log(f"{name}: {scored.accuracy:.2f}% of {len(examples)} questions by scoring")
        start = time.perf_counter()
        answers = generate_answers(model, examples, progress=BarProgress())
        seconds = time.perf_counter() - start
        right = [bool(s) for s in score_answers(answers, examples, "exact").per_example]
        same = sum(a == b for a, b in zip(right, scored.correct.tolist(), strict=True))
        rows.append({
            "method": name, "num_questions": len(examples), "accuracy": scored.accuracy, "disagreements": len(examples) - same,
            "generated_accuracy": 100 * sum(right) / len(right), "seconds_to_generate": seconds,
        })  # fmt: skip
        log(f"{name}: {rows[-1]['generated_accuracy']:.2f}% by generate, {len(examples) - same} questions judged differently")
        write("generate", rows, seeds=[0], data="easy-vqa:test", num_questions=len(examples))


if __name__ == "__main__":
    main()
