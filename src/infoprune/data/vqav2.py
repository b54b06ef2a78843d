"""VQAv2 (Goyal et al. 2017): questions and annotations by split, images of COCO; ten people answered each question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from infoprune.data.benchmark import Benchmark, Row, Text, listed, official_file
from infoprune.data.example import Example
from infoprune.data.problems import Problems

QUESTIONS = "v2_OpenEnded_mscoco_{split}_questions.json"
ANNOTATIONS = "v2_mscoco_{split}_annotations.json"

Id = Annotated[int, Field(ge=0)]


class _Answer(Row):
    answer: str
    answer_id: int


class _Question(Row):
    question_id: Id
    image_id: Id
    question: Text
    question_type: str | None = None
    answer_type: str | None = None
    multiple_choice_answer: Text | None = None
    answers: list[_Answer] | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Question:
        if self.answers is not None and len({answer.answer_id for answer in self.answers}) < max(1, len(self.answers)):
            raise ValueError("answers must not be empty, and each needs an answer_id of its own")
        if (self.answers is None) != (self.multiple_choice_answer is None):
            raise ValueError("answers and multiple_choice_answer come together")
        return self


def _parse(row: Any, split: str) -> Example:
    found = _Question.model_validate(row)
    kinds = {"question_type": found.question_type, "answer_type": found.answer_type}
    return Example(
        Path(f"COCO_{_images_of(split)}_{found.image_id:012d}.jpg"),
        found.question,
        found.multiple_choice_answer or "",
        id=str(found.question_id),
        answers=tuple(answer.answer for answer in found.answers or ()),
        kinds={name: value for name, value in kinds.items() if value is not None},
    )


def _rows(folder: Path, split: str, problems: Problems) -> Iterator[Any]:
    """Questions, each with its annotation; splits without a file of annotations have none."""
    path = official_file(folder, QUESTIONS.format(split=split))
    assert path is not None  # or there would be no such split
    questions = listed(path, "questions", problems)
    path = official_file(folder, ANNOTATIONS.format(split=split))
    if path is None:
        yield from questions
        return
    annotations: dict[Any, Any] = {}
    for annotation in listed(path, "annotations", problems):
        id = annotation.get("question_id") if isinstance(annotation, dict) else None
        if not isinstance(id, int):
            problems.add("malformed annotation", "question_id must be a whole number")
        elif id in annotations:
            problems.add("annotation of a question that had one", f"question {id}")
        else:
            annotations[id] = annotation
    unused = set(annotations)
    for question in questions:
        id = question.get("question_id") if isinstance(question, dict) else None
        if not isinstance(id, int):
            yield question  # malformed; the parser says how
            continue
        unused.discard(id)
        annotation = annotations.get(id)
        if annotation is None:
            problems.add("question without an annotation", f"question {id}")
        elif annotation.get("image_id") != question.get("image_id"):
            problems.add("question and annotation of different images", f"question {id}")
        else:
            yield annotation | question
    for id in sorted(unused):
        problems.add("annotation without a question", f"question {id}")


def _images_of(split: str) -> str:
    return "test2015" if split == "test-dev2015" else split


VQAV2 = Benchmark(
    name="vqav2",
    hub_id="lmms-lab/VQAv2",
    patterns=(QUESTIONS,),
    image_folders=lambda split: (_images_of(split), "images", f"images/{_images_of(split)}", f"Images/mscoco/{_images_of(split)}"),
    rows=_rows,
    parse=_parse,
    aliases={
        "train": "train2014", "val": "val2014", "validation": "val2014", "test": "test2015", "testdev": "test-dev2015",
        "test-dev": "test-dev2015",
    },
    defaults={"train": "train2014", "validation": "val2014", "test": "val2014"},
    hub_splits={"train2014": "train", "val2014": "validation", "test2015": "test", "test-dev2015": "testdev"},
)  # fmt: skip
