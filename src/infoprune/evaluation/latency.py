"""Wall time of a model's parts: several models interleaved in one process, warm-up, median and spread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from infoprune.architecture import FamilyDeclaration
from infoprune.evaluation.cost import decode_step
from infoprune.evaluation.decoding import GREEDY
from infoprune.model import VLM
from infoprune.progress import SILENT, Progress
from infoprune.timing.stopwatch import synchronizer

PARTS = ("vision", "projector", "prefill", "decode", "lm_head", "end_to_end")


@torch.no_grad()
def measure(
    models: Sequence[VLM],
    family: FamilyDeclaration,
    inputs: dict[str, torch.Tensor],
    *,
    answer_tokens: int,
    repeats: int = 15,
    warmup: int = 3,
    progress: Progress = SILENT,
) -> list[dict[str, dict[str, float]]]:
    """Time every part of every model, in turn, on one example.

    ``vision``, ``projector`` and ``prefill`` (language model over the prompt) are times inside one forward pass; ``decode`` is one
    further token; ``lm_head`` one position; ``end_to_end`` is ``generate`` of ``answer_tokens`` tokens. The order of the models
    alternates, so that a machine that slows down slows all of them; each model's turn starts with an untimed pass, since a model that
    is served finds its own weights and code in the caches and not another model's.

    Returns:
        Per model and part: ``median``, ``p25`` and ``p75`` in milliseconds.
    """
    samples: list[dict[str, list[float]]] = [{part: [] for part in PARTS} for _ in models]
    with progress.task("timing", repeats + warmup) as advance:
        for round_number in range(repeats + warmup):
            order = range(len(models)) if round_number % 2 == 0 else range(len(models) - 1, -1, -1)
            for index in order:
                times = _one_round(models[index], family, inputs, answer_tokens)
                if round_number >= warmup:
                    for part, milliseconds in times.items():
                        samples[index][part].append(milliseconds)
            advance(1)
    return [{part: _summary(values) for part, values in sample.items()} for sample in samples]


def speedups(dense: dict[str, dict[str, float]], compressed: dict[str, dict[str, float]]) -> dict[str, float]:
    """Dense / compressed median time by part."""
    return {f"speedup_{part}": dense[part]["median"] / compressed[part]["median"] for part in PARTS}


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "p25": float(low), "p75": float(high)}


def _one_round(vlm: VLM, family: FamilyDeclaration, inputs: dict[str, torch.Tensor], answer_tokens: int) -> dict[str, float]:
    model = vlm.model
    taken: dict[str, float] = {}
    sync = synchronizer(vlm.device)
    model(**inputs, use_cache=True, logits_to_keep=1)
    handles = []
    for path in itertools.chain(*family.parts.values()):
        handles += _stopwatch(model.get_submodule(path), path, taken, sync)
    try:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    times = {part: family.own(part, taken.__getitem__) for part in family.parts}
    step = decode_step(model, family, output)
    start = _now(sync)
    step()
    times["decode"] = _now(sync) - start
    answer = answering(model, inputs, answer_tokens)
    start = _now(sync)
    answer()
    times["end_to_end"] = _now(sync) - start
    return times


def answering(model: Any, inputs: dict[str, torch.Tensor], answer_tokens: int) -> Callable[[], Any]:
    """The work that is timed from end to end: ``generate`` of ``answer_tokens`` tokens."""
    return partial(model.generate, **inputs, max_new_tokens=answer_tokens, min_new_tokens=answer_tokens, **GREEDY)


def _stopwatch(module: Any, path: str, taken: dict[str, float], sync: Callable[[], None]) -> list[Any]:
    started = [0.0]

    def before(*_: Any) -> None:
        started[0] = _now(sync)

    def after(*_: Any) -> None:
        taken[path] = taken.get(path, 0.0) + _now(sync) - started[0]

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _now(sync: Callable[[], None]) -> float:
    sync()
    return 1000 * time.perf_counter()
