"""How to compress: one frozen dataclass, whose names the command line and recipes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from infoprune.architecture import TowerName
from infoprune.criteria.ffn import FFNOptions, Whitening
from infoprune.criteria.heads import CRITERIA, GROUPED_TAYLOR, INFORMATION_LOSS, TAYLOR
from infoprune.criteria.neurons import ENERGY
from infoprune.criteria.neurons import RANKINGS as NEURONS
from infoprune.criteria.neurons import TAYLOR as NEURON_TAYLOR
from infoprune.data import Example
from infoprune.errors import BudgetError, InfoPruneError
from infoprune.evaluation.certify import check_confidence
from infoprune.evaluation.metrics import EXACT, MODES
from infoprune.plan import Compensation
from infoprune.site_statistics import Weighting

NONE, TRAINED, BLOCK_INFLUENCE = "none", "trained", "block-influence"
LOW_RANK: Literal["low-rank"] = "low-rank"
WIDTH: Literal["width"] = "width"
RANK_RULES = ("tolerance", "effective-rank")  # allocations of :mod:`infoprune.rank_rules`
BUDGETS = ("flops", "speedup", "ks", "max_drop")
CERTIFY_METRICS = (EXACT, *MODES)
SHRINKAGE = 0.3  # see ``benchmarks/selection.py``
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.31, 0.27, 0.23, 0.2)
UNTRAINED = (
    "Only training-free compression searches for a certified plan: each plan of the path would have to be trained. Compress with flops, "
    "then look at that one model on data that neither training nor validation saw: `infoprune evaluate SMALL --against MODEL --data DATA` "
    "gives the bounds."
)


@dataclass(frozen=True)
class Needs:
    """What calibration gathers, and how. Methods that agree in all but the flags after ``gradients`` can share it.

    Attributes:
        weighting, temperature, top_k, seed, gradients, branches, magnitudes, factors, neurons, layers: See
            :func:`infoprune.calibrate.calibrate`.
        sensitivities: Derivatives of each question's loss in the heads, :func:`infoprune.sensitivity.head_sensitivities`.
        saliencies: Gradients of weights, :func:`infoprune.saliency.weight_saliencies`.
    """

    weighting: Weighting
    temperature: float
    top_k: int | None
    seed: int
    gradients: bool
    branches: bool = False
    magnitudes: bool = False
    factors: bool = False
    neurons: bool = False
    layers: bool = False
    sensitivities: bool = False
    saliencies: bool = False

    @property
    def moments(self) -> dict[str, Any]:
        """What :func:`infoprune.calibrate.calibrate` is told."""
        return {name: value for name, value in asdict(self).items() if name not in ("sensitivities", "saliencies")}


@dataclass(frozen=True)
class CompressionOptions:
    """How to compress; the same names as the command line's options and the recipe's keys.

    Attributes:
        flops: Share of the dense model's FLOPs that remains, over image, prompt and answer.
        speedup: How many times faster the whole workload shall be on this machine, measured, instead of ``flops``; see
            :mod:`infoprune.speedup`.
        ks: KS tolerance instead of a budget: the adaptive rule.
        max_drop: Largest drop of accuracy, in points, instead of a budget: the cheapest plan of a path whose drop is certified to be at
            most this (:mod:`infoprune.certification`).
        confidence: Of the certificate.
        certify: Data to certify on; ``None``: images of the calibration data's source that calibration does not see.
        certify_images: Images to certify on at most, drawn at random; ``None``: all of ``certify``, or as many of the calibration data's
            source as a plan that ought to pass needs.
        certify_per_image: Questions on one image to certify on at most, drawn at random; ``None``: so many that images with more
            than others cost little (:func:`infoprune.certification.data.most_per_image`).
        certify_metric: The score whose drop is certified: ``exact`` (match with the reference answer, teacher-forced), or ``official`` or
            ``lmms-eval`` (generated answers, judged as :func:`infoprune.evaluation.metrics.metric_for` has it); ``None``: ``official``
            where the data to certify on are a benchmark, else ``exact``.
        shares: The path that ``max_drop`` goes along: shares of the dense FLOPs, from mild to aggressive.
        heads: Head criterion (``infoprune.criteria.heads.CRITERIA``), ``trained`` (gates under the information-bottleneck objective,
            see :class:`infoprune.training.options.TrainingOptions`) or ``none``.
        ffn: ``low-rank`` (factorised linears), ``width`` (fewer neurons) or ``none``; ``None`` becomes ``width`` unless an option is about
            ranks (``ks``, ``structure``, ``whitening``, ``shrinkage``, rules for ranks) or layers: then ``low-rank``. See
            ``benchmarks/selection.py``.
        neurons: Which neurons ``width`` keeps: a criterion of :data:`infoprune.criteria.neurons.RANKINGS`.
        layers: ``block-influence`` drops whole layers and cuts nothing else (:mod:`infoprune.depth`); ``none``.
        towers: Which towers may be cut.
        compensate: What takes the place of removed heads in the output projection, see :class:`infoprune.plan.HeadDecision`. ``repair``
            refits that projection whatever this says.
        alpha: Weight of eRank in ``erank-ks``.
        ffn_metric, centred, structure, whitening, shrinkage: See :class:`infoprune.criteria.ffn.FFNOptions`. The metric is that of heads,
            too, whose losses compete with those of FFNs: ``identity`` leaves the task out, and losses are squared errors, not nats.
        allocation: ``global``: least loss over all sites; ``uniform``: the same share everywhere (a baseline); ``tolerance``,
            ``effective-rank``: FFN ranks by a rule of other methods, see :mod:`infoprune.rank_rules`, heads the same share everywhere.
        weighting: See :func:`infoprune.calibrate.calibrate`.
        temperature, top_k: Of the Fisher information, see :func:`infoprune.fisher.fisher_sample`.
        examples: Calibration questions, three per image as far as images go.
        rare: Share of them about images that a random sample shows too seldom, one each (:mod:`infoprune.rare`). They
            fail less often then, and questions beyond the task more (``benchmarks/selection.py``).
        repair: Cut layer by layer and refit what reads the residual stream, and each cut block's last linear, to the dense model's
            (:mod:`infoprune.repair`).
        rank_multiple: Ranks and widths are multiples of this: 8 suits CPUs, 64 GPUs.
        floor: Least rank or width of a site, as a share of what it would have under uniform shares.
        seed: Seed of every draw.
        skip_bad: Go on without bad records of the data, see :func:`infoprune.data.load_examples`.
    """

    flops: float | None = None
    speedup: float | None = None
    ks: float | None = None
    max_drop: float | None = None
    confidence: float = 0.95
    certify: str | Sequence[Example] | None = None
    certify_images: int | None = None
    certify_per_image: int | None = None
    certify_metric: str | None = None
    shares: tuple[float, ...] = SHARES
    heads: str = INFORMATION_LOSS
    ffn: Literal["low-rank", "width", "none"] | None = None
    neurons: str = ENERGY
    layers: Literal["block-influence", "none"] = "none"
    towers: tuple[TowerName, ...] = ("vision", "text")
    compensate: Compensation = "least-squares"
    alpha: float = 0.5
    ffn_metric: Literal["task", "identity"] = "task"
    centred: bool = True
    structure: Literal["joint", "separate", "best"] = "joint"
    whitening: Whitening = "full"
    shrinkage: float = SHRINKAGE
    allocation: Literal["global", "uniform", "tolerance", "effective-rank"] = "global"
    weighting: Weighting = "relevance"
    temperature: float = 1.0
    top_k: int | None = None
    examples: int = 768
    rare: float = 0.0
    repair: bool = True
    rank_multiple: int = 8
    floor: float = 0.5
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if [getattr(self, name) for name in BUDGETS].count(None) != len(BUDGETS) - 1:
            raise BudgetError(
                "Give exactly one of flops (a share of the dense FLOPs, e.g. 0.5), speedup (times faster, e.g. 1.8), ks (a tolerance, "
                "e.g. 0.1) and max_drop (points of accuracy, e.g. 0.5)."
            )
        self._check_certificate()
        if self.ffn is None:
            object.__setattr__(self, "ffn", self._usual_ffn)
        for name, value in (("flops", self.flops), ("ks", self.ks)):
            if value is not None and not 0 < value <= 1:
                raise BudgetError(f"{name} must be above 0 and at most 1, not {value}.")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise BudgetError(f"speedup says how many times faster and must be above 1, e.g. 1.8, not {self.speedup}.")
        if self.heads not in (*CRITERIA, TRAINED, NONE):
            raise InfoPruneError(f"Unknown head criterion '{self.heads}'. Known: {', '.join((*CRITERIA, TRAINED, NONE))}.")
        if self.heads == TRAINED and self.flops is None:
            raise BudgetError("Trained heads need a budget in FLOPs: give flops. Gates may still pay for time (gate_cost).")
        choices = {
            "ffn": (LOW_RANK, WIDTH, NONE),
            "neurons": tuple(NEURONS),
            "layers": (BLOCK_INFLUENCE, NONE),
            "ffn_metric": ("task", "identity"),
            "structure": ("joint", "separate", "best"),
            "whitening": ("full", "diagonal", "none"),
            "compensate": ("least-squares", "mean", "none"),
            "allocation": ("global", "uniform", *RANK_RULES),
            "weighting": ("uniform", "relevance"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise InfoPruneError(f"Unknown {name} '{value}'. Known: {', '.join(known)}.")
        self._check_structures()
        if isinstance(self.towers, str):
            object.__setattr__(self, "towers", (self.towers,))
        if not self.towers or not set(self.towers) <= {"vision", "text"}:
            raise InfoPruneError(f"Unknown towers {', '.join(self.towers) or '(none)'}. Known: vision, text.")
        if self.heads == NONE and self.ffn == NONE and self.layers == NONE:
            raise InfoPruneError("With heads and ffn both 'none' there is nothing to compress.")
        if self.examples < 1 or self.rank_multiple < 1 or not 0 <= self.floor <= 1 or self.temperature <= 0:
            raise InfoPruneError("examples and rank_multiple must be at least 1, floor within 0 to 1, temperature above 0.")
        if not 0 <= self.rare <= 1:
            raise InfoPruneError(f"rare is a share of the calibration questions, from 0 to 1, not {self.rare:g}.")
        if not 0 <= self.seed < 2**63:
            raise InfoPruneError(f"seed must be at least 0 and below 2**63, not {self.seed}.")
        if not 0 <= self.shrinkage <= 1:
            raise InfoPruneError(f"shrinkage must be within 0 to 1, not {self.shrinkage}.")
        if self.top_k is not None and self.top_k < 2:
            raise InfoPruneError(f"top_k must be at least 2, not {self.top_k}: one token alone leaves nothing uncertain.")

    @property
    def _usual_ffn(self) -> Literal["low-rank", "width"]:
        if self.neurons != ENERGY:
            return WIDTH
        return WIDTH if self._plain and self.layers == NONE and self.ks is None and self.allocation not in RANK_RULES else LOW_RANK

    @property
    def _plain(self) -> bool:
        """Whether nothing is asked of factors."""
        return (self.structure, self.whitening, self.shrinkage) == ("joint", "full", SHRINKAGE)

    def _check_structures(self) -> None:
        if self.layers == NONE and self.ffn == WIDTH and self.ks is not None:
            raise BudgetError("The KS rule is about spectra, which neurons do not have: give flops instead of ks, or ffn low-rank.")
        if self.ffn != WIDTH and self.neurons != ENERGY:
            raise InfoPruneError(f"neurons {self.neurons} says which neurons stay, and ffn {self.ffn} keeps or cuts all alike: take width.")
        if self.ffn != LOW_RANK and not self._plain:
            raise InfoPruneError(
                f"structure, whitening and shrinkage are about factors, which ffn {self.ffn} has not: leave them out, or take low-rank."
            )
        if self.ffn != LOW_RANK and self.allocation in RANK_RULES:
            raise InfoPruneError(f"allocation {self.allocation} is a rule for ranks, which ffn {self.ffn} has not: take global or uniform.")
        if self.layers == NONE:
            return
        if self.heads not in (INFORMATION_LOSS, NONE) or self.ffn not in (LOW_RANK, NONE):
            raise InfoPruneError(f"layers {self.layers} drops whole layers and cuts nothing else; leave out heads and ffn.")
        if self.ks is not None:
            raise BudgetError("Whole layers have no KS tolerance: give flops instead of ks.")
        if self.speedup is not None:
            raise BudgetError("Whole layers are counted in FLOPs, not timed: give flops instead of speedup.")

    def _check_certificate(self) -> None:
        if self.max_drop is not None and not 0 < self.max_drop < 100:
            raise BudgetError(f"max_drop must be above 0 and below 100 points, not {self.max_drop}.")
        check_confidence(self.confidence)
        for name in ("certify_images", "certify_per_image"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BudgetError(f"{name} must be at least 1, not {value}.")
        falling = all(a > b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not falling or not all(0 < share <= 1 for share in self.shares):
            raise BudgetError("shares must fall from mild to aggressive and lie within 0 to 1, e.g. 0.8, 0.6, 0.5.")
        if self.certify_metric not in (None, *CERTIFY_METRICS):
            raise BudgetError(f"Unknown certify_metric '{self.certify_metric}'. Known: {', '.join(CERTIFY_METRICS)}.")
        if self.max_drop is None and (self.certify is not None or self.certify_images or self.certify_per_image or self.certify_metric):
            raise BudgetError("certify, certify_images, certify_per_image and certify_metric need max_drop: what is to be certified?")
        if self.max_drop is not None and self.heads == TRAINED:
            raise BudgetError(UNTRAINED)

    def at(self, share: float) -> CompressionOptions:
        """The same with a FLOPs share as the budget, and nothing to certify."""
        budget = dict.fromkeys((*BUDGETS, "certify", "certify_images", "certify_per_image", "certify_metric"))
        return replace(self, **(budget | {"flops": share}))

    @property
    def budget(self) -> dict[str, float]:
        """What was asked for, by name."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}

    @property
    def cost_share(self) -> float:
        """Share of the dense model's cost that may remain, counted in FLOPs or measured in time."""
        if self.speedup is not None:
            return 1 / self.speedup
        assert self.flops is not None
        return self.flops

    @property
    def ffn_options(self) -> FFNOptions:
        """The FFN method."""
        return FFNOptions(self.ffn_metric, self.centred, self.structure, self.whitening, self.shrinkage)

    @property
    def needs(self) -> Needs:
        """What calibration must gather."""
        whole_layers = self.layers != NONE
        return Needs(
            weighting=self.weighting,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            gradients=self.ffn_metric == "task" or self.weighting == "relevance",
            branches=self.structure != "joint" and self.ffn_metric == "task",
            magnitudes=self.ffn != NONE and self.whitening == "diagonal",
            factors=self.ffn == LOW_RANK or whole_layers,
            neurons=self.ffn != LOW_RANK and not whole_layers,  # without FFNs the smaller of the two: calibration wants one
            layers=whole_layers,
            sensitivities=self.heads == TAYLOR,
            saliencies=not whole_layers and (self.heads == GROUPED_TAYLOR or (self.ffn == WIDTH and self.neurons == NEURON_TAYLOR)),
        )
