"""The certificate of what a compressed model kept: versioned JSON, stored as ``certificate.json`` beside the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from scipy.stats import spearmanr

from infoprune.data.images import home_expanded
from infoprune.data.seen import DIGITS as IMAGE_DIGITS
from infoprune.data.seen import image_digest
from infoprune.errors import CheckpointError
from infoprune.evaluation.certify import Bounds
from infoprune.evaluation.metrics import EXACT, METRICS
from infoprune.evaluation.record import add_tensor
from infoprune.plan import CompressionPlan

CERTIFICATE_VERSION = 3
FILE = "certificate.json"
SCORE = "exact match of the greedy answer, teacher-forced"
GENERATED = "mean score of the generated greedy answer"
ASSUMPTIONS = (
    "Images of the certification data are independent of each other; questions on one image may depend on each other in any way.",
    "The bounded drop is the expected one over images with as many questions as these have, each drawn question counting the same.",
    "Where the model is used on other kinds of images or questions, the certificate says nothing.",
    "The data are disjoint from those that the plans were calibrated on, and were looked at for this path alone: no other try saw them.",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CertificationData(_Strict):
    """What the scores come from.

    Attributes:
        source: As it was named.
        fingerprint: Digest of file names, questions and answers; ``calibration``: of those that the plans were calibrated on.
        num_questions, num_images: How many were drawn; ``largest_image``: most questions on one image.
        kl_questions: The first so many of them give the KL.
        images: Their images, by the first digits of the files' SHA-256; none before the third version.
    """

    source: str
    fingerprint: str
    calibration: str
    num_questions: int = Field(ge=1)
    num_images: int = Field(ge=1)
    largest_image: int = Field(ge=1)
    kl_questions: int = Field(ge=0)
    images: tuple[Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{IMAGE_DIGITS}}}$")], ...] = ()


class Measured(_Strict):
    """Scores of one plan on the certification data.

    Attributes:
        accuracy: Mean score in percent.
        drop_points, drop_ci95: Dense minus compressed, with a paired two-sided bootstrap interval, in points.
        drop_bounds: One-sided upper bounds in points, at the certificate's confidence.
        p_value: Of the hypothesis that the drop is ``max_drop_points`` or more.
        kl_nats: KL(dense || compressed) per answer token, over :attr:`CertificationData.kl_questions`.
        certified: Whether this plan passed.
    """

    accuracy: float
    drop_points: float
    drop_ci95: tuple[float, float]
    drop_bounds: dict[str, float]
    p_value: float
    kl_nats: float
    certified: bool

    @field_validator("drop_bounds")
    @classmethod
    def _check(cls, bounds: dict[str, float]) -> dict[str, float]:
        if bounds.keys() != {field.name for field in fields(Bounds)}:
            raise ValueError("must name each bound once")
        return bounds


class PathStep(_Strict):
    """One plan of the path.

    Attributes:
        share: FLOPs share asked for.
        plan: Digest of the plan.
        predicted_loss_nats: Second-order prediction per example.
        flops_ratio, parameters: Counted; ``None`` where the path ended before.
        measured: ``None`` where the path ended before.
    """

    share: float
    plan: str
    predicted_loss_nats: float
    flops_ratio: float | None = None
    parameters: int | None = None
    measured: Measured | None = None


class Certificate(_Strict):
    """What is certified of the model in this folder, and how.

    Attributes:
        version, library: Of the format and of infoprune. The first version knew exact match only, and says nothing of prompt and precision;
            the first two say nothing of the weights.
        max_drop_points, confidence: What was asked for.
        method: The bound that decided, and the procedure along the path.
        score: What the accuracy is.
        metric: What judges answers, of :data:`infoprune.evaluation.metrics.METRICS`.
        prompt: As the first question was put, with ``{question}`` in the place of the question.
        precision: That both models computed in.
        max_new_tokens: Longest generated answer; ``None`` where answers are not generated but scored.
        plan: Digest of the plan that passed.
        weights: Digest of the weights that it is of, :func:`stored_digest`; ``None`` until they are saved.
        dense_accuracy: Percent, on the same questions.
        data: Certification data.
        path: All plans from mild to aggressive.
        rank_correlation: Spearman's, of predicted loss and measured KL over the scored plans; ``None`` for fewer than three.
        assumptions: Without these the certificate does not hold.
    """

    version: Literal[1, 2, 3] = CERTIFICATE_VERSION
    library: str
    max_drop_points: float = Field(gt=0)
    confidence: float = Field(gt=0, lt=1)
    method: str = "betting bound, fixed-sequence testing"
    score: str = SCORE
    metric: str = EXACT
    prompt: str | None = None
    precision: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")] | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    plan: str
    weights: str | None = None
    dense_accuracy: float
    data: CertificationData
    path: tuple[PathStep, ...]
    rank_correlation: float | None = None
    assumptions: tuple[str, ...] = ASSUMPTIONS

    @model_validator(mode="after")
    def _check(self) -> Certificate:
        if self.metric not in METRICS:
            raise ValueError(f"there is no metric '{self.metric}'")
        told = (self.prompt is not None, self.precision is not None, self.max_new_tokens is not None)
        if told != ((False, False, False) if self.version == 1 else (True, True, self.metric != EXACT)):
            raise ValueError("prompt and precision must be told, and max_new_tokens where answers are generated")
        if self.version < 3 and (self.weights is not None or self.data.images):
            raise ValueError("the first two versions know neither weights nor images")
        if self.version == 1 and self.metric != EXACT:
            raise ValueError(f"the first version knows no metric but '{EXACT}'")
        return self

    @property
    def step(self) -> PathStep:
        """The plan that passed."""
        return next(step for step in self.path if step.plan == self.plan and step.measured is not None)

    @property
    def statement(self) -> str:
        """The certificate in one sentence."""
        measured = self.step.measured
        assert measured is not None
        return (
            f"With {100 * self.confidence:g}% confidence the accuracy ({self.metric}) is at most {self.max_drop_points:g} points below the "
            f"dense model's ({self.dense_accuracy:.1f}%); measured: {measured.drop_points:+.2f} points on {self.data.num_questions:,} "
            f"questions about {self.data.num_images:,} images{self._asked}."
        )

    @property
    def _asked(self) -> str:
        """How answers came about, if that is known; the prompt as a span of code, which no text from elsewhere can end."""
        if self.prompt is None:
            return ""
        prompt = json.dumps(self.prompt, ensure_ascii=False).replace("`", r"\u0060")
        answers = "answers scored" if self.max_new_tokens is None else f"answers of at most {self.max_new_tokens} tokens generated"
        return f"; {answers} in {self.precision} for the prompt `{prompt}`"

    def to_json(self) -> str:
        """Readable JSON, stable order."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Certificate | None:
        """The certificate in a checkpoint folder; ``None`` if it has none.

        Raises:
            CheckpointError: Not JSON, another version, an unknown key, or none of its plans passed; says which.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            loaded: Any = json.loads(path.read_text(encoding="utf-8"))
            found = cls.model_validate(loaded)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the top level"
            raise CheckpointError(f"{path} is not a valid certificate: {where}: {first['msg']}.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"Cannot read the certificate {path}: {error}.") from error
        if not any(step.plan == found.plan and step.measured is not None and step.measured.certified for step in found.path):
            raise CheckpointError(f"{path} is not a valid certificate: no plan on its path passed and is the one that it names.")
        return found


def plan_digest(plan: CompressionPlan) -> str:
    """Digest of everything in a plan."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]


