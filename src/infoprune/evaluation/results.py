"""Result files as the benchmarks' evaluation servers take them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infoprune.data import Example
from infoprune.errors import DataError, InfoPruneError
from infoprune.outputs import check_file


def _vqa(id: str, answer: str) -> dict[str, Any]:
    return {"question_id": int(id), "answer": answer}


def _gqa(id: str, answer: str) -> dict[str, Any]:
    return {"questionId": id, "prediction": answer}


FORMS: dict[str, Callable[[str, str], dict[str, Any]]] = {"vqav2": _vqa, "textvqa": _vqa, "gqa": _gqa}


def check_results(path: Path, dataset: str) -> None:
    """Raise before any work is done.

    Raises:
        DataError: There is no evaluation server for this data set.
        InfoPruneError: The file can't be written there.
    """
    if dataset not in FORMS:
        raise DataError(f"There is no form of result files for '{dataset}'; there is for {', '.join(FORMS)}.")
    check_file(path, "answers")


def write_results(path: Path, answers: Sequence[str], examples: Sequence[Example], *, dataset: str) -> None:
    """Write a model's answers as a JSON list, aside first and then in place.

    VQAv2 and TextVQA (EvalAI): ``{"question_id": int, "answer": str}``; GQA: ``{"questionId": str, "prediction": str}``. Answers are
    written as the model gave them; the servers normalise. They want every question of a split, which only the caller can know.

    Args:
        path: The file; one that is there is replaced.
        answers: One per example.
        examples: What was asked, each with its id; reference answers are not needed.
        dataset: Name of the benchmark, as in data specifications.

    Raises:
        DataError: No such benchmark, another number of answers than of examples, or ids that are missing, doubled or of another form.
        InfoPruneError: The file can't be written.
    """
    check_results(path, dataset)
    if len(answers) != len(examples):
        raise DataError(f"{len(answers):,} answers do not fit {len(examples):,} questions.")
    ids = [example.id for example in examples if example.id]
    numeric = FORMS[dataset] is _vqa
    unfit = len(examples) - len(ids) + sum(numeric and not (id.isascii() and id.isdigit()) for id in ids)
    if unfit or len(set(ids)) < len(ids):
        wanted = "a whole number" if numeric else "an id"
        raise DataError(
            f"A result file of {dataset} needs {wanted} for each question, and none twice: {unfit:,} of {len(examples):,} have none, "
            f"{len(ids) - len(set(ids)):,} have one that was there before."
        )
    rows = [FORMS[dataset](id, answer) for id, answer in zip(ids, answers, strict=True)]
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        try:
            aside.write_text(json.dumps(rows), encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InfoPruneError(f"Cannot write {path}: {error.strerror or error}.") from error
