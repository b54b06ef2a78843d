"""GQA (Hudson & Manning 2019): compositional questions on scene graphs, one answer each; balanced splits are what accuracy is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from infoprune.data.benchmark import Benchmark, Row, Text, official_file, read_json
from infoprune.data.example import Example
from infoprune.data.images import ImageFolder
from infoprune.data.problems import Problems
from infoprune.errors import DataError

TIERS = ("train", "val", "testdev", "test", "challenge", "submission")

# Operations that end a question's programme without making it longer, as far as the benchmark counts steps.
_CLOSING = ("exist", "query: name", "choose name")


class _Types(Row):
    structural: str | None = None
    semantic: str | None = None
    detailed: str | None = None


class _Step(Row):
    operation: str
    argument: str


class _Groups(Row):
    global_: str | None = Field(default=None, alias="global")


class _Question(Row):
    id: Text
    image_id: Text = Field(alias="imageId")
    question: Text
    answer: str | None = None
    types: _Types | None = None
    semantic: list[_Step] | None = None
    entailed: list[str] | str | None = None
    groups: _Groups | None = None
    balanced: bool = Field(default=True, alias="isBalanced")
    valid: list[str] | None = None
    plausible: list[str] | None = None


def _parse(row: Any, split: str) -> Example:
    found = _Question.model_validate(row)
    kinds = {} if found.types is None else dict(found.types)
    kinds["words"] = str(len(found.question.split()))
    if found.semantic is not None:
        steps = (f"{step.operation}: {step.argument}" for step in found.semantic)
        kinds["steps"] = str(sum(not any(part in step for part in _CLOSING) for step in steps))
    if not found.balanced:
        kinds["balanced"] = "no"
    entailed = re.findall(r"\w+", found.entailed) if isinstance(found.entailed, str) else found.entailed or ()
    group = found.groups.global_ if found.groups else None
    extras = {"entailed": entailed, "group": None if group is None else (group,), "valid": found.valid, "plausible": found.plausible}
    return Example(
        Path(f"{found.image_id}.jpg"),
        found.question,
        (found.answer or "").strip(),
        id=found.id,
        kinds={name: value for name, value in kinds.items() if value is not None},
        extras={name: tuple(value) for name, value in extras.items() if value is not None},
    )


def _rows(folder: Path, split: str, problems: Problems) -> Iterator[Any]:
    """Questions with their ids and, where the evaluation's file of choices is there, the answers that are valid and plausible."""
    choices: dict[str, Any] = {}
    for part in _parts(folder, f"{split.partition('_')[0]}_choices", problems):
        for id in sorted(choices.keys() & part.keys()):
            problems.add("choices of a question that had some", f"question {id}")
        choices = part | choices
    for part in _parts(folder, f"{split}_questions", problems):
        for id, question in part.items():
            if not isinstance(question, dict):
                problems.add("malformed row", f"question {id} is not an object")
                continue
            found = choices.get(id)
            chosen = {name: found.get(name) for name in ("valid", "plausible")} if isinstance(found, dict) else {}
            yield question | chosen | {"id": id}


def _parts(folder: Path, name: str, problems: Problems) -> Iterator[dict[str, Any]]:
    """What a file holds, or each of the files in the folder of its name, which is how the large ones come.

    Raises:
        DataError: One of them can't be read, is of another form, or leads out of the folder.
    """
    single, chunked = official_file(folder, f"{name}.json"), official_file(folder, name)
    files = [single] if single is not None else sorted(chunked.glob(f"{name}_*.json"), key=_number) if chunked is not None else []
    for path in files:
        loaded = read_json(ImageFolder(folder).inside(path), problems)
        if not isinstance(loaded, dict):
            raise DataError(f"{path} must hold questions by their ids; it is not in the benchmark's official format.")
        yield loaded


def _number(path: Path) -> tuple[int, str]:
    number = path.stem.rpartition("_")[2]
    return (int(number) if number.isdecimal() else 0, path.name)


def _hub_configs(split: str) -> tuple[str, str]:
    return f"{split}_instructions", f"{split}_images"


GQA = Benchmark(
    name="gqa",
    hub_id="lmms-lab/GQA",
    patterns=("{split}_questions.json", "{split}_questions"),
    image_folders=lambda split: ("images", "allImages/images"),
    rows=_rows,
    parse=_parse,
    aliases={tier: f"{tier}_balanced" for tier in TIERS} | {"validation": "val_balanced"},
    defaults={"train": "train_balanced", "validation": "val_balanced", "test": "testdev_balanced"},
    hub_splits={f"{tier}_{kind}": tier for tier in TIERS for kind in ("balanced", "all")},
    hub_configs=_hub_configs,
)
