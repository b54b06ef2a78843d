"""Data to certify on: apart from calibration's, by image, and enough of it."""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infoprune.data import Example, parse_spec
from infoprune.errors import CertificateError
from infoprune.evaluation.certify import by_image
from infoprune.evaluation.metrics import EXACT, counted_only, metric_for, score_answers
from infoprune.evaluation.sample_size import Expectation, images_needed, least_images, perfect_evidence
from infoprune.fitting import load_fitting
from infoprune.model import VLM
from infoprune.options import CompressionOptions
from infoprune.progress import SILENT, Progress
from infoprune.rare import CANDIDATES, candidates
from infoprune.steps import QUESTIONS_PER_IMAGE, calibration_examples, example_pool

UNEVEN = 0.1


@dataclass(frozen=True)
class CertificationSplit:
    """Disjoint data: no image is in both parts.

    Attributes:
        calibration: What plans are decided on.
        certification: What they are scored on, image by image.
        images: Identity of the image of each certification question, by content.
        metric: What its answers are judged by, of :data:`infoprune.evaluation.metrics.METRICS`; ``exact`` is scored teacher-forced.
    """

    calibration: list[Example]
    certification: list[Example]
    images: list[str]
    metric: str = EXACT

    @property
    def sizes(self) -> np.ndarray:
        """(images,) certification questions on each image."""
        return by_image(np.zeros(len(self.images)), self.images).sizes


def split_data(
    vlm: VLM, data: str | Sequence[Example], options: CompressionOptions, progress: Progress = SILENT
) -> CertificationSplit:  # fmt: skip
    """Split by image: the calibration sample, and the images to certify on, drawn from the rest or from ``options.certify``.

    Images are told apart by what is in the files, not by their names. Without data of its own, certification leaves calibration at
    most a quarter of the images. Of each image at most so many questions are drawn as :func:`most_per_image` or the options say. The
    dense model ``vlm`` says which images are rare (:mod:`infoprune.rare`); calibration wants some of them.

    Questions that the metric does not count are left out.

    Raises:
        DataError: Unreadable data, or data that the metric can't judge.
        CertificateError: Nothing is left to certify on.
    """
    metric = _metric(data, options)
    pool = example_pool(vlm, data, progress, skip_bad=options.skip_bad)
    if options.certify is None:
        pool, rest = _quarter(pool, options)
    elif isinstance(options.certify, str):
        rest = load_fitting(vlm.encoder, options.certify, default_split="validation", skip_bad=options.skip_bad, notify=progress.note)
    else:
        rest = list(options.certify)
    asked, rest = len(rest), counted_only(rest, metric)
    if metric != EXACT:
        score_answers([""] * len(rest), rest, metric)  # refuses what it can't judge before any work is done
    if asked > len(rest):
        progress.note(f"left out {asked - len(rest):,} questions to certify on that {metric} does not count")
    calibration = calibration_examples(vlm, pool, options, progress)
    # What calibration chose from is left out as a whole: without the rare images that it took, the rest would be too easy.
    looked_at = candidates(pool, options.examples, options.rare, seed=options.seed, per_image=QUESTIONS_PER_IMAGE)
    seen = {_content(path) for path in {example.image for example in looked_at}}
    groups: dict[str, list[Example]] = {}
    known: dict[Path, str] = {}
    for example in rest:
        if example.image not in known:
            known[example.image] = _content(example.image)
        if known[example.image] not in seen:
            groups.setdefault(known[example.image], []).append(example)
    if dropped := len(set(known.values()) & seen):
        progress.note(f"left out {dropped} images of the certification data that calibration sees or chose from")
    if not groups:
        raise CertificateError(
            "There is no image to certify on that calibration neither sees nor chose from. Give other data with --certify."
        )
    assert options.max_drop is not None
    chosen = _drawn(groups, options)
    certification = [example for image in chosen for example in groups[image]]
    return CertificationSplit(calibration, certification, [image for image in chosen for _ in groups[image]], metric)


def _metric(data: str | Sequence[Example], options: CompressionOptions) -> str:
    """The metric of the data to certify on; examples in memory are of no benchmark that is known."""
    source = data if options.certify is None else options.certify
    return metric_for(parse_spec(source).name if isinstance(source, str) else "examples", options.certify_metric)


