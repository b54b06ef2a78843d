"""How to compress: one frozen dataclass, whose names the command line and recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infoprune.architecture import TowerName
from infoprune.calibrate import Weighting
from infoprune.criteria.ffn import FFNOptions
from infoprune.criteria.heads import CRITERIA, INFORMATION_LOSS
from infoprune.errors import BudgetError, InfoPruneError

NONE, TRAINED = "none", "trained"


@dataclass(frozen=True)
class CompressionOptions:
    """How to compress; the same names as the command line's options and the recipe's keys.

    Attributes:
        flops: Share of the dense model's FLOPs that remains, over image, prompt and answer.
        ks: KS tolerance instead of a budget: the adaptive rule.
        heads: Head criterion (``infoprune.criteria.heads.CRITERIA``), ``trained`` (gates under the information-bottleneck objective,
            see :class:`infoprune.training.options.TrainingOptions`) or ``none``.
        ffn: ``low-rank`` or ``none``.
        towers: Which towers may be cut.
        compensate: Repair the output projection after removing heads.
        alpha: Weight of eRank in ``erank-ks``.
        ffn_metric, centred, structure: See :class:`infoprune.criteria.ffn.FFNOptions`.
        allocation: ``global``: least loss over all sites; ``uniform``: the same share everywhere (a baseline).
        weighting: See :func:`infoprune.calibrate.calibrate`.
        temperature: Of the Fisher information, see :func:`infoprune.calibrate.fisher_sample`.
        examples: Calibration questions, three per image as far as images go.
        repair: Cut layer by layer and refit each block's last linear to the dense residual stream
            (:mod:`infoprune.repair`).
        rank_multiple: Ranks are multiples of this: 8 suits CPUs, 64 GPUs.
        floor: Least rank of a site, as a share of the rank it would have under uniform shares.
        seed: Seed of every draw.
        skip_bad: Go on without bad records of the data, see :func:`infoprune.data.load_examples`.
    """

    flops: float | None = None
    ks: float | None = None
    heads: str = INFORMATION_LOSS
    ffn: Literal["low-rank", "none"] = "low-rank"
    towers: tuple[TowerName, ...] = ("vision", "text")
    compensate: bool = True
    alpha: float = 0.5
    ffn_metric: Literal["task", "identity"] = "task"
    centred: bool = True
    structure: Literal["joint", "separate", "best"] = "joint"
    allocation: Literal["global", "uniform"] = "global"
    weighting: Weighting = "relevance"
    temperature: float = 1.0
    examples: int = 384
    repair: bool = True
    rank_multiple: int = 8
    floor: float = 0.5
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if (self.flops is None) == (self.ks is None):
            raise BudgetError("Give exactly one of flops (a share of the dense FLOPs, e.g. 0.5) and ks (a tolerance, e.g. 0.1).")
        for name, value in (("flops", self.flops), ("ks", self.ks)):
            if value is not None and not 0 < value <= 1:
                raise BudgetError(f"{name} must be above 0 and at most 1, not {value}.")
        if self.heads not in (*CRITERIA, TRAINED, NONE):
            raise InfoPruneError(f"Unknown head criterion '{self.heads}'. Known: {', '.join((*CRITERIA, TRAINED, NONE))}.")
        if self.heads == TRAINED and self.flops is None:
            raise BudgetError("Trained heads need a budget: give flops instead of ks.")
        choices = {
            "ffn": ("low-rank", NONE),
            "ffn_metric": ("task", "identity"),
            "structure": ("joint", "separate", "best"),
            "allocation": ("global", "uniform"),
            "weighting": ("uniform", "relevance"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InfoPruneError(f"Unknown {name} '{getattr(self, name)}'. Known: {', '.join(known)}.")
        if not self.towers or not set(self.towers) <= {"vision", "text"}:
            raise InfoPruneError(f"Unknown towers {', '.join(self.towers) or '(none)'}. Known: vision, text.")
        if self.heads == NONE and self.ffn == NONE:
            raise InfoPruneError("With heads and ffn both 'none' there is nothing to compress.")
        if self.examples < 1 or self.rank_multiple < 1 or not 0 <= self.floor <= 1 or self.temperature <= 0:
            raise InfoPruneError("examples and rank_multiple must be at least 1, floor within 0 to 1, temperature above 0.")

    @property
    def ffn_options(self) -> FFNOptions:
        """The FFN method."""
        return FFNOptions(self.ffn_metric, self.centred, self.structure)

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration must take gradients."""
        return self.ffn_metric == "task" or self.weighting == "relevance" or self.heads in (INFORMATION_LOSS, TRAINED, "energy")
