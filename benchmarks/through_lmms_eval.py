"""A model of infoprune in lmms-eval, on a local task of easy-VQA's test questions, against infoprune's own evaluation of the same.

    pip install 'infoprune[lmms-eval]'
    python benchmarks/through_lmms_eval.py FOLDER [--questions N] [--batch-size B] [--requests multiple_choice]

FOLDER is a compressed checkpoint, or ``demo``. The task is written to a temporary folder: images and questions in the format of
``datasets``, one YAML file that asks for generated answers and one of two choices. lmms-eval then runs as its users
run it, in a process of its own, and finds the model through its entry point. Every question must be judged alike on both sides.

lmms-eval 0.7 to 0.7.3 make text of the scores of choices before they read them, so that multiple choice fails there with any model; 0.6.1
runs it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import infoprune
from common import log, whole_images, write
from infoprune.evaluation import quality

TASK = """
task: easy_vqa_{kind}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: {kind}
doc_to_visual: image
doc_to_text: question
{answers}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0}}
"""
ANSWERS = {
    "generate_until": "doc_to_target: answer\ngeneration_kwargs: {max_new_tokens: 16, temperature: 0}",
    # Judged by whether the right choice is what the model would say, which is exact match again, found without generation.
    "multiple_choice": "doc_to_choice: choices\ndoc_to_target: gold",
}


def write_tasks(examples: list[infoprune.Example], folder: Path) -> None:
    """The questions as a data set on disk, and a task for each kind of request."""
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    answers = sorted({e.answer for e in examples})
    wrong = [next(answer for answer in answers if answer != e.answer) for e in examples]
    columns = {
        "image": [str(e.image) for e in examples],
        "question": [e.question for e in examples],
        "answer": [e.answer for e in examples],
        "choices": [sorted((e.answer, other)) for e, other in zip(examples, wrong, strict=True)],
        "gold": [int(e.answer > other) for e, other in zip(examples, wrong, strict=True)],
    }
    text = Value("string")
    features = Features({"image": Image(), "question": text, "answer": text, "choices": List(text), "gold": Value("int64")})
    DatasetDict({"test": Dataset.from_dict(columns, features=features)}).save_to_disk(folder / "data")
    for kind, lines in ANSWERS.items():
        (folder / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=folder / "data", answers=lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a compressed checkpoint folder, or demo")
    parser.add_argument("--questions", type=int, default=500, help="test questions, rounded up to whole images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--requests", nargs="+", choices=list(ANSWERS), default=["generate_until"])
    args = parser.parse_args()
    model = args.model if args.model == "demo" else str(Path(args.model).resolve())
    examples = whole_images("test", args.questions)
    (own,) = quality.score([infoprune.load(model, notify=log)], examples)
    log(f"infoprune: {own.accuracy:.2f}% of {len(examples)} questions")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(examples, folder)
        for kind in args.requests:
            command = [
                sys.executable, "-m", "lmms_eval", "--model", "infoprune", "--model_args", f"pretrained={model}", "--tasks",
                f"easy_vqa_{kind}", "--include_path", scratch, "--batch_size", str(args.batch_size), "--device", "cpu", "--log_samples",
                "--output_path", str(folder / kind),
            ]  # fmt: skip
            subprocess.run(command, check=True, cwd=scratch, stdout=sys.stderr)
            (samples,) = (folder / kind).rglob("*_samples_*.jsonl")
            found = {record["doc_id"]: record["exact_match"] for record in map(json.loads, samples.read_text().splitlines())}
            judged = [bool(found[number]) for number in range(len(examples))]
            differ = sum(a != b for a, b in zip(judged, own.correct.tolist(), strict=True))
            rows.append({
                "model": args.model, "requests": kind, "num_questions": len(examples), "accuracy": 100 * sum(judged) / len(judged),
                "own_accuracy": own.accuracy, "judged_differently": differ,
            })  # fmt: skip
            log(f"lmms-eval, {kind}: {rows[-1]['accuracy']:.2f}%, {differ} questions judged differently")
    if any(row["judged_differently"] for row in rows):
        sys.exit("lmms-eval and infoprune differ.")
    write("lmms_eval", rows, data="easy-vqa:test", lmms_eval=version("lmms-eval"), batch_size=args.batch_size)


if __name__ == "__main__":
    main()
