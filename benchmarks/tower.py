"""The vision tower alone: torch-pruning, run as its users run it, beside ours at equal FLOPs of the tower.

    pip install torch-pruning
    python benchmarks/tower.py [--shares 0.75 0.5 0.31] [--recover 0.5] [--steps 60] [--questions 400]

torch-pruning (Fang et al., "DepGraph", CVPR 2023, and "Isomorphic pruning", ECCV 2024) prunes the demo model's DINOv2: whole heads and
hidden neurons, or the width of the residual stream too, by the size of the weights or by first-order Taylor terms of the answers' loss on
our calibration questions, globally and by isomorphic groups. How much is searched for until the tower has the FLOPs that ours has. The
language model is dense, and everything is judged by its answers to test questions and to others beyond the task (``shifted.TEST``).
``--recover``: at these shares the best of torch-pruning on the task and ours train for the same number of steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import infoprune
from arena import WORK
from common import log, many_images, processor, write
from infoprune.calibration_batches import CalibrationBatches
from infoprune.evaluation import latency, quality
from infoprune.evaluation.cost import Flops, count_flops, num_parameters
from infoprune.freeze import frozen
from infoprune.options import CompressionOptions
from infoprune.packing import answer_logits
from infoprune.steps import calibration_examples, measure
from infoprune.training import objective
from recovering import recovered
from shifted import TEST, shifted

try:
    import torch_pruning  # pyright: ignore[reportMissingImports]
except ImportError:
    raise SystemExit("This benchmark runs a peer that it does not bring along: pip install torch-pruning") from None

SHARES, CALIBRATION, SEED = (0.75, 0.5, 0.31), 768, 0
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
SCORES = ("magnitude", "taylor")
STRUCTURES = ("heads and neurons", "all widths")
HALVINGS, CLOSE = 12, 0.005


class Features(nn.Module):
    """Tower and projector, what torch-pruning traces; with the tower's last norm, which this model does not read, but runs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.get_submodule(TOWER), model.get_submodule(PROJECTOR)
        self.layer = model.config.vision_feature_layer

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of images, and the norm's output."""
        output = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        return self.projector(output.hidden_states[self.layer]), output.last_hidden_state


def gradients(dense: infoprune.VLM) -> dict[str, torch.Tensor]:
    """Of the answers' mean cross-entropy on the calibration questions, by parameter of tower and projector."""
    model = dense.model
    batches = CalibrationBatches(
        dense, calibration_examples(dense, "easy-vqa:train", CompressionOptions(flops=1.0, examples=CALIBRATION, seed=SEED, rare=0.0))
    )
    targets = sum(len(batch.targets) for batch in batches)
    with frozen(model):
        wanted = {name: p.requires_grad_() for name, p in model.named_parameters() if name.startswith((TOWER, PROJECTOR))}
        for batch in batches:
            (objective.cross_entropy(answer_logits(model, batch), batch.targets) / targets).backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in wanted.items()}
        for p in wanted.values():
            p.grad = None
    return found


def pruned(
    dense: infoprune.VLM, score: str, structure: str, ratio: float, grads: dict[str, torch.Tensor], image: torch.Tensor
) -> infoprune.VLM | None:
    """A copy of ``dense`` whose tower torch-pruning cut by ``ratio`` of its channels; ``None`` if a block lost all heads and can't run."""
    small = dense.copy()
    for name, p in small.model.named_parameters():
        p.requires_grad_(name.startswith((TOWER, PROJECTOR)))
        p.grad = grads.get(name)  # read, not changed
    features = Features(small.model)
    blocks = [layer.attention for layer in features.tower.encoder.layer]
    heads = {linear: block.num_attention_heads for block in blocks for linear in (block.q_proj, block.k_proj, block.v_proj)}
    last = [module for module in features.projector.modules() if isinstance(module, nn.Linear)][-1]
    ignored: list[nn.Module] = [last]
    if structure == "heads and neurons":  # what writes to the residual stream keeps its width, and so does the projector
        ignored = [block.o_proj for block in blocks] + [layer.mlp.fc2 for layer in features.tower.encoder.layer]
        ignored += [features.tower.embeddings.patch_embeddings.projection, *features.projector.modules()]
    importance = (
        torch_pruning.importance.GroupMagnitudeImportance(normalizer=None, group_reduction="mean")
        if score == "magnitude"
        else torch_pruning.importance.GroupTaylorImportance(multivariable=True)
    )
    pruner = torch_pruning.pruner.BasePruner(
        features, {"pixel_values": image}, importance, global_pruning=True, isomorphic=True, pruning_ratio=ratio, head_pruning_ratio=ratio,
        ignored_layers=ignored, num_heads=heads, prune_num_heads=True, prune_head_dims=False, max_pruning_ratio=0.95,
    )  # fmt: skip
    pruner.step()
    if not all(pruner.num_heads[block.q_proj] for block in blocks):
        return None
    for block in blocks:
        block.num_attention_heads = pruner.num_heads[block.q_proj]
        block.head_dim = block.q_proj.out_features // block.num_attention_heads
    for p in small.model.parameters():
        p.grad = None
        p.requires_grad_(False)
    return replace(small, architecture=None)


