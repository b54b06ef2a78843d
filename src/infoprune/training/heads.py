"""Training-based pruning: train gates under the objective and the budget, choose what stays exactly within it, on validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from infoprune.criteria.heads import Block
from infoprune.data import Example
from infoprune.errors import BudgetError, PlanError
from infoprune.packing import PackedBatch, answer_logits
from infoprune.plan import Compensation
from infoprune.training import objective
from infoprune.training.costs import Costs
from infoprune.training.data import VisionCache
from infoprune.training.ffn_gates import FFNGates, Sizes
from infoprune.training.gates import HeadGates, deterministic_gate, open_probability
from infoprune.training.loop import Terms, Totals, check_finite
from infoprune.training.options import RATES, TrainingOptions
from infoprune.training.structure import BlockStructure, Channel, closed, dense_structure, structure_of

AGREEMENT = 1e-4  # masked against compacted logits, relative to the largest


@dataclass(frozen=True)
class Choice:
    """What stays: units by path of every gated block, and sizes of FFNs; ``None`` where these have no gates."""

    kept: dict[str, list[int]]
    sizes: Sizes | None = None


@dataclass
class BestGates:
    """The validated choice with the least loss so far.

    Attributes:
        choice: What to keep.
        loss: Data terms of the objective on the validation questions, nats per answer token.
        step: Updates before it; 0: what gates start from.
        losses: All validations, by step.
    """

    choice: Choice
    loss: float = float("inf")
    step: int = -1
    losses: dict[int, float] = field(default_factory=dict)

    def update(self, choice: Choice, loss: float, step: int) -> None:
        """Take a validation into account."""
        self.losses[step] = loss
        if loss < self.loss:
            self.choice, self.loss, self.step = choice, loss, step


class GateStage:
    """The stage that trains gates on a model that stays as it is.

    Sampled gates that train well may still binarise badly, and the choice that they start from is a good one, so what is kept is
    decided on validation questions: the units that the gates would keep at the start, every so many steps, and at the end.
    """

    name = "gates"

    def __init__(
        self,
        model: Any,
        gates: HeadGates,
        blocks: dict[str, Block],
        costs: Costs,
        target: float,
        options: TrainingOptions,
        validation: Callable[[], Iterable[tuple[PackedBatch, list[Path]]]],
        *,
        compensation: Compensation,
        seed: int,
        ffn: FFNGates | None = None,
        multiple: int = 1,
        autocast: bool = False,
        extra: dict[str, torch.nn.Parameter] | None = None,
        cache: VisionCache | None = None,
        taught: Callable[[PackedBatch, Sequence[Path]], torch.Tensor] | None = None,
        agree: Callable[..., tuple[float, ...]] = lambda *values: values,
        same: Callable[[Choice], Choice] = lambda choice: choice,
    ) -> None:
        """Beside what they are called: ``ffn`` are gates on the sizes of FFNs, multiples of ``multiple``, and ``target`` is of both's cost.

        ``taught`` gives the teacher's logits for a batch and the image of each row; ``None``: the model itself, all gates open, teaches.
        ``agree`` makes figures the same on all processes, ``same`` choices.
        """
        self.model, self.gates, self.blocks, self.costs, self.options = model, gates, blocks, costs, options
        self.compensation: Compensation = compensation
        self.seed, self.cache, self.taught = seed, cache, taught
        self.validation, self.autocast, self.agree, self.same = validation, autocast, agree, same
        self.ffn, self.multiple = ffn or FFNGates([]), multiple
        self.best = BestGates(Choice({site.path: list(range(site.num_units)) for site in gates.sites}))
        self.steps = options.gate_steps
        self.budget = objective.Budget(target)
        self.dense = {path: dense_structure(block) for path, block in blocks.items()}
        device = gates.log_alpha.device
        self.channels = {path: Channel.of(block, compensation).to(device, torch.float32) for path, block in blocks.items()}
        for path, channel in self.channels.items():
            gates.connect_(path, channel)
        self.structures: dict[str, BlockStructure] = {}
        self.refreshed_at: torch.Tensor | None = None
        self.trajectory: list[list[float]] = []
        own = {"log_alpha": gates.log_alpha} | ({"sizes": self.ffn.location} if self.ffn.parts else {})
        self.parameters, self.moving = own | (extra or {}), bool(extra)
        groups: list[dict[str, Any]] = [{"params": list(own.values()), "betas": (0.9, 0.99)}]
        if extra:
            # Not recovery's rate, which for full recovery is relative to each tensor.
            rate = RATES["lora"] if options.gate_lora_rate is None else options.gate_lora_rate
            groups.append({"params": list(extra.values()), "scale": rate / options.gate_rate})
        self.optimizer = torch.optim.AdamW(groups, lr=options.gate_rate, weight_decay=0.0)
        self._draw = ""

    def learning_rate(self, step: int) -> float:
        """Falls to zero over the second half, in which noise would otherwise go on moving what lies near the threshold."""
        return self.options.gate_rate * min(1.0, 2 * (1 - step / self.steps))

    def begin(self, step: int) -> None:
        """Refresh what calibration tells, and name this step's draws of the gates."""
        if step == 0:
            self.validate(step)
        if step % self.options.refresh == 0:
            self.refresh(self.gates.log_alpha.detach().clone())
            self.trajectory.append(deterministic_gate(self.gates.log_alpha.detach()).tolist())
        self._draw = f"gates {self.seed} {step}"

    def refresh(self, log_alpha: torch.Tensor) -> None:
        """Directions of the spectra at the gates that ``log_alpha`` gives."""
        before = self.gates.by_site(deterministic_gate(self.refreshed_at)) if self.refreshed_at is not None else {}
        self.refreshed_at = log_alpha
        for path, z in self.gates.by_site(deterministic_gate(log_alpha)).items():
            if path in before and torch.equal(before[path], z):  # nothing moved
                continue
            self.structures[path] = structure_of(self.blocks[path], self.dense[path], self.channels[path], z, self.options.ks_weight > 0)

    def data_terms(self, batch: PackedBatch, rows: Sequence[Sequence[Example]], totals: Totals, place: int) -> Terms:
        """Cross-entropy and distillation, with a draw of the gates for these rows alone: independent draws average out."""
        o, draw = self.options, f"{self._draw} {place}"
        self.gates.sample_(draw)
        self.ffn.sample_(f"{draw} ffn")
        images = [row[0].image for row in rows]
        own = self._own(batch, images)
        logits = answer_logits(self.model, own)
        terms = {"cross_entropy": (o.cross_entropy_weight, objective.cross_entropy(logits, batch.targets) / totals.targets)}
        if o.distillation_weight:
            value = objective.distillation(logits, self._teacher(batch, own, images), o.distillation_temperature)
            terms["distillation"] = (o.distillation_weight, value / totals.targets)
        return terms

    def _own(self, batch: PackedBatch, images: Sequence[Path]) -> PackedBatch:
        """What the gated model reads: with the features of images that it knows, if these do not change."""
        return batch if self.cache is None else self.cache.replace(batch, images)

    @torch.no_grad()
    def _teacher(self, batch: PackedBatch, own: PackedBatch, images: Sequence[Path]) -> torch.Tensor:
        """The teacher's logits. Every time anew: with a large vocabulary, those of all answers would be too large to keep."""
        if self.taught is not None:
            return self.taught(batch, images)
        with self.gates.opened(), self.ffn.opened():
            return answer_logits(self.model, own)

    def shared_terms(self, step: int) -> Terms:
        """Rate, KS and budget, functions of the gates alone."""
        o, sampled = self.options, self.gates.sample_(self._draw)
        device = self.gates.log_alpha.device
        heads = self.costs.share(open_probability(self.gates.log_alpha).cpu().double())  # on the CPU: not every device has float64
        cost = (heads * self.costs.dense + self.ffn.cost()) / (self.costs.dense + self.ffn.dense)
        terms = {"budget": (1.0, self.budget.penalty(cost).float().to(device)), "cost": (0.0, cost.float().to(device))}
        if o.rate_weight:
            terms["rate"] = (o.rate_weight, objective.relative_rate(self.structures, sampled))
        if o.ks_weight:
            terms["ks"] = (o.ks_weight, objective.mean_ks(self.structures, sampled))
        return terms

    def end(self, step: int, values: dict[str, float]) -> bool:
        """Ascend the multipliers and validate now and then; gates never stop early, their budget must converge."""
        self.budget.ascend(values["cost"], self.options.multiplier_rate)
        values |= {"mu_1": self.budget.linear, "mu_2": self.budget.quadratic}
        if (step + 1) % self.options.evaluate_every == 0 or step + 1 == self.steps:
            values["validation"] = self.validate(step + 1)
        return False

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """Data terms of the objective, per answer token of the validation questions, with the gates that choosing leaves open."""
        choice = self.same(choose(self.gates, self.costs, self.ffn, self.budget.target, self.multiple))
        close_(self.gates, self.blocks, choice.kept, self.compensation)
        self.ffn.close_(choice.sizes or {})
        if not self.moving and choice == self.best.choice and self.best.step >= 0:  # measured before
            self.best.losses[step] = self.best.loss
            return self.best.loss
        o, total, targets = self.options, 0.0, 0
        for batch, images in self.validation():
            with torch.autocast(batch.targets.device.type, torch.bfloat16, enabled=self.autocast):
                own = self._own(batch, images)
                logits = answer_logits(self.model, own)
                teacher = self._teacher(batch, own, images) if o.distillation_weight else logits
            total += o.cross_entropy_weight * float(objective.cross_entropy(logits, batch.targets))
            total += o.distillation_weight * float(objective.distillation(logits, teacher, o.distillation_temperature))
            targets += len(batch.targets)
        if self.moving:  # earlier choices were validated with other weights
            self.best.loss = float("inf")
        (loss,) = self.agree(total / targets)
        check_finite(self.name, step, loss)
        self.best.update(choice, loss, step)
        return loss

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Multipliers, costs (measured ones differ from run to run), gates of the last refresh, those of all refreshes, the best choice."""
        assert self.refreshed_at is not None
        meta = {"linear": self.budget.linear, "quadratic": self.budget.quadratic, "trajectory": self.trajectory}
        choice = [self.best.choice.kept, self.best.choice.sizes]
        meta |= {"best": [self.best.loss, self.best.step, *choice], "losses": list(self.best.losses.items())}
        return {"refreshed_at": self.refreshed_at, "fixed": self.costs.fixed, "unit": self.costs.unit}, meta

    def restore(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """See :meth:`state`."""
        self.budget.linear, self.budget.quadratic, self.trajectory = meta["linear"], meta["quadratic"], meta["trajectory"]
        self.costs = replace(self.costs, fixed=tensors["fixed"], unit=tensors["unit"])
        loss, step, kept, sizes = meta["best"]
        self.best = BestGates(Choice(kept, sizes), loss, step, dict(meta["losses"]))
        self.refresh(tensors["refreshed_at"].to(self.gates.log_alpha.device))


def choose(gates: HeadGates, costs: Costs, ffn: FFNGates, target: float, multiple: int) -> Choice:
    """What gates leave open, at exactly the budget but for what comes whole.

    Where FFNs have gates, heads get the share of their cost that they have come to, FFNs, in multiples of ``multiple``, the rest, and heads
    what is left of that.

    Args:
        gates: On heads.
        costs: Of the blocks.
        ffn: On FFNs, without parts where these have none.
        target: Share of the dense cost of all that is gated.
        multiple: Of ranks and widths.

    Raises:
        BudgetError: The units that must stay, or the smallest FFNs, take more.
    """
    if not ffn.parts:
        return Choice(binarise(gates, costs, target))
    least = sum(costs.block(number, site.min_units) for number, site in enumerate(gates.sites)) / costs.dense
    # To the nearest unit: rounding alone would otherwise take one from heads that have not moved.
    reached = float(costs.share(open_probability(gates.log_alpha.detach()).cpu().double()) + 0.5 * costs.unit.min() / costs.dense)
    budget = target * (costs.dense + ffn.dense)
    most = (budget - ffn.least(multiple)) / costs.dense
    kept = binarise(gates, costs, min(max(reached, least), most, 1.0))
    heads = sum(costs.block(number, len(kept[site.path])) for number, site in enumerate(gates.sites))
    sizes = ffn.within(budget - heads, multiple)
    return Choice(binarise(gates, costs, min((budget - ffn.cost_of(sizes)) / costs.dense, 1.0)), sizes)


def binarise(gates: HeadGates, costs: Costs, target: float) -> dict[str, list[int]]:
    """Units to keep by path: the least open gates close, no block going below what it must keep, until the cost is within the target.

    What then still fits opens again, the most open first, in blocks that have not gone as a whole: under costs with a fixed part the last
    unit of a block sets free more than was asked for.

    Args:
        gates: Trained.
        costs: Of its blocks.
        target: Share of the dense cost of the gated blocks.

    Raises:
        BudgetError: The units that must stay already take more.
    """
    owner = costs.owner.tolist()
    left = [site.num_units for site in gates.sites]
    closed: set[int] = set()
    budget = target * costs.dense
    spent = costs.dense
    for index in torch.argsort(gates.log_alpha.detach().cpu(), stable=True).tolist():
        if spent <= budget * (1 + 1e-9):
            break
        block = owner[index]
        if left[block] > gates.sites[block].min_units:
            left[block] -= 1
            closed.add(index)
            spent -= float(costs.unit[index]) + (float(costs.fixed[block]) if left[block] == 0 else 0.0)
    if spent > budget * (1 + 1e-9):
        raise BudgetError(f"What must stay already takes {spent / costs.dense:.3f} of the attention's cost, above {target:.3f}.")
    for index in torch.argsort(gates.log_alpha.detach().cpu(), stable=True, descending=True).tolist():
        if index in closed and left[owner[index]] and spent + float(costs.unit[index]) <= budget * (1 + 1e-9):
            left[owner[index]] += 1
            closed.remove(index)
            spent += float(costs.unit[index])
    flat = torch.tensor([float(index not in closed) for index in range(len(owner))])
    return {path: part.nonzero().flatten().tolist() for path, part in gates.by_site(flat).items()}


def close_(gates: HeadGates, blocks: dict[str, Block], kept: dict[str, list[int]], compensation: Compensation) -> None:
    """Put gates at exactly 0 and 1 in force, with the compensation for the units that stay."""
    gates.close_(kept, {path: closed(blocks[path], units, compensation) for path, units in kept.items()})


@torch.no_grad()
def masked_logits(
    model: Any, gates: HeadGates, blocks: dict[str, Block], choice: Choice, batch: PackedBatch, compensation: Compensation,
    ffn: FFNGates | None = None,
) -> torch.Tensor:  # fmt: skip
    """Answer logits of the dense model with gates at exactly 0 and 1, compensation set for the units that stay."""
    ffn = ffn or FFNGates([])
    with gates.attached(model), ffn.attached(model):
        close_(gates, blocks, choice.kept, compensation)
        ffn.close_(choice.sizes or {})
        return answer_logits(model, batch)


def check_agreement(masked: torch.Tensor, compacted: torch.Tensor) -> float:
    """Largest difference of logits relative to the largest logit.

    Raises:
        PlanError: Above :data:`AGREEMENT`; the compacted model is not the one that was trained.
    """
    difference = float((masked - compacted).abs().max() / masked.abs().max().clamp_min(1e-12))
    if not difference <= AGREEMENT:
        raise PlanError(
            f"The compacted model differs from the gated one by {difference:.2g} of its logits; nothing was kept. Please report this."
        )
    return difference
