"""What compressing costs, stage by stage, over what it can't do without on this machine.

    python benchmarks/compressing.py [--share S] [--examples N]

* ``calibrate``: the model's own forward and backward passes over the same batches, without gathering anything.
* ``decide``: one inverse for each attention block; neurons are ranked by vectors.
* ``cut``: the inverses again, a dense and a compressed forward pass over the same batches.

Stages and bounds are timed one after the other in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

import infoprune
from common import log, write
from infoprune.calibration_batches import CalibrationBatches
from infoprune.decide import decide
from infoprune.fisher import fisher_sample
from infoprune.freeze import frozen
from infoprune.options import CompressionOptions
from infoprune.packing import PackedBatch, answer_logits
from infoprune.progress import SILENT
from infoprune.site_costs import FlopCosts
from infoprune.solve import solve_sites
from infoprune.steps import apply_decisions, calibration_examples, measure, statistics_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--examples", type=int, default=768)
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    assert dense.architecture is not None
    options = CompressionOptions(flops=args.share, examples=args.examples)
    examples = calibration_examples(dense, "easy-vqa:train", options)
    inputs = CalibrationBatches(dense, examples)
    statistics_of(dense, CalibrationBatches(dense, examples[:12]), options.needs, SILENT)  # warm-up
    list(inputs)  # images are prepared before the clock starts
    passes = seconds(lambda: forward_and_backward(dense, inputs))
    log(f"forward and backward: {passes:.1f} s")
    start = time.perf_counter()
    statistics = statistics_of(dense, inputs, options.needs, SILENT)
    stages = [("calibrate", time.perf_counter() - start, passes)]
    problems = inverses(dense)
    start = time.perf_counter()
    solved = solve_sites(dense.model, dense.architecture, statistics, options)
    _, dense_flops, workload = measure(dense, examples)
    decisions = decide(solved, FlopCosts(workload), dense_flops.total, options)
    stages.append(("decide", time.perf_counter() - start, problems))
    start = time.perf_counter()
    small = apply_decisions(dense, decisions, options, statistics, inputs)
    cutting = time.perf_counter() - start
    stages.append(("cut", cutting, problems + seconds(lambda: forward(dense, inputs)) + seconds(lambda: forward(small, inputs))))
    rows = [
        {"method": "infoprune", "stage": name, "seconds": taken, "bound_seconds": bound, "over_bound": taken / bound}
        for name, taken, bound in stages
    ]
    total, bound = sum(row["seconds"] for row in rows), sum(row["bound_seconds"] for row in rows)
    rows.append({"method": "infoprune", "stage": "all", "seconds": total, "bound_seconds": bound, "over_bound": total / bound})
    for row in rows:
        log(f"{row['stage']}: {row['seconds']:.1f} s, {row['over_bound']:.2f} of the bound")
    write("compressing", rows, seeds=[options.seed], data="easy-vqa:train", num_questions=len(examples), share=args.share)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward_and_backward(vlm: infoprune.VLM, inputs: Sequence[PackedBatch]) -> None:
    """What calibration's gradients take: backward to the activations before the first layers, weights frozen."""
    generator = torch.Generator().manual_seed(0)
    embeddings = vlm.model.get_input_embeddings()
    leaves = [embeddings, *first_vision_modules(vlm)]
    handles = [module.register_forward_hook(lambda m, a, output: output.requires_grad_()) for module in leaves]
    try:
        with frozen(vlm.model):
            for batch in inputs:
                logits = answer_logits(vlm.model, batch)
                (logits * fisher_sample(logits.detach(), 1.0, generator)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()


def first_vision_modules(vlm: infoprune.VLM) -> list[torch.nn.Module]:
    assert vlm.architecture is not None
    tower = vlm.model.get_submodule(vlm.architecture.family.vision)
    return [module for name, module in tower.named_modules() if name == "embeddings"]


@torch.no_grad()
def forward(vlm: infoprune.VLM, inputs: Sequence[PackedBatch]) -> None:
    for batch in inputs:
        answer_logits(vlm.model, batch)


def inverses(vlm: infoprune.VLM) -> float:
    """Seconds of one inverse per attention block, in float64."""
    assert vlm.architecture is not None
    total, known = 0.0, {}
    for site in vlm.architecture.attention:
        size = site.num_units * site.unit_width
        if size not in known:
            x = torch.randn(size, 2 * size, dtype=torch.float64)
            known[size] = seconds(lambda matrix=x @ x.T: torch.linalg.inv(matrix))
        total += known[size]
    return total


if __name__ == "__main__":
    main()
