"""The compression plan: what to keep, by module path. The single truth that surgery, checkpoint and report read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
    """Ranks in one FFN; what is absent stays dense.

    ``joint_rank``: gate and up share their input map. ``gate_rank``, ``up_rank``: factorised apart (``up_rank`` alone for an FFN
    without gate). ``down_rank``: the down projection.
    """

    joint_rank: Rank | None = None
    gate_rank: Rank | None = None
    up_rank: Rank | None = None
    down_rank: Rank | None = None

    @model_validator(mode="after")
    def _check(self) -> FFNDecision:
        if self.joint_rank is not None and (self.gate_rank is not None or self.up_rank is not None):
            raise ValueError("joint_rank excludes gate_rank and up_rank")
        if all(rank is None for rank in (self.joint_rank, self.gate_rank, self.up_rank, self.down_rank)):
            raise ValueError("an FFN decision needs at least one rank")
        return self


class CalibrationRecord(_Strict):
    """Which data and settings the statistics came from."""

    data: str
    count: int
    seed: int
    weighting: Literal["uniform", "relevance"]
    temperature: float
    top_k: int | None = None
    fingerprint: str


class CompressionPlan(_Strict):
    """Everything needed to cut a model again; versioned JSON, unknown keys refused.

    Attributes:
        version: Format version.
        library: Version of infoprune that wrote it.
        model_type: Family of the dense model.
        model_id, revision: Where the dense model came from.
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
        """Readable JSON, stable order."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> CompressionPlan:
        """Parse and check a plan.

        Raises:
            PlanError: Not JSON, another version, an unknown key or a value out of range; says which.
        """
        try:
            loaded: Any = json.loads(text)
        except json.JSONDecodeError as error:
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
            PlanError: Another family, an unknown path, a unit or rank that does not exist, or a factorised linear that would cost
                more than the dense one.
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
            _check_ranks(ffn[path], decision)

    def shapes(self) -> dict[str, Any]:
        """What a checkpoint's config carries so that the model can be rebuilt: kept units and ranks by path."""
        biases = {} if self.method.get("centred", True) else {"centred": False}
        return {
            "heads": {
                path: {"keep": len(d.keep_units), "of": d.num_units, "compensated": d.compensate != "none"}
                for path, d in self.heads.items()
            },
            "ffn": {path: d.model_dump(exclude_none=True) | biases for path, d in self.ffn.items()},
        }


def _check_ranks(site: FFNSite, decision: FFNDecision) -> None:
    if not site.gated and (decision.joint_rank is not None or decision.gate_rank is not None):
        raise PlanError(f"'{site.path}' has no gate; the plan gives it a rank for one.")
    for name, rank in decision.model_dump(exclude_none=True).items():
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
    total = dense if decision.down_rank is None else decision.down_rank * (d + m)
    if decision.joint_rank is not None:
        return total + decision.joint_rank * (d + 2 * m)
    branches = (decision.up_rank, decision.gate_rank)[: site.num_inputs]
    return total + sum(dense if rank is None else rank * (d + m) for rank in branches)
