"""How fast gates and recovery train on the demo model, against the bound that its FLOPs and the machine's matrix products set.

    python benchmarks/training_speed.py

FLOPs of one update are counted by PyTorch's counter over its forward and backward passes; the bound divides the throughput of a large
matrix product, in the precision that training uses, by them. Gates train on a thinned model, the dense one being the teacher. Also: what
packing the questions of an image into one row saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import infoprune
from common import log, throughput, write
from gates import ground
from infoprune.cli.console import BarProgress
from infoprune.packing import PackedBatch, answer_logits, pack
from infoprune.trained_heads import start_of, thinned
from infoprune.training.data import rows_of
from infoprune.training.gates import HeadGates
from infoprune.training.loop import Processes, wants_bfloat16
from infoprune.training.objective import cross_entropy
from infoprune.training.options import TrainingOptions
from infoprune.training.recovery import layer_weights
from infoprune.training.run import TrainingRun
from infoprune.training.structure import Channel

STEPS = 12
SHARE = 1 / 3.2


def main() -> None:
    dense = infoprune.load("demo", notify=log)
    assert dense.architecture is not None
    bfloat16 = wants_bfloat16("auto", dense.device)
    peak = throughput(torch.bfloat16 if bfloat16 else torch.float32)
    log(f"matrix products: {peak / 1e12:.2f} TFLOP/s in {'bfloat16' if bfloat16 else 'float32'}")
    result = infoprune.compress(
        dense, "easy-vqa:train", flops=SHARE, heads="trained", recovery="full", gate_steps=STEPS, recovery_steps=STEPS,
        evaluate_every=STEPS, validation="easy-vqa:validation", validation_questions=8,
    )  # fmt: skip
    log("trained")
    pool = infoprune.load_examples("easy-vqa:train")
    from_here = ground(dense, SHARE, 0)
    run = TrainingRun(TrainingOptions(), pool, [], 0, Processes(), BarProgress())
    gated = thinned(from_here, start_of(from_here, run), run)
    log("thinned")
    examples = rows_of(pool, 16, share_prefix=True)[:8]
    packed, apart = pack(dense.encoder, examples), pack(dense.encoder, [[e] for row in examples for e in row])
    student, questions = result.vlm.model, packed.num_questions
    trainable = layer_weights(student, dense.architecture)
    for model in (dense.model, gated.vlm.model):
        model.requires_grad_(False)
    gates = HeadGates(list(gated.thinning.sites))
    for site in gates.sites:
        width = site.num_units * site.unit_width
        gates.connect_(site.path, Channel(torch.eye(width), torch.zeros(width), site.unit_width, True))

    def gate_step() -> None:
        with gates.attached(gated.vlm.model):
            gates.sample_("count")
            update(gated.vlm.model, packed)
        with torch.no_grad():
            answer_logits(dense.model, packed)

    def recovery_step() -> None:
        update(student, packed)
        with torch.no_grad():
            answer_logits(dense.model, packed)

    rows: list[dict[str, Any]] = []
    for stage, name, step in (("heads", "gates", gate_step), ("recovery", "full recovery", recovery_step)):
        flops, reached = flops_of(step) / questions, result.training[stage]["questions_per_second"]
        rows.append({"method": f"infoprune:{name}", "questions_per_second": reached, "flops_per_question": flops,
                     "bound_questions_per_second": peak / flops, "share_of_bound": reached * flops / peak})  # fmt: skip
        log(f"{name}: {reached:.1f} questions/s, bound {peak / flops:.1f}")
    times = {"packed": [], "apart": []}
    for _ in range(5):
        for kind, batch in (("packed", packed), ("apart", apart)):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                update(student, batch)
            times[kind].append(time.perf_counter() - start)
            for parameter in trainable.values():
                parameter.grad = None
    ratio = sorted(a / p for a, p in zip(times["apart"], times["packed"], strict=True))
    log(f"packing: {ratio[2]:.2f}x")
    packing = {"median": ratio[2], "min": ratio[0], "max": ratio[-1]}
    meta = {"peak_flops": peak, "precision": "bfloat16" if bfloat16 else "float32", "packing_speedup": packing}
    write("training_speed", rows, seeds=[0], data="easy-vqa:train", num_questions=questions, **meta)


def update(model: Any, batch: PackedBatch) -> None:
    """Forward and backward."""
    cross_entropy(answer_logits(model, batch), batch.targets).backward()


def flops_of(run: Callable[[], None]) -> int:
    """Counted FLOPs; the plain attention kernel is counted, the fused one is not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
