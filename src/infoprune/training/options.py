"""How to train: one frozen dataclass, whose names the command line and recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infoprune.errors import InfoPruneError

TRACKERS = ("tensorboard", "wandb", "mlflow")
POSITIVE = """gate_steps gate_rate gate_images_per_step gate_lora_rate refresh multiplier_rate recovery_steps recovery_rate lora_rank
    images_per_step questions_per_image validation_questions evaluate_every checkpoint_every distillation_temperature"""
NOT_NEGATIVE = "gate_prior gate_lora cross_entropy_weight distillation_weight hidden_weight rate_weight ks_weight patience"
RATES = {"full": 1e-3, "lora": 1e-4}  # full: relative to the magnitude of each tensor's entries
# Which stage reads an option, where its name does not say it; others are read by both.
READ_BY = {
    **dict.fromkeys(("attention_share", "rate_weight", "ks_weight", "refresh", "multiplier_rate"), "gate"),
    **dict.fromkeys(("lora_rank", "hidden_weight", "images_per_step", "patience"), "recovery"),
}


def read_by(name: str) -> str:
    """``gate``, ``recovery``, or something else for an option that both stages read."""
    return READ_BY.get(name, name.partition("_")[0])


@dataclass(frozen=True)
class TrainingOptions:
    """How gates and recovery train.

    A *step* is one update on a few images with all their questions; on as many questions where a family can't put them into one row.

    Attributes:
        recovery: After the cut: ``lora`` (merged afterwards), ``full`` (all weights of the layers, and the projector, but no embeddings
            and no language head) or ``none``. Only towers in which something was cut train.
        gate_steps: Updates of the gates (``heads=trained``).
        gate_rate: Learning rate of the gates' locations; it falls to zero over the second half.
        gate_images_per_step: Images of one update of the gates, over all processes; gates are drawn anew for each of them.
        gate_prior: How far apart the gates start, in the order of the training-free choice and at its budget; what goes in it takes one
            half, what stays the other. 0: all equal.
        gate_cost: What gates pay for: ``flops``, or ``time``, the seconds that blocks take on this machine in one forward pass. Time
            makes whole blocks go on short inputs; the model's FLOPs budget is met by the FFNs either way.
        attention_share: Share of the attention's cost that gates keep; ``None``: what the training-free allocation gives attention.
        gate_ffn: Gate the sizes of FFNs, ranks or widths, along with the heads (:mod:`infoprune.training.ffn_gates`). Heads and FFNs then
            share one budget, in FLOPs; else FFNs are allocated after the heads, by predicted losses. Factors of all FFNs at full rank are
            kept in memory while gates train.
        gate_lora: Rank of a LoRA on all linears of the towers with gates, which trains along with these; 0: weights stay frozen. It stands
            in for the refit and recovery that the cut model will have, and is left behind when the gates have trained.
        gate_lora_rate: Its learning rate, which falls as that of the gates does; ``None``: :data:`RATES` of ``lora``.
        cross_entropy_weight: Coefficient of the reference answers' cross-entropy.
        distillation_weight: Coefficient eta of T^2 KL(teacher || student) at the answer tokens.
        distillation_temperature: T.
        hidden_weight: Recovery: coefficient of the hidden-state distillation, the relative squared distance at a few depths.
        rate_weight: Coefficient beta of the gated heads' information rate relative to that with all gates open.
        ks_weight: Coefficient kappa of the mean KS distance between blocks' spectra gated and with all gates open.
        refresh: Steps between refreshes of the spectra's directions.
        multiplier_rate: Ascent rate of the budget's Lagrange multipliers.
        recovery_steps: Updates of recovery; fewer if it stops early.
        recovery_rate: Peak learning rate of recovery; ``None``: :data:`RATES`. For ``full`` it is relative: a tensor's rate is this times
            the typical magnitude of its entries. Repaired models are sensitive to it.
        lora_rank: Rank of recovery's LoRA.
        images_per_step: Images of one update of recovery, over all processes.
        questions_per_image: At most so many questions of an image in one update.
        validation: Data to stop early on; ``None``: one training image in twenty, which then serves nothing else.
        validation_questions: At most so many.
        evaluate_every: Steps between validations; gates are validated as the units that they would keep, at the start and the end too.
        patience: Validations without improvement before recovery stops; 0: never.
        checkpoint_every: Steps between checkpoints of the training state.
        precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the hardware multiplies it faster.
        shard: Spread the weights over the processes while gates and recovery train (:mod:`infoprune.training.sharding`), for models that
            one device can't train. Without effect in a single process. Tested on CPUs; never ran on GPUs so far.
        trackers: Names of experiment trackers: tensorboard, wandb, mlflow.
    """

    recovery: Literal["none", "lora", "full"] = "none"
    gate_steps: int = 100
    gate_rate: float = 0.3
    gate_images_per_step: int = 4
    gate_prior: float = 30.0
    gate_cost: Literal["flops", "time"] = "flops"
    attention_share: float | None = None
    gate_ffn: bool = False
    gate_lora: int = 0
    gate_lora_rate: float | None = None
    cross_entropy_weight: float = 1.0
    distillation_weight: float = 1.0
    distillation_temperature: float = 2.0
    hidden_weight: float = 1.0
    rate_weight: float = 0.05
    ks_weight: float = 0.1
    refresh: int = 10
    multiplier_rate: float = 3.0
    recovery_steps: int = 200
    recovery_rate: float | None = None
    lora_rank: int = 16
    images_per_step: int = 8
    questions_per_image: int = 16
    validation: str | None = None
    validation_questions: int = 500
    evaluate_every: int = 100
    patience: int = 0
    checkpoint_every: int = 50
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shard: bool = False
    trackers: tuple[str, ...] = ()

    def rate(self, kind: str) -> float:
        """Peak learning rate of recovery of ``kind``, ``full`` or ``lora``."""
        return RATES[kind] if self.recovery_rate is None else self.recovery_rate

    def __post_init__(self) -> None:
        for name, known in (
            ("recovery", ("none", "lora", "full")),
            ("precision", ("auto", "fp32", "bf16")),
            ("gate_cost", ("flops", "time")),
        ):
            if getattr(self, name) not in known:
                raise InfoPruneError(f"Unknown {name} '{getattr(self, name)}'. Known: {', '.join(known)}.")
        if unknown := sorted(set(self.trackers) - set(TRACKERS)):
            raise InfoPruneError(f"Unknown trackers {', '.join(unknown)}. Known: {', '.join(TRACKERS)}.")
        for name in POSITIVE.split():
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InfoPruneError(f"{name} must be above 0, not {value}.")
        for name in NOT_NEGATIVE.split():
            if getattr(self, name) < 0:
                raise InfoPruneError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if self.shard and self.gate_lora:
            raise InfoPruneError("gate_lora trains weights of the gated model, which shard does not support. Leave out one of them.")
        if self.gate_ffn:
            self._check_gate_ffn()
        if self.attention_share is not None and not 0 < self.attention_share <= 1:
            raise InfoPruneError(f"attention_share must be above 0 and at most 1, not {self.attention_share}.")
        if not (self.cross_entropy_weight or self.distillation_weight):
            raise InfoPruneError("With cross_entropy_weight and distillation_weight both 0 nothing tells training what the task needs.")

    def _check_gate_ffn(self) -> None:
        """What gates on FFNs exclude."""
        reasons = {
            "shard": (self.shard, "every process would hold the factors of all FFNs"),
            "gate_lora": (self.gate_lora, "the factors are those of weights that do not move"),
            "gate_cost": (self.gate_cost != "flops", "FFN gates pay in FLOPs"),
            "attention_share": (self.attention_share is not None, "heads and FFNs share one budget"),
        }
        for name, (given, why) in reasons.items():
            if given:
                raise InfoPruneError(f"gate_ffn excludes {name}: {why}. Leave out one of them.")
