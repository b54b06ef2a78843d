"""Latency of the demo model's graphs, dense against compressed, in ONNX Runtime and OpenVINO beside PyTorch.

    python benchmarks/graphs.py [--share S] [--repeats N]

One test question, a batch of one, two threads; the models' rounds alternate. Every runtime's answers to 20 questions are compared with
PyTorch's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import infoprune
from common import log, whole_images, write
from infoprune.evaluation.cost import prompt_inputs
from infoprune.graphs import Graphs, export_graphs

THREADS = 2
CHECKED = 20
Parts = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]  # by name: what to prepare untimed, and what to time
Timers = dict[tuple[str, str], Parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1 / 3.2, help="of the FLOPs that compression keeps")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    dense = infoprune.load("demo", notify=log)
    examples = whole_images("test", CHECKED)[:CHECKED]
    result = infoprune.compress(dense, "easy-vqa:train", flops=args.share)
    log(f"compressed to {result.flops_ratio:.3f} of the FLOPs")
    models = {"dense": dense, "compressed": result.vlm}
    inputs = prompt_inputs(dense.encoder, examples[0])
    timers: Timers = {}
    differ = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, vlm in models.items():
            timers[name, "pytorch"] = torch_parts(vlm, inputs)
            folder = export_graphs(vlm, Path(scratch) / name, notify=log)
            for runtime in ("onnxruntime", "openvino"):
                graphs = Graphs(folder, runtime, THREADS)
                timers[name, runtime] = graph_parts(graphs, inputs)
                differ += sum(answer(vlm, e) != graph_answer(graphs, vlm, e) for e in examples)
        log(f"{differ} of {2 * 2 * CHECKED} answers differ from PyTorch's")
        times = measure(timers, args.repeats)
    rows = [
        {"model": name, "runtime": runtime, "milliseconds": parts, "flops_ratio": 1.0 if name == "dense" else result.flops_ratio}
        for (name, runtime), parts in times.items()
    ]
    for row in rows:
        parts = ", ".join(f"{part} {value['median']:.1f} ms" for part, value in row["milliseconds"].items())
        log(f"{row['model']}, {row['runtime']}: {parts}")
    write("graphs", rows, seeds=[0], data="easy-vqa:test", num_questions=CHECKED, answers_that_differ=differ, threads=THREADS)


@torch.no_grad()
def torch_parts(vlm: infoprune.VLM, inputs: dict[str, torch.Tensor]) -> Parts:
    """Whole prompt (image included), and one further token behind it."""
    model = vlm.model

    @torch.no_grad()
    def prompt() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    held: list[Any] = []

    def fill() -> None:
        held[:] = [prompt().past_key_values]

    @torch.no_grad()
    def decode() -> None:
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=held[0], use_cache=True, logits_to_keep=1)

    return {"prompt": (nothing, prompt), "decode": (fill, decode)}


def nothing() -> None:
    pass


def graph_parts(graphs: Graphs, inputs: dict[str, torch.Tensor]) -> Parts:
    """The same for graphs."""
    ids, pixels = inputs["input_ids"].numpy(), inputs["pixel_values"].numpy()
    _, cache = graphs.prefill(ids, pixels)
    return {
        "prompt": (nothing, lambda: graphs.prefill(ids, pixels)),
        "decode": (nothing, lambda: graphs.decode(int(ids[0, -1]), ids.shape[1], cache)),
    }


def answer(vlm: infoprune.VLM, example: infoprune.Example) -> list[int]:
    inputs = prompt_inputs(vlm.encoder, example)
    new = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    return [token for token in new if token != vlm.processor.tokenizer.eos_token_id]


def graph_answer(graphs: Graphs, vlm: infoprune.VLM, example: infoprune.Example) -> list[int]:
    inputs = prompt_inputs(vlm.encoder, example)
    return graphs.generate(inputs["input_ids"].numpy(), inputs["pixel_values"].numpy(), 8)


def measure(timers: Timers, repeats: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Median and quartiles in milliseconds, all models in turn, the order alternating."""
    samples: dict[Any, list[float]] = {(key, part): [] for key, parts in timers.items() for part in parts}
    for number in range(repeats + 3):
        keys = list(timers) if number % 2 == 0 else list(timers)[::-1]
        for key in keys:
            for part, (prepare, run) in timers[key].items():
                prepare()
                run()
                prepare()
                start = time.perf_counter()
                run()
                if number >= 3:
                    samples[key, part].append(1000 * (time.perf_counter() - start))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (key, part), values in samples.items():
        low, high = np.percentile(values, [25, 75])
        found.setdefault(key, {})[part] = {"median": statistics.median(values), "p25": float(low), "p75": float(high)}
    return found


if __name__ == "__main__":
    main()