def stored_digest(folder: Path) -> str:
    """Digest of all tensors in a folder's safetensors files: names, types, shapes and values, however they are spread over files.

    Raises:
        CheckpointError: A file can't be read.
    """
    places: dict[str, Path] = {}
    digest = hashlib.sha256()
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        for name in sorted(places):
            with safe_open(places[name], framework="pt") as opened:
                add_tensor(digest, name, opened.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read the weights in {folder}: {error}.") from error
    return digest.hexdigest()[:32]


def certificate_of(model: str, images: Iterable[Path]) -> tuple[Certificate | None, list[str]]:
    """The certificate that holds for a model, and what a reader of figures from ``images`` must know.

    A certificate that names other weights than the folder has does not hold; one that names none is believed.

    Args:
        model: A checkpoint folder; anything else has no certificate.
        images: Files that the model is now judged on.

    Raises:
        CheckpointError: The certificate or the weights can't be read.
    """
    folder = home_expanded(str(model))
    certificate = Certificate.read(folder) if folder.is_dir() else None
    if certificate is None:
        return None, []
    warnings = []
    if known := set(certificate.data.images):
        distinct = set(images)
        seen = sum(image_digest(image) in known for image in distinct)
        if seen:
            warnings.append(
                f"{seen:,} of the {len(distinct):,} images are among those that the model was certified on, which chose how far it is cut: "
                "its figures on them are no independent test."
            )
    if certificate.weights is not None and certificate.weights != stored_digest(folder):
        warnings.append("The certificate in the model's folder is of other weights than these, and says nothing of them.")
        return None, warnings
    return certificate, warnings


def rank_correlation(path: tuple[PathStep, ...]) -> float | None:
    """Spearman's rank correlation of predicted loss and measured KL (Spearman 1904), over the scored plans if there are three or more."""
    pairs = [(step.predicted_loss_nats, step.measured.kl_nats) for step in path if step.measured is not None]
    predicted, measured = [p for p, _ in pairs], [k for _, k in pairs]
    if len(pairs) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return None  # there are no ranks to compare
    result: Any = spearmanr(predicted, measured)
    return float(result.statistic)
