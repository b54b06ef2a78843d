"""The compression plan: what to keep, by module path. The single truth that surgery, checkpoint and report read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from infoprune.architecture import Architecture, FFNSite
from infoprune.errors import PlanError

PLAN_VERSION = 1
Rank = Annotated[int, Field(ge=1)]
Compensation = Literal["least-squares", "mean", "none"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadDecision(_Strict):
    """Units that stay in one attention block, and what the output projection puts in the place of the others.

    ``least-squares``: what the units that stay can reproduce of them, and means into the bias; ``mean``: their mean output into the bias;
    ``none``: nothing. With no unit kept the block is dropped whole; compensation of either kind then leaves its mean output, a constant.
    Earlier plans said ``true`` for least squares and ``false`` for nothing; they are read as they were meant.
    """

    keep_units: tuple[Annotated[int, Field(ge=0)], ...]
    num_units: int = Field(ge=1)
    compensate: Compensation = "least-squares"

    @field_validator("compensate", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return ("least-squares" if value else "none") if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> HeadDecision:
        if list(self.keep_units) != sorted(set(self.keep_units)) or self.keep_units[-1:] >= (self.num_units,):
            raise ValueError(f"keep_units must be increasing and below num_units={self.num_units}")
        return self


class FFNDecision(_Strict):
    """Ranks in one FFN, where what is absent stays dense, or the neurons that stay.

    ``joint_rank``: gate and up share their input map. ``gate_rank``, ``up_rank``: factorised apart (``up_rank`` alone for an FFN
    without gate). ``down_rank``: the down projection. ``keep_neurons``: of ``num_neurons``, instead of ranks; with none the FFN is dropped
    whole, and leaves a constant (its mean output with the plan's ``centred``, else the bias of its down projection) or nothing.
    """

    joint_rank: Rank | None = None
    gate_rank: Rank | None = None
    up_rank: Rank | None = None
    down_rank: Rank | None = None
    keep_neurons: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    num_neurons: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> FFNDecision:
        if self.joint_rank is not None and (self.gate_rank is not None or self.up_rank is not None):
            raise ValueError("joint_rank excludes gate_rank and up_rank")
        if (self.keep_neurons is None) != (self.num_neurons is None):
            raise ValueError("keep_neurons and num_neurons belong together")
        if self.keep_neurons is None or self.num_neurons is None:
            if not self.ranks:
                raise ValueError("an FFN decision needs at least one rank, or keep_neurons")
            return self
        if self.ranks:
            raise ValueError("keep_neurons excludes ranks")
        rising = all(a < b for a, b in zip(self.keep_neurons, self.keep_neurons[1:], strict=False))
        if not rising or self.keep_neurons[-1:] >= (self.num_neurons,):
            raise ValueError(f"keep_neurons must be increasing and below num_neurons={self.num_neurons}")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_neurons(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Plans of ranks alone are written, and digested in certificates, as they were before there were neurons."""
        found = dump(self)
        return found if self.keep_neurons is not None else {name: found[name] for name in found if not name.endswith("_neurons")}

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks that are given, by field name."""
        fields = ("joint_rank", "gate_rank", "up_rank", "down_rank")
        return {name: rank for name in fields if (rank := getattr(self, name)) is not None}

    @property
    def shapes(self) -> dict[str, int]:
        """What gives the block its shapes: its ranks, or the numbers of neurons kept and in all."""
        if self.keep_neurons is None or self.num_neurons is None:
            return self.ranks
        return {"keep": len(self.keep_neurons), "of": self.num_neurons}


class CalibrationRecord(_Strict):
    """Which data and settings the statistics came from; ``prompt_suffix`` was put behind every question."""

    data: str
    count: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**63)
    rare: float = Field(default=0.0, ge=0, le=1)  # earlier plans: none
    weighting: Literal["uniform", "relevance"]
    temperature: float = Field(gt=0)
    top_k: int | None = None
    fingerprint: str
    prompt_suffix: str = ""


class CompressionPlan(_Strict):
    """Everything needed to cut a model again; versioned JSON, unknown keys refused.

    Attributes:
        version: Format version.
        library: Version of infoprune that wrote it.
        model_type: Family of the dense model.
        model_id, revision: Where the dense model came from, and the commit if that is a hub.
        budget: What was asked for, e.g. ``{"flops": 0.5}``.
        method: Options that shape the weights: criterion, FFN metric, centring.
        calibration: The data behind the statistics.
        heads: Decisions by attention path; blocks not named stay whole.
        ffn: Decisions by FFN path.
    """

    version: Literal[1] = PLAN_VERSION
    library: str
    model_type: str
    model_id: str
    revision: str | None = None
    budget: dict[str, float] = Field(default_factory=dict)
    method: dict[str, str | float | bool] = Field(default_factory=dict)
    calibration: CalibrationRecord | None = None
    heads: dict[str, HeadDecision] = Field(default_factory=dict)
    ffn: dict[str, FFNDecision] = Field(default_factory=dict)

    def to_json(self) -> str:
        """Readable JSON, stable order; the neurons of an FFN take one line, not thousands."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        return re.sub(
            r'"keep_neurons": \[[^\]]*\]', lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text
        )

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> CompressionPlan:
        """Parse and check a plan.

        Raises:
            PlanError: Not JSON, another version, an unknown key or a value out of range; says which.
        """
        try:
            loaded: Any = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise PlanError(f"{source} is not valid JSON: {error}.") from error
        if isinstance(loaded, dict) and loaded.get("version", PLAN_VERSION) != PLAN_VERSION:
            raise PlanError(f"{source} has version {loaded['version']}; this infoprune reads version {PLAN_VERSION}.")
        try:
            return cls.model_validate(loaded)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the top level"
            raise PlanError(f"{source} is not a valid plan: {where}: {first['msg']}.") from error

    @classmethod
    def read(cls, path: Path) -> CompressionPlan:
        """Read a plan file, or ``plan.json`` inside a checkpoint folder."""
        path = path / "plan.json" if path.is_dir() else path
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), source=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"Cannot read the plan {path}: {error}.") from error

    def check(self, architecture: Architecture) -> None:
        """Raise unless every decision fits the model's sites.

        Raises:
            PlanError: Another family, an unknown path, a unit, neuron or rank that does not exist, or a factorised linear that would
                cost more than the dense one.
        """
        if self.model_type != architecture.family.model_type:
            raise PlanError(f"The plan is for a {self.model_type} model; this one is a {architecture.family.model_type}.")
        attention = {site.path: site for site in architecture.attention}
        ffn = {site.path: site for site in architecture.ffn}
        for path, head in self.heads.items():
            if path not in attention:
                raise PlanError(f"The plan names the attention block '{path}', which this model does not have.")
            if head.num_units != attention[path].num_units:
                raise PlanError(f"The plan counts {head.num_units} units in '{path}'; this model has {attention[path].num_units}.")
            if len(head.keep_units) < attention[path].min_units:
                raise PlanError(
                    f"The plan keeps {len(head.keep_units)} units of '{path}', which needs {attention[path].min_units}: it is the first "
                    "language layer of its kind, whose cache counts tokens, or cross-attention, or a norm runs over all its heads."
                )
        for path, decision in self.ffn.items():
            if path not in ffn:
                raise PlanError(f"The plan names the FFN '{path}', which this model does not have.")
            _check_ffn(ffn[path], decision)

    def shapes(self) -> dict[str, Any]:
        """What a checkpoint's config carries so that the model can be rebuilt: kept units, neurons and ranks by path."""
        biases = {} if self.method.get("centred", True) else {"centred": False}
        return {
            "heads": {
                path: {"keep": len(d.keep_units), "of": d.num_units, "compensated": d.compensate != "none"}
                for path, d in self.heads.items()
            },
            "ffn": {path: d.shapes | biases for path, d in self.ffn.items()},
        }


