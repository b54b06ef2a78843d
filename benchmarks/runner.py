"""Questions per second of the generation runner on the demo model, against plain ``generate``.

    python benchmarks/runner.py [--rounds 5] [--images 8] [--threads 2] [--precision fp32]

Three ways to answer the same questions, in turn, the order reversed from round to round: ``generate`` for one question after the other,
``generate`` for 32 questions at a time, padded on the left, and the runner. All read the images, and all answers are compared. A round's
questions are those of so many images of the test split, other ones every time: easy-VQA has about ten questions an image, which is what
sharing an image's keys and values lives on, so one question an image is measured beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import infoprune
from common import log, whole_images, write
from infoprune.data import Example
from infoprune.evaluation.decoding import batched_answers
from infoprune.evaluation.generation import MAX_NEW_TOKENS, dtype_for, generate_answers
from infoprune.evaluation.metrics import score_answers
from infoprune.model import VLM

Answer = Callable[[VLM, Sequence[Example]], list[str]]


@torch.no_grad()
def one_by_one(vlm: VLM, examples: Sequence[Example]) -> list[str]:
    """The way of Transformers' own examples."""
    answers = []
    for example in examples:
        inputs = vlm.encoder.inputs([vlm.encoder.prompt(example.question)], [example.load_image()])
        inputs = {k: v.to(vlm.device, vlm.model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        output = vlm.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += vlm.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@torch.no_grad()
def by_32(vlm: VLM, examples: Sequence[Example]) -> list[str]:
    """Batches of 32, in the order in which the questions come; the features of an image are computed once in each."""
    starts = range(0, len(examples), 32)
    return [answer for start in starts for answer in batched_answers(vlm, examples[start : start + 32], MAX_NEW_TOKENS)]


METHODS: dict[str, Answer] = {"generate, one by one": one_by_one, "generate, 32 at a time": by_32, "infoprune": generate_answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with questions of its own, after one that does not count")
    parser.add_argument("--images", type=int, default=8, help="images of a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    vlm = infoprune.load("demo", dtype=dtype_for(args.precision, torch.device("cpu")), notify=log)
    rounds = slices(args.rounds + 1, args.images)
    rows: list[dict[str, Any]] = []
    for kind, sample in (("all", rounds), ("1", [first_of_each_image(examples) for examples in rounds])):
        rows += measure(vlm, sample, kind)
    write(
        "runner", rows, seeds=[0], data="easy-vqa:test", num_questions=sum(map(len, rounds[1:])), dtype=str(vlm.model.dtype),
        max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip


def slices(rounds: int, images: int) -> list[list[Example]]:
    """The questions of so many images for each round, no image twice."""
    examples = whole_images("test", None)
    order = list(dict.fromkeys(example.image for example in examples))
    chosen = [set(order[number * images : (number + 1) * images]) for number in range(rounds)]
    return [[example for example in examples if example.image in some] for some in chosen]


def first_of_each_image(examples: Sequence[Example]) -> list[Example]:
    return list({example.image: example for example in reversed(examples)}.values())


def measure(vlm: VLM, rounds: Sequence[Sequence[Example]], kind: str) -> list[dict[str, Any]]:
    """A row per method; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    given: dict[str, list[str]] = {name: [] for name in METHODS}
    for number, examples in enumerate(rounds):
        for name in list(METHODS)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            answers = METHODS[name](vlm, examples)
            if number:
                seconds[name].append((time.perf_counter() - start) / len(examples))
                given[name] += answers
        log(f"{kind} questions an image, round {number}: " + ", ".join(f"{name} {1 / s[-1]:.1f}/s" for name, s in seconds.items() if s))
    asked = [example for examples in rounds[1:] for example in examples]
    plain = next(iter(METHODS))
    rows = []
    for name in METHODS:
        ratios = np.array(seconds[plain]) / np.array(seconds[name])
        low, middle, high = np.percentile(ratios, [0, 50, 100])
        rows.append({
            "method": name, "questions_per_image": kind, "num_questions": len(asked), "rounds": len(ratios),
            "questions_per_second": 1 / float(np.median(seconds[name])), "speedup_questions_per_second": float(middle),
            "speedup_range": [float(low), float(high)], "accuracy": score_answers(given[name], asked, "exact").overall,
            "other_answers": sum(a != b for a, b in zip(given[name], given[plain], strict=True)),
        })  # fmt: skip
        log(f"{name}: {rows[-1]}")
    return rows


if __name__ == "__main__":
    main()
