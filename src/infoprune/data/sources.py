"""Turn a data specification (``vqav2:val@folder``, ``easy-vqa:test``, ``my.jsonl``) into examples."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from infoprune.data import easy_vqa, hub, own
from infoprune.data.benchmark import Benchmark
from infoprune.data.example import Example
from infoprune.data.gqa import GQA
from infoprune.data.images import home_expanded, unreadable
from infoprune.data.problems import Problems
from infoprune.data.textvqa import TEXTVQA
from infoprune.data.vqav2 import VQAV2
from infoprune.errors import DataError

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (VQAV2, TEXTVQA, GQA)}
MANY_IMAGES = 5000  # reading so many takes long enough to be told
EASY_VQA, OWN = "easy-vqa", "own"
FORMS = f"'easy-vqa[:SPLIT]', a .jsonl or .json file, or one of {', '.join(BENCHMARKS)} as NAME[:SPLIT][@FOLDER or HUB-ID]"


@dataclass(frozen=True)
class DataSpec:
    """A parsed specification.

    Attributes:
        name: ``easy-vqa``, a benchmark of :data:`BENCHMARKS`, or ``own`` for a file of the user's own.
        split: As it was given; ``None``: none was.
        source: Folder, hub id, or path of the user's file; ``None``: the default hub id.
    """

    name: str
    split: str | None = None
    source: str | None = None

    @property
    def benchmark(self) -> Benchmark | None:
        """What reads it, where it is a benchmark; has its prompt, too."""
        return BENCHMARKS.get(self.name)


def parse_spec(spec: str) -> DataSpec:
    """Parse ``NAME[:SPLIT][@SOURCE]``; what starts with no known name is a path.

    Raises:
        DataError: easy-vqa with a source, which it has of its own.
    """
    names = "|".join((EASY_VQA, *BENCHMARKS))
    found = re.fullmatch(rf"({names})(?::([^@]*))?(?:@(.*))?", spec.strip(), flags=re.DOTALL)
    if found is None:
        return DataSpec(OWN, source=spec)
    name, split, source = found.groups()
    if name == EASY_VQA and source is not None:
        raise DataError(f"easy-vqa comes from its own wheel, so '{spec}' can't name a source. Leave out '@{source}'.")
    return DataSpec(name, split or None, source or None)


@dataclass(frozen=True)
class Loaded:
    """The examples of a specification, and how many bad records were skipped on the way."""

    examples: list[Example]
    skipped: int


def load_examples(
    spec: str,
    *,
    default_split: str = "train",
    skip_bad: bool = False,
    unanswered: bool = False,
    ocr: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> list[Example]:
    """Load the examples that ``spec`` names.

    Args:
        spec: ``NAME[:SPLIT][@SOURCE]`` with NAME one of easy-vqa, vqav2, textvqa, gqa and SOURCE a folder with the files that the
            benchmark's authors ship, or a hub id (default: lmms-lab's); or the path of a ``.jsonl`` or ``.json`` file whose records have
            ``image`` (a path, relative to the file), ``question`` and ``answer`` or ``answers``, and may have ``id`` and ``kinds``.
        default_split: ``train``, ``validation`` or ``test``: the purpose, where ``spec`` names no split.
        skip_bad: Leave bad records out and say how many, instead of refusing the data.
        unanswered: Take questions without a reference answer, too, as test splits have them: for result files, not for figures.
        ocr: Put the words that a reader found in the image into the prompt, where the benchmark has them (TextVQA).
        notify: Called with one line for people before a download, and with what was skipped.

    Raises:
        DataError: Nothing there, nothing readable in it, or bad records: missing, unreadable or oversized images, paths that leave the
            folder, malformed rows, ids or keys that occur twice, questions and annotations that do not match; with counts and the first
            cases.
    """
    return load_counted(
        spec, default_split=default_split, skip_bad=skip_bad, unanswered=unanswered, ocr=ocr, notify=notify,
    ).examples  # fmt: skip


def load_counted(
    spec: str,
    *,
    default_split: str = "train",
    skip_bad: bool = False,
    unanswered: bool = False,
    ocr: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> Loaded:
    """As :func:`load_examples`, with the number of bad records that were skipped."""
    parsed = parse_spec(spec)
    if parsed.name == EASY_VQA:
        return Loaded(easy_vqa.read(parsed.split or default_split, notify), 0)
    problems = Problems(spec)
    examples = list(_distinct(_found(parsed, spec, default_split, ocr, problems, notify), problems))
    if (count := len({example.image for example in examples})) >= MANY_IMAGES:
        notify(f"{spec}: reading {count:,} images to their ends, in search of damaged ones")
    broken = unreadable(example.image for example in examples)
    for example in examples:
        if example.image in broken:
            problems.add("image that can't be read", f"{example.image.name}: {broken[example.image]}")
    examples = [example for example in examples if example.image not in broken]
    if examples and not unanswered:
        examples = _answered(examples, spec, problems)
    if ocr and examples and not any(example.extras.get("ocr_tokens") for example in examples):
        raise DataError(
            f"ocr: {spec} has no words that a reader found in the images. TextVQA has them, in files of their own "
            "(TextVQA_Rosetta_OCR_v0.2_val.json, beside the questions)."
        )
    if not examples and not problems.count:
        raise DataError(f"{spec} has no records. {'Each needs image, question and answer.' if parsed.name == OWN else ''}".strip())
    problems.settle(len(examples), skip_bad=skip_bad, notify=notify)
    return Loaded(examples, problems.count)


def _found(
    parsed: DataSpec, spec: str, default_split: str, ocr: bool, problems: Problems, notify: Callable[[str], None]
) -> Iterator[Example]:
    benchmark = parsed.benchmark
    if benchmark is None:
        path = home_expanded(parsed.source or "")
        if not os.path.isfile(path):
            raise DataError(f"No data at '{spec}'. Give {FORMS}.")
        return own.read(path, problems)
    benchmark = replace(benchmark, prompt=replace(benchmark.prompt, ocr=ocr))
    split = benchmark.split(parsed.split, default_split)
    source = parsed.source or benchmark.hub_id
    folder = home_expanded(source)
    if os.path.isdir(folder) and (benchmark.splits(folder) or not _has_parquet(folder)):
        return benchmark.read(folder, split, problems)
    if not os.path.isdir(folder) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise DataError(f"No folder at '{source}', and it is no hub id. Give {FORMS}.")
    return hub.read(benchmark, source, split, problems, notify)


def _has_parquet(folder: Path) -> bool:
    return next(folder.rglob("*.parquet"), None) is not None


def _distinct(examples: Iterable[Example], problems: Problems) -> Iterator[Example]:
    seen: set[str] = set()
    for example in examples:
        if example.id is not None and example.id in seen:
            problems.add("id that occurs twice", example.id)
            continue
        if example.id is not None:
            seen.add(example.id)
        yield example


def _answered(examples: list[Example], spec: str, problems: Problems) -> list[Example]:
    found = [example for example in examples if example.answered]
    if not found:
        raise DataError(
            f"None of the {len(examples):,} questions of {spec} has a reference answer ('answer' or 'answers' in a file of your own). A "
            "split whose answers are secret serves for a result file (unanswered=True), not for compression or figures; for other splits, "
            "check that the file of annotations is there."
        )
    for example in examples:
        if not example.answered:
            problems.add("question without a reference answer", example.id or example.question)
    return found
