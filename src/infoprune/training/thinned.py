"""The model that gates train on: cut to a milder choice of heads and to the FFNs that are aimed at, and refitted.

Gates on the dense model would choose heads for a model that nobody wants: with most heads shut and nothing refitted layer by layer it is
out of its range, and what helps it there need not help the one that is cut. Here all gates open are a model that answers well already,
and shutting some of them is a step to the one that is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from infoprune.architecture import AttentionSite
from infoprune.training.costs import Costs
from infoprune.training.heads import Choice
from infoprune.training.run import LearnedHeads

ROOM = 1.5  # the attention's cost in the model that gates train on, in what it is to be
ROOM_UNITS = 4  # that it has more at least


@dataclass(frozen=True)
class ThinnedSite(AttentionSite):
    """A block of which some units are gone.

    Attributes:
        dense: The block that it was.
        kept: Its units, numbered as there; at least one.
    """

    dense: AttentionSite | None = None
    kept: tuple[int, ...] = ()

    @classmethod
    def of(cls, dense: AttentionSite, kept: Sequence[int]) -> ThinnedSite:
        """The block with these units."""
        return cls(**{field.name: getattr(dense, field.name) for field in fields(AttentionSite)}, dense=dense, kept=tuple(kept))

    @property
    def num_units(self) -> int:
        """How many units are left."""
        return len(self.kept)

    @property
    def unit_width(self) -> int:
        """Columns of the output projection that belong to one unit."""
        assert self.dense is not None
        return self.dense.unit_width


@dataclass(frozen=True)
class Thinning:
    """Which units of the gated blocks are still there.

    Attributes:
        dense: The blocks as they were.
        kept: Units by path.
    """

    dense: tuple[AttentionSite, ...]
    kept: dict[str, list[int]]

    @property
    def sites(self) -> list[ThinnedSite]:
        """The blocks that have units left."""
        return [ThinnedSite.of(site, self.kept[site.path]) for site in self.dense if self.kept[site.path]]

    @property
    def _left(self) -> torch.Tensor:
        """(units of all dense blocks,) whether each is still there."""
        return torch.tensor([unit in self.kept[site.path] for site in self.dense for unit in range(site.num_units)])

    def costs(self, dense: Costs) -> Costs:
        """Of the blocks that are left, from those of all."""
        blocks = torch.tensor([bool(self.kept[site.path]) for site in self.dense])
        owner = (blocks.cumsum(0) - 1)[dense.owner[self._left]]
        return Costs(dense.fixed[blocks], dense.unit[self._left], owner, dense.always[blocks])

    def numbered(self, choice: Choice) -> Choice:
        """The same choice with units numbered as in the dense blocks."""
        kept = {path: [self.kept[path][unit] for unit in choice.kept.get(path, [])] for path in self.kept}
        return replace(choice, kept=kept)

    def spread(self, values: Sequence[float]) -> list[float]:
        """Values of the units that are left, in order, among zeros for the others."""
        flat = torch.zeros(len(self._left), dtype=torch.float64)
        flat[self._left] = torch.tensor(values, dtype=torch.float64)
        return flat.tolist()

    def told(self, learned: LearnedHeads, dense: Costs) -> LearnedHeads:
        """What was learned, in terms of the dense blocks and their costs."""
        left = self.costs(dense).dense / dense.dense
        expected, target = learned.cost_share
        history = [values | {"cost": values["cost"] * left} for values in learned.trained.history]
        flat = self.spread([value for site in self.sites for value in learned.gates[site.path]])
        sizes = [site.num_units for site in self.dense]
        parts = torch.tensor(flat, dtype=torch.float64).split(sizes)
        return replace(
            learned, choice=self.numbered(learned.choice), start=self.numbered(learned.start),
            gates={site.path: part.tolist() for site, part in zip(self.dense, parts, strict=True)},
            trajectory=[self.spread(values) for values in learned.trajectory],
            cost_share=(expected * left, target * left), trained=replace(learned.trained, history=history),
        )  # fmt: skip
