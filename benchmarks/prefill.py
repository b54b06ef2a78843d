"""Where the language model's prefill spends its time, dense and compressed: why fewer FLOPs are not as many times faster.

    python benchmarks/prefill.py

One demo prompt, a batch of one. Wall times are medians without the profiler, models interleaved; the parts are PyTorch's profiler's own
operator times, and what they leave of the wall time is Python and dispatch. The bound is the larger of the FLOPs over the throughput
of a large matrix product and the weights' bytes over the bandwidth of reading a large tensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import infoprune
from common import log, throughput, whole_images, write
from infoprune.evaluation.cost import count_flops, prompt_inputs

SHARES = (0.5, 0.31)
REPEATS, PROFILED = 40, 10
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")


def main() -> None:
    dense = infoprune.load("demo", notify=log)
    assert dense.architecture is not None
    family = dense.architecture.family
    models = {"dense": dense}
    for share in SHARES:
        models[f"infoprune {share:g}"] = infoprune.compress(dense, "easy-vqa:train", flops=share).vlm
        log(f"compressed to {share:g}")
    inputs = prompt_inputs(dense.encoder, whole_images("test", 1)[0])
    calls = {name: prefill_of(vlm.model, family.text, inputs) for name, vlm in models.items()}
    wall: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(REPEATS):
        for name, call in calls.items():
            call()  # its weights into the caches
            wall[name].append(milliseconds(call))
    flop_rate, byte_rate = throughput(), bandwidth()
    log(f"large matrix product {flop_rate / 1e9:.0f} GFLOP/s, large read {byte_rate / 1e9:.1f} GB/s")
    rows = []
    for name, vlm in models.items():
        parts = profiled(calls[name])
        flops = count_flops(vlm.model, family, inputs, 2).prefill
        size = sum(p.nbytes for n, p in vlm.model.get_submodule(family.text).named_parameters() if "embed_tokens" not in n)
        median = statistics.median(wall[name])
        rows.append({
            "method": name, "prefill_ms": median, "prefill_ms_range": [min(wall[name]), max(wall[name])], **parts,
            "python_and_dispatch_ms": max(median - sum(v for k, v in parts.items() if k.endswith("_ms")), 0.0), "flops": flops,
            "weight_bytes": size, "bound_ms": 1000 * max(flops / flop_rate, size / byte_rate),
        })  # fmt: skip
        log(f"{name}: {rows[-1]}")
    write("prefill", rows, seeds=[0], data="easy-vqa:test", num_questions=1, flop_rate=flop_rate, byte_rate=byte_rate)


@torch.no_grad()
def prefill_of(model: Any, path: str, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A call of the language model alone, on what reaches it."""
    held: list[Any] = []
    text = model.get_submodule(path)
    handle = text.register_forward_pre_hook(lambda _, args, kwargs: held.append((args, kwargs)), with_kwargs=True)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    (args, kwargs) = held[0]

    @torch.no_grad()
    def call() -> Any:
        return text(*args, **kwargs)

    return call


def milliseconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def profiled(call: Callable[[], Any]) -> dict[str, float]:
    """Own time of the operators of one call, by kind, and their number."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(PROFILED):
            call()
    times = {"matrix_products_ms": 0.0, "attention_ms": 0.0, "other_operators_ms": 0.0}
    count = 0
    for event in record.key_averages():
        if not event.key.startswith("aten::"):
            continue
        attention = "scaled_dot_product" in event.key or "flash_attention" in event.key
        kind = "matrix_products_ms" if event.key in PRODUCTS else "attention_ms" if attention else "other_operators_ms"
        times[kind] += event.self_cpu_time_total / 1000 / PROFILED
        count += event.count
    return times | {"operators": count / PROFILED}


def bandwidth(size: int = 100_000_000) -> float:
    """Bytes/s of reading a large tensor."""
    a = torch.ones(size)
    a.sum()
    return 1e3 * a.nbytes / statistics.median(milliseconds(a.sum) for _ in range(7))


if __name__ == "__main__":
    main()
