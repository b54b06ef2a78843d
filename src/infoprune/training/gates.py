"""Hard-concrete gates on attention heads: which units a block keeps, learned by gradient descent on frozen weights.

A gated block reads, at its output projection's input,

    c~_u = z_u c_u + (1 - z_u) (m_u + C_u (c - m))

for each unit u: its own context while the gate is open, and what the units that stay can linearly reproduce of it when it is closed
(C = 0 where only means are put in their place, and no m either without compensation). Gates therefore learn what a unit adds to the
others, and a closed gate equals removal with the compensation of :func:`infoprune.criteria.heads.compensate`, exactly.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from scipy.optimize import root_scalar
from torch import nn

from infoprune.architecture import AttentionSite
from infoprune.training.costs import Costs

STRETCH_LOW, STRETCH_HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
# P(z != 0) = sigmoid(a + OPEN_SHIFT), so a gate is more likely open than not above -OPEN_SHIFT.
OPEN_SHIFT = -TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH)


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
    """P(z != 0) = sigmoid(a - b ln(-gamma / zeta)), same reference, eq. 12."""
    return torch.sigmoid(log_alpha + OPEN_SHIFT)


def deterministic_gate(log_alpha: torch.Tensor) -> torch.Tensor:
    """The deterministic gate clip(sigmoid(a) (zeta - gamma) + gamma, 0, 1), same reference, eq. 13."""
    return (torch.sigmoid(log_alpha) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def start_locations(percentiles: torch.Tensor, spread: float, costs: Costs, target: float) -> torch.Tensor:
    """Locations a = spread (percentile - 1/2) + shift, the shift being such that the expected cost is the target from the first step.

    Training then moves gates against each other within the budget. Gates that all start open have to be driven there first, by a penalty
    that for most of the training outweighs what the data say.

    Args:
        percentiles: (units of all blocks,) place of each unit in a ranking, 0 for the first to go.
        spread: How far the first and the last start apart; 0: all equal.
        costs: Of the units.
        target: Share of their dense cost, in (0, 1].
    """
    centred = (percentiles.double() - 0.5) * spread
    far = spread + 30.0  # beyond it all gates are open, or all shut

    def excess(shift: float) -> float:
        return float(costs.share(open_probability(centred + shift))) - target

    if excess(far) <= 0 or excess(-far) >= 0:  # everything may stay, or even what must stay is too much, which binarising will say
        return (centred + (far if excess(far) <= 0 else -far)).float()
    return (centred + root_scalar(excess, bracket=(-far, far), xtol=1e-9).root).float()


class Gates(nn.Module, ABC):
    """Gates that can be put on a model and taken off.

    Attributes:
        values: The gates in force; ``None``: all open, the dense model.
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
        """The dense model, for the teacher's forward pass."""
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
        self._compensation: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def by_site(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split a (units of all blocks,) tensor by block."""
        return {site.path: part for site, part in zip(self.sites, flat.split([s.num_units for s in self.sites]), strict=True)}

    def sample_(self, seed: str) -> dict[str, torch.Tensor]:
        """Draw gates and put them in force; the same ``seed`` draws the same ones, whatever was drawn before."""
        self.values = self.by_site(hard_concrete(self.log_alpha, uniform_draws(seed, self.log_alpha)))
        return self.values

    def compensate_(self, path: str, coefficient: torch.Tensor, mean: torch.Tensor) -> None:
        """Set C (columns, columns) and m (columns,) of one block; see the module's docstring."""
        self._compensation[path] = coefficient.to(self.log_alpha), mean.to(self.log_alpha)

    def hooks(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """Put the gates on; see :class:`Gates`."""
        for site in self.sites:
            yield model.get_submodule(f"{site.path}.{site.names.out}").register_forward_pre_hook(self._hook(site)).remove

    def _hook(self, site: AttentionSite) -> Any:
        def gate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.values is None:
                return None
            context = args[0]
            z = self.values[site.path].repeat_interleave(site.unit_width).to(context.dtype)
            if site.path not in self._compensation:
                return (context * z, *args[1:])
            coefficient, mean = (part.to(context.dtype) for part in self._compensation[site.path])
            reproduced = mean + (context - mean) @ coefficient.T
            return (context * z + reproduced * (1 - z), *args[1:])

        return gate
