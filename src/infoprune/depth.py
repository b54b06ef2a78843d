"""Drop whole layers by their block influence (ShortGPT: Men et al., arXiv 2403.03853), in either tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infoprune.architecture import AttentionSite, FFNSite
from infoprune.errors import BudgetError
from infoprune.plan import FFNDecision, HeadDecision


@dataclass(frozen=True)
class Layer:
    """A layer that may be dropped.

    Attributes:
        attention, ffn: Its blocks.
        influence: BI = 1 - E[cos(x, x')] over calibration tokens, x what the layer reads and x' what it leaves; in [0, 2].
        loss: Second-order loss of dropping both blocks without compensation, 1/2 E[o^T F o] each, in nats per example.
    """

    attention: AttentionSite
    ffn: FFNSite
    influence: float
    loss: float


def least_influential(layers: Sequence[Layer], costs: Sequence[float], fixed: float, budget: float) -> list[Layer]:
    """Layers to drop: in the order of their influence until what remains costs no more than ``budget``.

    Layers of two towers cost differently, so some that went early may be spared by what went last; those are put back, the most
    influential first.

    Args:
        layers: Those that may go.
        costs: What each costs.
        fixed: What all else costs.
        budget: Upper bound on the whole.

    Raises:
        BudgetError: Even without any of them the model costs more.
    """
    total = fixed + sum(costs)
    limit = budget + 1e-9 * total
    if fixed > limit:
        smallest = math.ceil(fixed / total * 1000) / 1000
        raise BudgetError(
            f"flops={budget / total:g} is out of reach: without any layer that may go, the smallest share is {smallest:g}. "
            "Ask for that or more, or cut heads and FFNs instead of layers."
        )
    order = sorted(range(len(layers)), key=lambda index: layers[index].influence)
    dropped: list[int] = []
    for index in order:
        if total <= limit:
            break
        dropped.append(index)
        total -= costs[index]
    for index in reversed(dropped.copy()):
        if total + costs[index] <= limit:
            dropped.remove(index)
            total += costs[index]
    return [layers[index] for index in sorted(dropped)]


def without(layers: Sequence[Layer]) -> tuple[dict[str, HeadDecision], dict[str, FFNDecision]]:
    """Decisions by path that drop ``layers`` whole, without compensation."""
    heads = {layer.attention.path: HeadDecision(keep_units=(), num_units=layer.attention.num_units, compensate="none") for layer in layers}
    return heads, {layer.ffn.path: FFNDecision(keep_neurons=(), num_neurons=layer.ffn.intermediate_size) for layer in layers}