def _check_ffn(site: FFNSite, decision: FFNDecision) -> None:
    if decision.num_neurons not in (None, site.intermediate_size):
        raise PlanError(f"The plan counts {decision.num_neurons} neurons in '{site.path}'; this model has {site.intermediate_size}.")
    if not site.gated and (decision.joint_rank is not None or decision.gate_rank is not None):
        raise PlanError(f"'{site.path}' has no gate; the plan gives it a rank for one.")
    for name, rank in decision.ranks.items():
        limit = max_rank(site, name)
        if rank > limit:
            raise PlanError(f"{name} {rank} at '{site.path}' costs more than the dense linear; the largest useful rank is {limit}.")


def max_rank(site: FFNSite, name: str) -> int:
    """Largest rank whose factors have fewer weights than the dense linear(s)."""
    d, m = site.hidden_size, site.intermediate_size
    stacked = 2 * m if name == "joint_rank" else m
    return min((d * stacked - 1) // (d + stacked), d)


def ffn_parameters(site: FFNSite, decision: FFNDecision | None) -> int:
    """Weights of an FFN under a decision, biases aside."""
    d, m = site.hidden_size, site.intermediate_size
    dense = d * m
    if decision is None:
        return (site.num_inputs + 1) * dense
    if decision.keep_neurons is not None:
        return (site.num_inputs + 1) * d * len(decision.keep_neurons)
    total = dense if decision.down_rank is None else decision.down_rank * (d + m)
    if decision.joint_rank is not None:
        return total + decision.joint_rank * (d + 2 * m)
    branches = (decision.up_rank, decision.gate_rank)[: site.num_inputs]
    return total + sum(dense if rank is None else rank * (d + m) for rank in branches)
