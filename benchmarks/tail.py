"""Per FFN linear: loss measured on the calibration data against the predicted tail of the spectrum, for all sites of the demo model.

python benchmarks/tail.py
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch

import infoprune
from common import log, write
from infoprune.criteria.ffn import FFNOptions
from infoprune.options import CompressionOptions
from infoprune.packing import answer_logits
from infoprune.plan import FFNDecision
from infoprune.steps import calibration_statistics
from infoprune.surgery import factorizations

RANK_SHARE = 0.25


@torch.no_grad()
def main() -> None:
    vlm = infoprune.load("demo", notify=log)
    assert vlm.architecture is not None
    options = CompressionOptions(flops=1.0, weighting="uniform", ffn_metric="identity", heads="none", ffn="low-rank")
    statistics, inputs = calibration_statistics(vlm, "easy-vqa:train", options)
    log("calibrated")
    errors: dict[tuple[str, str], list[float]] = {}
    predicted = {}
    batch_valid: list[torch.Tensor] = []

    def measure(key, a, b, correction, tower, module, args, output) -> None:
        x, y = args[0].double(), output.double() - (0 if module.bias is None else module.bias.double())
        if tower == "text":
            x, y = x[batch_valid[0]], y[batch_valid[0]]
        error = y - (x.reshape(-1, x.shape[-1]) @ a.T @ b.T + correction).reshape(y.shape)
        sums = errors.setdefault(key, [0.0, 0.0])
        sums[0] += float(error.square().sum())
        sums[1] += error.shape[:-1].numel()

    with ExitStack() as stack:
        for site in vlm.architecture.ffn:
            block, names = vlm.model.get_submodule(site.path), site.names
            dense = {name: block.get_submodule(name) for name in (names.gate, names.up, names.down) if name}
            wanted = FFNDecision(up_rank=1, down_rank=1, gate_rank=1 if site.gated else None)
            solved = factorizations(site, statistics.sites[site.path], dense, FFNOptions("identity"), wanted)
            for rank_name, name in (("gate_rank", names.gate), ("up_rank", names.up), ("down_rank", names.down)):
                if rank_name in solved and name:
                    rank = int(RANK_SHARE * site.hidden_size)
                    a, b, correction = solved[rank_name].factors(rank)
                    predicted[site.path, name] = (rank, float(solved[rank_name].tails[rank]))
                    hook = partial(measure, (site.path, name), a, b, correction, site.tower)
                    stack.callback(dense[name].register_forward_hook(hook).remove)
        for batch in inputs:
            batch_valid[:] = [batch.valid]
            answer_logits(vlm.model, batch)
    rows = []
    for (path, name), (rank, tail) in predicted.items():
        total, count = errors[path, name]
        measured = total / count
        rows.append({"site": path, "linear": name, "rank": rank, "predicted": tail, "measured": measured,
                     "relative_difference": abs(measured - tail) / tail})  # fmt: skip
    worst = max(rows, key=lambda r: r["relative_difference"])
    log(f"{len(rows)} linears, worst relative difference {worst['relative_difference']:.2e} at {worst['site']}.{worst['linear']}")
    write("tail", rows, seeds=[0], worst_relative_difference=worst["relative_difference"])


if __name__ == "__main__":
    main()
