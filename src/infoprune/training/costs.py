"""What gated blocks cost, in FLOPs or in measured time, as a function of which gates are open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from infoprune.architecture import AttentionSite
from infoprune.evaluation.cost import Workload, attention_flops
from infoprune.site_costs import attention_name, runs_of
from infoprune.timing.stopwatch import median_seconds
from infoprune.timing.works import PASS, BlockCall, calls_of

REPEATS, WARMUP = 30, 3


@dataclass(frozen=True)
class Costs:
    """Costs of the gated blocks for one example, in any unit.

    Attributes:
        fixed: (blocks,) what a block costs as soon as it has any unit.
        unit: (units of all blocks,) what each unit adds.
        owner: (units of all blocks,) the block each unit belongs to.
        always: (blocks,) whether a block must keep a unit, so that its fixed cost can't go.
    """

    fixed: torch.Tensor
    unit: torch.Tensor
    owner: torch.Tensor
    always: torch.Tensor

    @property
    def dense(self) -> float:
        """With all units."""
        return float(self.fixed.sum() + self.unit.sum())

    def block(self, number: int, units: int) -> float:
        """Cost of one block with ``units`` of its units."""
        step = float(self.unit[self.owner == number][0])
        return (float(self.fixed[number]) + units * step) if units or self.always[number] else 0.0

    def share(self, open_: torch.Tensor) -> torch.Tensor:
        """Expected share of the dense cost when units are open with independent probabilities ``open_`` (units,), float64.

        A block has any unit with probability 1 - prod_u (1 - p_u).
        """
        shut = torch.zeros_like(self.fixed).index_add(0, self.owner, torch.log1p(-open_.clamp(max=1 - 1e-12))).exp()
        any_ = torch.where(self.always, torch.ones_like(shut), 1 - shut)
        return ((self.fixed * any_).sum() + (self.unit * open_).sum()) / self.dense


def _costs(sites: Sequence[AttentionSite], fixed: Sequence[float], step: Sequence[float]) -> Costs:
    owner = [number for number, site in enumerate(sites) for _ in range(site.num_units)]
    return Costs(
        torch.tensor(fixed, dtype=torch.float64),
        torch.tensor([step[number] for number in owner], dtype=torch.float64),
        torch.tensor(owner),
        torch.tensor([site.min_units > 0 for site in sites]),
    )


def flop_costs(sites: Sequence[AttentionSite], workload: Workload) -> Costs:
    """FLOPs of ``sites``, in closed form; the fixed part is what the query heads of a multi-query block share."""
    dense = [attention_flops(site, site.num_units, workload) for site in sites]
    step = [d - attention_flops(s, s.num_units - 1, workload) if s.num_units > 1 else d for s, d in zip(sites, dense, strict=True)]
    return _costs(sites, [d - s.num_units * u for s, d, u in zip(sites, dense, step, strict=True)], step)


@torch.no_grad()
def time_costs(model: nn.Module, sites: Sequence[AttentionSite], inputs: dict[str, torch.Tensor], workload: Workload) -> Costs:
    """Measured seconds of ``sites`` in one forward pass over ``inputs``: a line through blocks with all units and with one.

    Blocks of the same name and FLOPs are timed once, on what really reaches them. On short inputs most of a block's time is fixed, so this
    cost makes whole blocks go where FLOPs would thin all of them.
    """
    measured: dict[str, tuple[float, float]] = {}
    lines = []
    calls, device = calls_of(model, sites, inputs), next(model.parameters()).device
    for site in sites:
        name = attention_name(site, runs_of(site.tower, workload)[0], workload)
        if name not in measured:
            measured[name] = _line(calls[site.path, PASS], site, device)
        lines.append(measured[name])
    return _costs(sites, [fixed for fixed, _ in lines], [step for _, step in lines])


def _line(call: BlockCall, site: AttentionSite, device: torch.device) -> tuple[float, float]:
    """Seconds: (fixed, per unit) of one block."""
    sizes = [site.num_units, 1] if site.num_units > 1 else [1]
    full, *fewer = median_seconds([call.shaped(site, size) for size in sizes], device, repeats=REPEATS, warmup=WARMUP)
    if not fewer:
        return 0.0, full
    step = max(full - fewer[0], 0.0) / (site.num_units - 1)
    return max(fewer[0] - step, 0.0), step
