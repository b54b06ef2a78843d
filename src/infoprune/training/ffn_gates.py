"""Gates on the sizes of FFNs: how many directions of the ordered spectrum, or how many neurons, each keeps, learned along with the heads.

Directions of a factorised linear have an order, and so have neurons; what is to be learned of either is one number, the size. It has
one location l, and direction k of n takes a hard-concrete gate whose location falls along the order,

    a_k = l - STEEPNESS p_k,    p_k = (step of k + 1/2) / number of steps,

with one draw for all of them: a sampled gate is a random size with a soft edge. The gated output is the dense one without the part of
what is closed that varies,

    y(z) = y - B ((1 - z) * (A x - E[A x])),    or, of neurons,    W (z * h + (1 - z) * E[h]),

so that gates at 0 and 1 equal the factorised or narrowed FFN with its bias correction, before any refit. Ranks that would not make a
linear cheaper share the last step, which leaves it dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infoprune.architecture import FFNSite, TowerName
from infoprune.criteria.ffn import Factorization
from infoprune.errors import BudgetError
from infoprune.options import CompressionOptions
from infoprune.plan import FFNDecision, max_rank
from infoprune.site_costs import FlopCosts
from infoprune.site_statistics import SiteStatistics, Statistics
from infoprune.solve import SolvedSite, factorizations_of
from infoprune.training.gates import Gates, hard_concrete, uniform_draws

STEEPNESS = 60.0  # an edge is then soft over some 7% of the order, and a rate of 0.3 moves it by 0.5% a step
NEURONS = "keep_neurons"
Sizes = dict[str, dict[str, int]]  # by path and name of a decision's field; what is not there stays dense


@dataclass(frozen=True)
class Truncated:
    """A factorised linear, float32: A (n, in), B (out, n) and E[A x] (n,)."""

    path: str
    a: torch.Tensor
    b: torch.Tensor
    seen: torch.Tensor

    def attach(self, model: nn.Module, gate: Callable[[], torch.Tensor | None]) -> Callable[[], None]:
        """Put ``gate`` in force; returns what takes it off."""

        def close(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            z = gate()
            if z is None:
                return None
            return output - nn.functional.linear((1 - z) * (nn.functional.linear(args[0], self.a) - self.seen), self.b)

        return model.get_submodule(self.path).register_forward_hook(close).remove


@dataclass(frozen=True)
class Narrowed:
    """A down projection whose neurons have the means E[h] (m,), zeros where none are left behind."""

    path: str
    mean: torch.Tensor

    def attach(self, model: nn.Module, gate: Callable[[], torch.Tensor | None]) -> Callable[[], None]:
        """Put ``gate`` in force; returns what takes it off."""

        def close(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            z = gate()
            return None if z is None else (args[0] * z + self.mean * (1 - z), *args[1:])

        return model.get_submodule(self.path).register_forward_pre_hook(close).remove


@dataclass(frozen=True)
class FFNPart:
    """What of one FFN has one size.

    Attributes:
        path: Of the FFN.
        tower: That it is in.
        names: Fields of a decision that take the size.
        step: (n,) at which step each direction or neuron comes in, from 0.
        costs: (steps,) FLOPs that each step adds, float64; all of them make the dense cost.
        linears: What is gated.
    """

    path: str
    tower: TowerName
    names: tuple[str, ...]
    step: torch.Tensor
    costs: torch.Tensor
    linears: tuple[Truncated | Narrowed, ...]

    @property
    def steps(self) -> int:
        """Sizes above zero; the last of them is dense."""
        return len(self.costs)

    def places(self, index: torch.Tensor) -> torch.Tensor:
        """Place of a step in the order, (index + 1/2) / steps."""
        return (index + 0.5) / self.steps

    def size_of(self, location: float, multiple: int) -> int:
        """Steps that are open at a location, a multiple of ``multiple`` or all of them, and no less than one multiple."""
        size = round(location / STEEPNESS * self.steps)
        return self.steps if size >= self.steps else min(max(size // multiple, 1) * multiple, self.steps)


class FFNGates(Gates):
    """One location per part of every gated FFN.

    Attributes:
        parts: What is gated.
        location: (parts,) l.
        values: One (n,) per part.
    """

    def __init__(self, parts: Sequence[FFNPart], sizes: Mapping[str, Mapping[str, int]] | None = None) -> None:
        super().__init__()
        self.parts = list(parts)
        starts = [(sizes or {}).get(part.path, {}).get(part.names[0], part.steps) / part.steps for part in parts]
        self.location = nn.Parameter(STEEPNESS * torch.tensor(starts, dtype=torch.float32))

    @property
    def dense(self) -> float:
        """FLOPs of all parts as they were."""
        return sum(float(part.costs.sum()) for part in self.parts)

    def cost(self) -> torch.Tensor:
        """Expected FLOPs, a step counting where its gate is more open than shut: P(z > 1/2) = sigmoid(a). A float64 scalar."""
        total = torch.zeros((), dtype=torch.float64)
        for part, location in zip(self.parts, self.location.cpu().double(), strict=True):
            places = part.places(torch.arange(part.steps, dtype=torch.float64))
            total = total + (part.costs * torch.sigmoid(location - STEEPNESS * places)).sum()
        return total

    def cost_of(self, sizes: Mapping[str, Mapping[str, int]]) -> float:
        """FLOPs of all parts at these sizes."""
        return sum(float(part.costs[: sizes.get(part.path, {}).get(part.names[0], part.steps)].sum()) for part in self.parts)

    def least(self, multiple: int) -> float:
        """FLOPs of the smallest sizes."""
        return sum(float(part.costs[: part.size_of(-2 * STEEPNESS, multiple)].sum()) for part in self.parts)

    def sample_(self, seed: str) -> None:
        """Draw gates and put them in force; the same ``seed`` draws the same ones."""
        uniform = uniform_draws(seed, self.location)
        self.values = [
            hard_concrete(location - STEEPNESS * part.places(part.step), u)
            for part, location, u in zip(self.parts, self.location, uniform, strict=True)
        ]

    def close_(self, sizes: Mapping[str, Mapping[str, int]]) -> None:
        """Put gates at exactly 0 and 1 in force."""
        self.values = [(part.step < sizes.get(part.path, {}).get(part.names[0], part.steps)).to(self.location.dtype) for part in self.parts]

    def hooks(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """Put the gates on; see :class:`Gates`."""
        for number, part in enumerate(self.parts):

            def gate(number: int = number) -> torch.Tensor | None:
                return None if self.values is None else self.values[number]

            for linear in part.linears:
                yield linear.attach(model, gate)

    def within(self, budget: float, multiple: int) -> Sizes:
        """Sizes within ``budget`` FLOPs that are as near to the locations as one shift of all of them allows.

        Raises:
            BudgetError: The smallest sizes take more.
        """
        locations = self.location.detach().cpu().tolist()

        def at(shift: float) -> list[int]:
            return [part.size_of(location + shift, multiple) for part, location in zip(self.parts, locations, strict=True)]

        def cost(sizes: list[int]) -> float:
            return sum(float(part.costs[:size].sum()) for part, size in zip(self.parts, sizes, strict=True))

        low, high = -2 * STEEPNESS - max(locations, default=0.0), 2 * STEEPNESS - min(locations, default=0.0)
        if cost(at(low)) > budget * (1 + 1e-9):
            raise BudgetError(f"The smallest FFNs take {cost(at(low)):.4g} FLOPs, more than the {budget:.4g} that are left for them.")
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(at(middle)) <= budget * (1 + 1e-9) else (low, middle)
        found: Sizes = {}
        for part, size in zip(self.parts, at(low), strict=True):
            if size < part.steps:
                found.setdefault(part.path, {}).update(dict.fromkeys(part.names, size))
        return found


def sizes_of(decisions: Mapping[str, FFNDecision]) -> Sizes:
    """The sizes that decisions have, by path and field."""
    return {
        path: decision.ranks if decision.keep_neurons is None else {NEURONS: len(decision.keep_neurons)}
        for path, decision in decisions.items()
    }


@torch.no_grad()
def ffn_parts(
    model: nn.Module, solved: Sequence[SolvedSite], statistics: Statistics, options: CompressionOptions, costs: FlopCosts
) -> list[FFNPart]:
    """What of every solved FFN can be gated; parts that no rank makes cheaper are left out."""
    found = []
    for item in solved:
        if isinstance(item.site, FFNSite):
            parts = _widths if item.neurons is not None else _ranks
            found += parts(model, item, item.site, statistics.sites[item.site.path], options, costs)
    return found


def _widths(
    model: nn.Module, item: SolvedSite, site: FFNSite, statistics: SiteStatistics, options: CompressionOptions, costs: FlopCosts
) -> list[FFNPart]:
    assert item.neurons is not None and statistics.neurons is not None
    linear: Any = model.get_submodule(f"{site.path}.{site.names.down}")
    m = site.intermediate_size
    step = torch.empty(m, dtype=torch.long)
    step[item.neurons.order.flip(0)] = torch.arange(m)
    mean = statistics.neurons.mean if options.centred else torch.zeros(m)
    narrowed = Narrowed(f"{site.path}.{site.names.down}", mean.to(linear.weight.device, torch.float32))
    each = torch.full((m,), costs.ffn(site, None) / m, dtype=torch.float64)
    return [FFNPart(site.path, site.tower, (NEURONS,), step.to(linear.weight.device), each, (narrowed,))]


def _ranks(
    model: nn.Module, item: SolvedSite, site: FFNSite, statistics: SiteStatistics, options: CompressionOptions, costs: FlopCosts
) -> list[FFNPart]:
    factors, names = factorizations_of(model, site, statistics, options), site.names
    inputs: dict[str, list[str]] = {"joint_rank": [names.gate or "", names.up], "gate_rank": [names.gate or ""], "up_rank": [names.up]}
    dense_inputs, dense_down = costs.linears(site)
    groups = [(tuple(name for name in factors if name != "down_rank"), dense_inputs), (("down_rank",), dense_down)]
    parts = []
    for fields, dense in groups:
        top = min(max_rank(site, field) for field in fields)
        if top < 1:
            continue
        saved = costs.ffn(site, None) - costs.ffn(site, FFNDecision.model_validate(dict.fromkeys(fields, 1)))
        each = torch.full((top + 1,), dense - saved, dtype=torch.float64)
        each[top] = dense - top * float(each[0])
        linears = [
            linear for field in fields for linear in _truncated(model, site, factors[field], inputs.get(field, [names.down]))
        ]  # fmt: skip
        step = torch.arange(len(linears[0].seen), device=linears[0].a.device).clamp(max=top)
        parts.append(FFNPart(site.path, site.tower, fields, step, each, tuple(linears)))
    return parts


def _truncated(model: nn.Module, site: FFNSite, factorization: Factorization, names: Sequence[str]) -> list[Truncated]:
    """The linears of one factorisation, gate above up where it has both."""
    a, b, seen = factorization.directions(len(factorization.energies))
    first: Any = model.get_submodule(f"{site.path}.{names[0]}")
    a, b, seen = (piece.to(first.weight.device, torch.float32) for piece in (a, b, seen))
    return [Truncated(f"{site.path}.{name}", a, part, seen) for name, part in zip(names, b.chunk(len(names)), strict=True)]