def _quarter(pool: list[Example], options: CompressionOptions) -> tuple[list[Example], list[Example]]:
    images = list(dict.fromkeys(example.image for example in pool))
    random.Random(options.seed).shuffle(images)
    counts: dict[Path, int] = {}
    for example in pool:
        counts[example.image] = counts.get(example.image, 0) + 1
    taken, questions = set(), 0
    wanted = options.examples if options.rare == 0 else CANDIDATES * options.examples
    for image in images[: max(len(images) // 4, 1)]:
        if questions >= wanted:
            break
        taken.add(image)
        questions += min(counts[image], QUESTIONS_PER_IMAGE)
    return [e for e in pool if e.image in taken], [e for e in pool if e.image not in taken]


def _drawn(groups: dict[str, list[Example]], options: CompressionOptions) -> list[str]:
    """Images in random order, cut to what is needed; ``groups`` loses questions beyond the most per image."""
    draw = random.Random(options.seed + 1)
    most = options.certify_per_image or most_per_image(np.array([len(questions) for questions in groups.values()]))
    for image, questions in groups.items():
        if len(questions) > most:
            groups[image] = [questions[index] for index in sorted(draw.sample(range(len(questions)), most))]
    images = list(groups)
    draw.shuffle(images)
    if options.certify_images is not None:
        return images[: options.certify_images]
    wanted = None if options.certify is not None else _expected_need(np.array([len(groups[image]) for image in images]), options)
    return images if wanted is None else images[:wanted]


def most_per_image(sizes: np.ndarray) -> int:
    """The most questions per image at which unequal numbers cost at most a tenth of the images.

    All questions on the largest image may be lost at once, so that images of m_j questions are worth sum m_j / max m of equal ones.
    Drawing at most k of each makes it sum min(m_j, k) / k, at the price that images count more evenly than by their questions.
    """
    sizes = np.asarray(sizes)
    least, most = int(sizes.min()), int(sizes.max())
    # The worth falls with k, from that of all images at the smallest of them.
    return least + bisect_right(range(least + 1, most + 1), -(1 - UNEVEN) * len(sizes), key=lambda k: -np.minimum(sizes, k).sum() / k)


def _expected_need(sizes: np.ndarray, options: CompressionOptions) -> int | None:
    """Images of these sizes that certify a plan as :class:`Expectation` describes it, four times in five."""
    assert options.max_drop is not None
    max_drop, mean = options.max_drop / 100, float(np.mean(sizes))
    found = images_needed(max(round(mean), 1), max_drop, options.confidence, Expectation.within(max_drop))
    return None if found is None else math.ceil(found * float(np.max(sizes)) / max(round(mean), 1))


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return str(path)  # scoring will say what is wrong with it


def check_enough(sizes: np.ndarray, options: CompressionOptions, progress: Progress = SILENT) -> None:
    """Say what the certification data can certify, before any work is done.

    Raises:
        CertificateError: Not even a perfect outcome; says what would do.
    """
    assert options.max_drop is not None
    max_drop, confidence = options.max_drop / 100, options.confidence
    least, largest = least_images(max_drop, confidence), int(sizes.max())
    asked = f"a drop of at most {options.max_drop:g} points with {100 * confidence:g}% confidence"
    given = f"{int(sizes.sum()):,} questions about {len(sizes):,} images" + ("" if sizes.min() == largest else f" (up to {largest} on one)")
    if perfect_evidence(sizes, max_drop, confidence) < 1:
        smallest = _smallest_supported(sizes, confidence)
        ways = [f"--max-drop {smallest:g} or more"] if smallest is not None else []
        if (cap := _useful_cap(sizes, max_drop, confidence)) is not None:
            ways.append(f"--certify-per-image {cap}")
        raise CertificateError(
            f"{given} cannot certify {asked}, even if no answer changes: that takes at least {least:,} images with equally many "
            f"questions, or {least * largest:,} questions with up to {largest} on one image. "
            f"Give more data (--certify){''.join(f', or {way}' for way in ways)}."
        )
    usual = Expectation.within(max_drop)
    need = _expected_need(sizes, options)
    likely = "" if need is None else (
        f"; a plan that loses {100 * usual.drop:g} points and changes {100 * usual.changed:g}% of the answers passes four times in five on "
        f"{need:,} images"
    )  # fmt: skip
    progress.note(f"certifying {asked} on {given}: at least {least:,} images are needed even if no answer changes{likely}")


def _smallest_supported(sizes: np.ndarray, confidence: float) -> float | None:
    """Smallest drop, in points rounded up, that a perfect outcome on these images certifies."""
    low, high = 0.0, 0.99
    if perfect_evidence(sizes, high, confidence) < 1:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if perfect_evidence(sizes, middle, confidence) >= 1 else (middle, high)
    return math.ceil(100 * high * 100) / 100


def _useful_cap(sizes: np.ndarray, max_drop: float, confidence: float) -> int | None:
    """Most questions per image at which a perfect outcome would be certified."""
    caps = [int(cap) for cap in np.unique(sizes)[::-1][1:]]
    return next((cap for cap in caps if perfect_evidence(np.minimum(sizes, cap), max_drop, confidence) >= 1), None)
