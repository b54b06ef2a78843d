"""Hard-concrete gates on attention heads: which units a block keeps, learned by gradient descent on frozen weights.

A gated block's output projection reads the best linear estimate of its contexts from what passes the gates
(:mod:`infoprune.training.structure`): a unit's own context while its gate is open, and what the open units reproduce of it when it is
closed; with less compensation its mean, or nothing. Gates therefore learn what a unit adds to the others, and gates at 0 and 1 equal
removal with the compensation of :func:`infoprune.criteria.heads.compensate`, exactly.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from scipy.optimize import root_scalar
from torch import nn

from infoprune.architecture import AttentionSite
from infoprune.training.costs import Costs
from infoprune.training.structure import Channel, StandIn

STRETCH_LOW, STRETCH_HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3


def hard_concrete(log_alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample gates (Louizos, Welling & Kingma, "Learning sparse neural networks through L0 regularization", 2018, eq. 10-12).

    s = sigmoid((ln u - ln(1 - u) + a) / b), z = clip(s (zeta - gamma) + gamma, 0, 1) with b = 2/3, gamma = -0.1, zeta = 1.1.

    Args:
        log_alpha: (...,) locations a.
        uniform: (...,) draws from (0, 1).

    Returns:
        (...,) gates in [0, 1], exactly 0 and 1 with positive probability.
    """
    s = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / TEMPERATURE)
    return (s * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(z > 1/2) = sigmoid(a): whether a draw is more open than shut.

    What a gate costs. Not P(z > 0) = sigmoid(a - b ln(-gamma / zeta)) of the reference's eq. 12: at a = 0, where rounding decides, that is
    0.83, so a budget in it buys units that hardly any draw has.
    """
    return torch.sigmoid(log_alpha)


def deterministic_gate(log_alpha: torch.Tensor) -> torch.Tensor:
    """The deterministic gate clip(sigmoid(a) (zeta - gamma) + gamma, 0, 1), same reference, eq. 13."""
    return (torch.sigmoid(log_alpha) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def start_locations(percentiles: torch.Tensor, spread: float, costs: Costs, target: float) -> torch.Tensor:
    """Locations in the order of ``percentiles``, shifted so that the expected cost is the target from the first step.

    Training then moves gates against each other within the budget. Gates that all start open have to be driven there first, by a penalty
    that for most of the training outweighs what the data say. What goes takes one half of the spread and what stays the other, however
    few: evenly spread, the few of a small budget would all start close to going.

    Args:
        percentiles: (units of all blocks,) place of each unit in a ranking, 0 for the first to go.
        spread: How far the first and the last start apart; 0: all equal.
        costs: Of the units.
        target: Share of their dense cost, in (0, 1].
    """
    goes = min(max(_break(percentiles, costs, target), 1e-6), 1 - 1e-6)
    above = percentiles.double() - goes
    centred = spread / 2 * torch.where(above > 0, above / (1 - goes), above / goes)
    far = spread + 30.0  # beyond it all gates are open, or all shut

    def excess(shift: float) -> float:
        return float(costs.share(open_probability(centred + shift))) - target

    if excess(far) <= 0 or excess(-far) >= 0:  # everything may stay, or even what must stay is too much, which binarising will say
        return (centred + (far if excess(far) <= 0 else -far)).float()
    return (centred + root_scalar(excess, bracket=(-far, far), xtol=1e-9).root).float()


def _break(percentiles: torch.Tensor, costs: Costs, target: float) -> float:
    """The percentile between what stays at a share of the cost, from the highest down, and what goes."""
    order = torch.argsort(percentiles, descending=True, stable=True).tolist()
    spent, begun = 0.0, set()
    for place, index in enumerate(order):
        block = int(costs.owner[index])
        spent += float(costs.unit[index]) + (0.0 if block in begun else float(costs.fixed[block]))
        begun.add(block)
        if spent > target * costs.dense * (1 + 1e-9):
            above = float(percentiles[order[place - 1]]) if place else 1.0
            return (above + float(percentiles[index])) / 2
    return 0.0


class Gates(nn.Module, ABC):
    """Gates that can be put on a model and taken off.

    Attributes:
        values: The gates in force; ``None``: all open, the model as it is.
    """

    values: Any = None

    @abstractmethod
    def hooks(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """Put the gates on, one after the other; gives what takes each off."""

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[Gates]:
        """Gate ``model`` for the time of the block; nothing stays behind."""
        with ExitStack() as stack:
            for remove in self.hooks(model):
                stack.callback(remove)
            try:
                yield self
            finally:
                self.values = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The model as it is, for the teacher's forward pass."""
        held, self.values = self.values, None
        try:
            yield
        finally:
            self.values = held


def uniform_draws(seed: str, like: torch.Tensor) -> torch.Tensor:
    """As many draws from (0, 1) as ``like`` has entries; the same ``seed`` draws the same ones, whatever was drawn before."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
    return torch.rand(like.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(like.device)


class HeadGates(Gates):
    """One gate per unit of every gated block.

    Attributes:
        sites: The gated blocks.
        log_alpha: (units of all blocks,) locations, one parameter so that the optimiser has one tensor to step.
        values: (units,) by path.
    """

    def __init__(self, sites: list[AttentionSite], initial: float | torch.Tensor = 0.0) -> None:
        super().__init__()
        self.sites = sites
        self.log_alpha = nn.Parameter(torch.zeros(sum(site.num_units for site in sites)) + initial)
        self._channels: dict[str, Channel] = {}
        self._closed: dict[str, StandIn] = {}

    def by_site(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split a (units of all blocks,) tensor by block."""
        return {site.path: part for site, part in zip(self.sites, flat.split([s.num_units for s in self.sites]), strict=True)}

    def sample_(self, seed: str) -> dict[str, torch.Tensor]:
        """Draw gates and put them in force; the same ``seed`` draws the same ones, whatever was drawn before."""
        self.values, self._closed = self.by_site(hard_concrete(self.log_alpha, uniform_draws(seed, self.log_alpha))), {}
        return self.values

    def close_(self, kept: dict[str, list[int]], stand_ins: dict[str, StandIn]) -> None:
        """Put gates at exactly 0 and 1 in force, and what then stands in for what is shut."""
        gates = {site.path: [float(unit in kept[site.path]) for unit in range(site.num_units)] for site in self.sites}
        self.values = {path: torch.tensor(z, device=self.log_alpha.device) for path, z in gates.items()}
        self._closed = {path: found.to(self.log_alpha) for path, found in stand_ins.items()}

    def connect_(self, path: str, channel: Channel) -> None:
        """Set what a block's contexts are while its gates move; without it gates multiply them."""
        self._channels[path] = channel.to(self.log_alpha.device, self.log_alpha.dtype)

    def hooks(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """Put the gates on; see :class:`Gates`."""
        for site in self.sites:
            yield model.get_submodule(f"{site.path}.{site.names.out}").register_forward_pre_hook(self._hook(site)).remove

    def _hook(self, site: AttentionSite) -> Any:
        def gate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.values is None:
                return None
            context, z = args[0], self.values[site.path]
            found = self._closed.get(site.path)
            if found is None and site.path in self._channels:
                found = self._channels[site.path].stand_in(z)
            if found is None:
                return (context * z.repeat_interleave(site.unit_width).to(context.dtype), *args[1:])
            context = found.replace(context) if len(found.rest) else context
            # Processes that share a model meet in every layer's backward pass, so that all must have one, whatever was drawn.
            return (context + 0 * z.sum().to(context.dtype) if z.requires_grad else context, *args[1:])

        return gate
