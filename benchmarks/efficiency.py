"""How much of the saved FLOPs becomes saved time on the demo model, and what stands in the way.

    python benchmarks/efficiency.py [--shares S ...] [--batches N ...] [--cuts NAME ...] [--repeats N] [--no-compile]

Efficiency is the speed-up times the share of FLOPs that is left: 1 where time falls as FLOPs do. Timed are the vision tower and the whole
prompt (image, projector, language model, one position of the head), run by PyTorch as it is and by ``torch.compile``, at a batch of one and
at larger ones, where the time of small operations is shared by more tokens; then one decode step, with the bytes that it must read. Models
are training-free, with FFNs of fewer neurons or of low rank, ranks being multiples of 8 or of 64. All models of a batch are timed in turn,
dense among them. Each model is compiled on its own, though they share their code, and a run ends with an error rather than time a model
that PyTorch gave up compiling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch._dynamo.config

import infoprune
from common import log, throughput, whole_images, write
from infoprune.evaluation import latency
from infoprune.steps import measure

SHARES = (0.5, 1 / 3.2)
BATCHES = (1, 16)
CUTS: dict[str, dict[str, Any]] = {
    "fewer neurons": {"ffn": "width"},
    "low rank": {"ffn": "low-rank"},
    "low rank, multiples of 64": {"ffn": "low-rank", "rank_multiple": 64},
}
WARMUP = 3
COMPILATION: dict[str, Any] = {"dynamic": False, "isolate_recompiles": True, "recompile_limit": 64}  # each layer may differ
Timed = dict[str, dict[str, Any]]  # by part: median, p25 and p75 in milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    probe, dense_flops, workload = measure(dense, whole_images("train", 64))
    models: dict[tuple[float, str], Any] = {(1.0, "dense"): (dense, dense_flops)}
    for share in args.shares:
        for cut in args.cuts:
            result = infoprune.compress(dense, "easy-vqa:train", flops=share, **CUTS[cut])
            models[share, cut] = (result.vlm, result.flops)
            log(f"share {share:.3f}, {cut}: {result.flops_ratio:.3f} of the FLOPs")
    found = [vlm for vlm, _ in models.values()]
    assert dense.architecture is not None
    family = dense.architecture.family
    cases = [(engine, batch) for engine in (("eager",) if args.no_compile else ("eager", "compiled")) for batch in args.batches]
    bounds, all_times = [throughput()], []
    for engine, batch in cases:
        inputs = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in probe.items()}
        all_times.append(prompt_times(found, family.vision, inputs, args.repeats, compiled=engine == "compiled"))
        bounds.append(throughput())
        log(f"timed {engine} at a batch of {batch}")
    bound = max(bounds)  # a machine that is shared has slow minutes
    rows: list[dict[str, Any]] = []
    for (engine, batch), times in zip(cases, all_times, strict=True):
        for (key, (_, flops)), timed in zip(models.items(), times, strict=True):
            parts = parts_of(flops, dense_flops, timed, times[0], batch, bound)
            rows.append(label(key) | {"engine": engine, "batch": batch, "parts": parts})
            told = ", ".join(f"{part} {v['speedup']:.2f}x, efficiency {v['efficiency']:.2f}" for part, v in parts.items())
            log(f"{engine}, batch {batch}, {key}: {told}")
    timed = latency.measure(found, family, probe, answer_tokens=2, repeats=args.repeats)
    rows += [
        decode_row(vlm, key, own, timed[0], probe, family.text, family.head)
        for (key, (vlm, _)), own in zip(models.items(), timed, strict=True)
    ]
    tokens = {"vision": workload.vision_tokens, "prompt": workload.prompt_tokens}
    write("efficiency", rows, seeds=[0], data="easy-vqa:train", num_questions=1, tokens=tokens, flops_per_second=bound)


def prompt_times(
    models: Sequence[infoprune.VLM], vision: str, inputs: dict[str, torch.Tensor], repeats: int, *, compiled: bool
) -> list[Timed]:
    """Of each model's vision tower and whole prompt, in turn."""
    runs: list[dict[str, Callable[[], Any]]] = []
    prompt = inputs | {"use_cache": False, "logits_to_keep": 1}
    for vlm in models:
        whole = (vlm.model, vlm.model.get_submodule(vision))
        model, tower = (torch.compile(m, **COMPILATION) if compiled else m for m in whole)
        runs.append({"vision": partial(tower, inputs["pixel_values"]), "prompt": partial(model, **prompt)})
    samples: list[dict[str, list[float]]] = [{part: [] for part in run} for run in runs]
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for repeat in range(repeats + WARMUP):
            order = range(len(runs)) if repeat % 2 == 0 else range(len(runs) - 1, -1, -1)
            for index in order:
                for part, run in runs[index].items():
                    run()  # a model that is served finds its own weights in the caches
                    start = time.perf_counter()
                    run()
                    if repeat >= WARMUP:
                        samples[index][part].append(1000 * (time.perf_counter() - start))
    return [{part: summary(values) for part, values in sample.items()} for sample in samples]


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, high = np.percentile(values, [25, 75])
    return {"median": statistics.median(values), "p25": float(low), "p75": float(high)}


def parts_of(flops: Any, dense: Any, timed: Timed, timed_dense: Timed, batch: int, bound: float) -> dict[str, Any]:
    """FLOPs, time, speed-up and efficiency of the vision tower and the prompt."""
    found = {}
    for part in timed:
        count, count_dense = (
            f.vision_tower if part == "vision" else f.vision_tower + f.projector + f.prefill + f.lm_head for f in (flops, dense)
        )
        speedup = timed_dense[part]["median"] / timed[part]["median"]
        ratio = count / count_dense
        found[part] = {
            "flops_ratio": ratio, "milliseconds": timed[part], "speedup": speedup, "efficiency": speedup * ratio,
            "of_bound": batch * count / bound / (timed[part]["median"] / 1000),
        }  # fmt: skip
    return found


@torch.no_grad()
def decode_row(
    vlm: infoprune.VLM, key: tuple[float, str], timed: Timed, dense: Timed, inputs: dict[str, torch.Tensor], text: str, head: str
) -> dict[str, Any]:
    """One further token: its time, and what must be read for it. ``text`` and ``head`` are the paths of language model and head."""
    model: Any = vlm.model
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    layers = [p for name, p in model.get_submodule(text).named_parameters() if "embed_tokens" not in name]
    read = {
        "layers": sum(p.numel() * p.element_size() for p in layers),
        "head": model.get_submodule(head).weight.numel() * model.get_submodule(head).weight.element_size(),
        "cache": sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values) if t is not None),
    }
    return {
        **label(key), "part": "decode", "context": inputs["input_ids"].shape[1], "milliseconds": timed["decode"],
        "speedup_decode": dense["decode"]["median"] / timed["decode"]["median"], "bytes_read": read,
    }  # fmt: skip


def label(key: tuple[float, str]) -> dict[str, Any]:
    """What a row starts with."""
    return {"method": "dense" if key[0] == 1 else "infoprune", "budget": key[0], "cut": key[1]}


if __name__ == "__main__":
    main()