def tower_flops(flops: Flops) -> int:
    """FLOPs that seeing takes."""
    return flops.vision_tower + flops.projector


def searched(make: Callable[[float], infoprune.VLM | None], count: Callable[[infoprune.VLM], float], share: float) -> infoprune.VLM:
    """The nearest to ``share`` of the dense FLOPs that halving the interval of ratios finds among those that run."""
    low, high = 0.0, 1.0
    found: list[tuple[float, infoprune.VLM]] = []
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        small = make(ratio)
        if small is None:
            high = ratio
            continue
        got = count(small)
        found = sorted([*found, (abs(got - share), small)], key=lambda pair: pair[0])[:1]
        if abs(got - share) < CLOSE:
            break
        low, high = (ratio, high) if got > share else (low, ratio)
    return found[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the tower's and the projector's FLOPs")
    parser.add_argument("--recover", type=float, nargs="*", default=(0.5,))
    parser.add_argument("--steps", type=int, default=60, help="of recovery")
    parser.add_argument("--questions", type=int, default=400)
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    examples, others = many_images("test", args.questions), shifted(TEST, WORK / "shifted", args.questions)
    table = Table(dense, examples, others)
    for share in args.shares:
        made = table.models(share)
        table.add(share, made)
        if share in args.recover:
            best = min((name for name in made if name.startswith("torch-pruning")), key=lambda name: table.kl(share, name))
            log(f"{share:g}: recovery of ours and of {best}")
            table.add(share, {name: recovered(made[name], dense, args.steps, SEED) for name in ("infoprune", best)}, steps=args.steps)


class Table:
    """The rows, and what they are measured on."""

    def __init__(self, dense: infoprune.VLM, examples: Sequence[Any], others: Sequence[Any]) -> None:
        self.dense, self.examples, self.others = dense, list(examples), list(others)
        self.probe, self.flops, self.workload = measure(dense, self.examples)
        self.gradients = gradients(dense)
        log("gradients")
        self.rows: list[dict[str, Any]] = []

    def share_of(self, small: infoprune.VLM) -> float:
        """FLOPs of seeing, of the dense model's."""
        assert self.dense.architecture is not None
        return tower_flops(count_flops(small.model, self.dense.architecture.family, self.probe, 2)) / tower_flops(self.flops)

    def models(self, share: float) -> dict[str, infoprune.VLM]:
        """All methods at one share: first ours, whose FLOPs the others then get."""
        budget = 1 - (1 - share) * tower_flops(self.flops) / self.flops.total
        small = infoprune.compress(self.dense, "easy-vqa:train", flops=budget, towers=("vision",), seed=SEED).vlm
        made = {"infoprune": small}
        aim = self.share_of(small)
        log(f"{share:g}: infoprune {aim:.3f}")
        for score in SCORES:
            for structure in STRUCTURES:
                make = partial(pruned, self.dense, score, structure, grads=self.gradients, image=self.probe["pixel_values"])
                name = f"torch-pruning, {score}, {structure}"
                made[name] = searched(make, self.share_of, aim)
                log(f"{share:g}: {name} {self.share_of(made[name]):.3f}")
        return made

    def add(self, share: float, made: dict[str, infoprune.VLM], steps: int = 0) -> None:
        """Score, time and write."""
        assert self.dense.architecture is not None
        models = [self.dense, *made.values()]
        known, other = quality.score(models, self.examples), quality.score(models, self.others)
        times = latency.measure(models, self.dense.architecture.family, self.probe, answer_tokens=2)
        for index, (name, small) in enumerate(made.items(), start=1):
            row = {
                "method": name, "budget": share, "seed": SEED, "recovered": bool(steps), "steps": steps,
                "flops_ratio": self.share_of(small), **quality.comparison(known[0], known[index], self.examples),
                "shifted": quality.comparison(other[0], other[index], self.others), **latency.speedups(times[0], times[index]),
                "params": num_parameters(small.model.get_submodule(TOWER)), "hardware": processor(),
            }  # fmt: skip
            self.rows.append(row)
            log(f"{share:g} {name}: {row['accuracy']:.2f}%, KL {row['kl_nats']:.4f}; beyond {row['shifted']['accuracy']:.2f}%, "
                f"KL {row['shifted']['kl_nats']:.4f}; tower {row['speedup_vision']:.2f}x")  # fmt: skip
        facts = {"num_shifted": len(self.others), "peer": f"torch-pruning {torch_pruning.__version__}"}
        write("tower", self.rows, seeds=[SEED], data="easy-vqa:test", num_questions=len(self.examples), **facts)

    def kl(self, share: float, name: str) -> float:
        """Of a model that was not recovered."""
        return next(row["kl_nats"] for row in self.rows if row["budget"] == share and row["method"] == name and not row["recovered"])


if __name__ == "__main__":
    main()
