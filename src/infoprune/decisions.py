"""What deciding leads to."""

from __future__ import annotations

from dataclasses import dataclass

from infoprune.architecture import AttentionSite
from infoprune.criteria.heads import Removal
from infoprune.options import CompressionOptions
from infoprune.plan import FFNDecision, HeadDecision


@dataclass(frozen=True)
class Decisions:
    """The outcome: heads and ranks by path, the predicted loss in nats per example and, under a budget, what the model is to cost."""

    heads: dict[str, HeadDecision]
    ffn: dict[str, FFNDecision]
    predicted_loss: float
    predicted_cost: float | None = None


def head_decision(site: AttentionSite, removal: Removal, count: int, options: CompressionOptions) -> HeadDecision:
    """Remove the first ``count`` units of an order."""
    kept = tuple(u for u in range(site.num_units) if u not in removal.order[:count])
    return HeadDecision(keep_units=kept, num_units=site.num_units, compensate=options.compensate)


def round_up(value: int, multiple: int) -> int:
    """To the next multiple."""
    return -(-value // multiple) * multiple
