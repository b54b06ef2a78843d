"""TextVQA (Singh et al. 2019): questions about text in images, ten answers each; words found by OCR are a file of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from infoprune.data.benchmark import Benchmark, Prompt, Row, Text, listed, most_frequent, official_file
from infoprune.data.example import Example
from infoprune.data.problems import Problems

QUESTIONS = "TextVQA_0.5.1_{split}.json"
OCR = "TextVQA_Rosetta_OCR_v0.2_{split}.json"


class _Question(Row):
    question_id: int = Field(ge=0)
    image_id: Text
    question: Text
    answers: list[str] | None = None
    ocr_tokens: list[str] | None = None


class _Words(Row):
    image_id: str
    ocr_tokens: list[str]


def _parse(row: Any, split: str) -> Example:
    found = _Question.model_validate(row)
    answers = found.answers or []
    extras = {} if found.ocr_tokens is None else {"ocr_tokens": tuple(found.ocr_tokens)}
    return Example(
        Path(f"{found.image_id}.jpg"),
        found.question,
        most_frequent(answers),
        id=str(found.question_id),
        answers=tuple(answers),
        extras=extras,
    )


def _rows(folder: Path, split: str, problems: Problems) -> Iterator[Any]:
    path = official_file(folder, QUESTIONS.format(split=split))
    assert path is not None  # or there would be no such split
    words: dict[str, list[str]] = {}
    found = official_file(folder, OCR.format(split=split))
    for item in listed(found, "data", problems) if found is not None else ():
        try:
            parsed = _Words.model_validate(item)
        except ValueError:
            problems.add(f"malformed row in {OCR.format(split=split)}", f"image {item.get('image_id') if isinstance(item, dict) else item}")
        else:
            if parsed.image_id in words:
                problems.add(f"image that occurs twice in {OCR.format(split=split)}", parsed.image_id)
            words.setdefault(parsed.image_id, parsed.ocr_tokens)
    for row in listed(path, "data", problems):
        id = row.get("image_id") if isinstance(row, dict) else None
        yield row | {"ocr_tokens": words[id]} if isinstance(id, str) and id in words else row


TEXTVQA = Benchmark(
    name="textvqa",
    hub_id="lmms-lab/textvqa",
    patterns=(QUESTIONS,),
    image_folders=lambda split: ("test_images" if split == "test" else "train_images", "images"),
    rows=_rows,
    parse=_parse,
    aliases={"validation": "val"},
    defaults={"train": "train", "validation": "val", "test": "val"},
    hub_splits={"val": "validation"},
    prompt=Prompt(capitalize=True),
)
