"""Answers of a model to many questions by greedy generation: fast, and without losing work when it is interrupted.

Questions are answered in batches that depend on the questions alone, so a run that was interrupted, and one that is shared by several
processes, gives the answers of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from infoprune.data import Example
from infoprune.errors import DataError, InfoPruneError
from infoprune.evaluation.decoding import batched_answers, can_pack, packed_answers
from infoprune.evaluation.record import ANSWERS, RecordFile, fingerprint
from infoprune.memory import out_of_memory
from infoprune.model import VLM, named_precision
from infoprune.packing import in_rows
from infoprune.progress import SILENT, Progress
from infoprune.training.loop import Processes, wants_bfloat16

MAX_NEW_TOKENS = 16
IMAGES_PER_BATCH = 8
QUESTIONS_PER_ROW = 16  # their keys and values are held at once; an image with more passes the tower once per row
BATCHES_APART = 16  # that a process may be ahead of the others: these must not wait for it longer than process groups allow


def generate_answers(
    vlm: VLM,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    images_per_batch: int = IMAGES_PER_BATCH,
    record: Path | None = None,
    processes: Processes | None = None,
    progress: Progress = SILENT,
) -> list[str]:
    """Greedy answers, stripped of white space: those of ``generate(do_sample=False)`` for one question after the other.

    Where logits tie to the last bits of their precision, the size of a batch may decide which token comes first.

    Args:
        vlm: The model; it computes in its own precision.
        examples: Questions in any order. Those on one image share its features, and its keys and values where the family allows it.
        max_new_tokens: Longest answer.
        images_per_batch: Images whose questions are answered together: lower it if memory runs out. Where questions can't share an image's
            keys and values, four times as many questions.
        record: File for the answers, where all processes see it. An interrupted run goes on from what it left beside it; a file that is
            finished is read.
        processes: Who shares the work; every one of them gets all answers. ``None``: this process alone.
        progress: Shows how many are answered.

    Raises:
        DataError: No examples, an image that can't be read, or a ``record`` that another run is writing or that is of another model,
            other data or settings.
        InfoPruneError: Not enough memory, or options that make no sense.
    """
    if not examples:
        raise DataError("There are no questions to answer.")
    if max_new_tokens < 1 or images_per_batch < 1:
        raise InfoPruneError(f"An answer needs at least one token and a batch one image, not {max_new_tokens} and {images_per_batch}.")
    processes = processes or Processes()
    if record is None:
        return _answer_all(vlm, examples, max_new_tokens, images_per_batch, None, processes, progress)
    file = RecordFile(Path(record), fingerprint(vlm, examples, max_new_tokens=max_new_tokens), examples, ANSWERS)
    answers = file.finished()
    if answers is None:
        with file.held(processes.index):
            answers = _answer_all(vlm, examples, max_new_tokens, images_per_batch, file, processes, progress)
            if processes.index == 0:
                file.finish(answers)
            processes.wait()
    else:
        progress.note(f"The answers are read from {record}.")
    return answers


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
    """The precision to load a model in.

    Args:
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: on CUDA bfloat16, or float16 where that is not supported; else float32.
        device: Where the model is going to be.

    Raises:
        InfoPruneError: Another ``precision``.
    """
    if precision == "auto":
        precision = "fp32" if device.type != "cuda" else "bf16" if wants_bfloat16("auto", device) else "fp16"
    return named_precision(precision)


def _answer_all(
    vlm: VLM,
    examples: Sequence[Example],
    max_new_tokens: int,
    images_per_batch: int,
    file: RecordFile | None,
    processes: Processes,
    progress: Progress,
) -> list[str]:
    share = can_pack(vlm)
    known = file.resumed() if file is not None else {}
    processes.wait()  # all have read before one writes
    found = batches(examples, images_per_batch, share_prefix=share)
    pending = [batch for batch in found if not all(index in known for group in batch for index in group)]
    own = pending[processes.index :: processes.count]
    if known:
        progress.note(f"{len(known)} of {len(examples)} questions were answered by an interrupted run.")
    append = file.appender(processes.index) if file is not None else lambda answers: None
    fresh: dict[int, str] = {}
    with progress.task("answering", sum(len(group) for batch in own for group in batch)) as advance:
        for number, batch in enumerate(own, start=1):
            groups = [[examples[index] for index in group] for group in batch]
            with out_of_memory("answer", images_per_batch):
                if share:
                    texts = packed_answers(vlm, groups, max_new_tokens)
                else:
                    texts = batched_answers(vlm, [example for group in groups for example in group], max_new_tokens)
            new = dict(zip((index for group in batch for index in group), texts, strict=True))
            append(new)
            fresh |= new
            advance(len(new))
            if number % BATCHES_APART == 0 and number * processes.count <= len(pending):
                processes.wait()
    known |= {index: answer for part in _gathered(processes, fresh) for index, answer in part.items()}
    return [known[index] for index in range(len(examples))]


def longer_references(vlm: VLM, examples: Sequence[Example], max_new_tokens: int) -> int:
    """How many questions have no reference answer that fits into so many tokens, so that no generated answer can equal it."""
    tokenizer = vlm.processor.tokenizer
    lengths: dict[str, int] = {}

    def length(text: str) -> int:
        if text not in lengths:
            lengths[text] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return lengths[text]

    return sum(example.answered and min(map(length, {example.answer, *example.answers})) > max_new_tokens for example in examples)


def batches(examples: Sequence[Example], images_per_batch: int, *, share_prefix: bool) -> list[list[list[int]]]:
    """Batches of groups of indices, each group on one image; the longest come first, those of one batch are about equally long.

    Args:
        examples: All questions.
        images_per_batch: Groups of a batch.
        share_prefix: ``False``: bounds the questions of a batch instead, to four times as many.
    """
    by_image: dict[Path, list[int]] = {}
    for index, example in enumerate(examples):
        by_image.setdefault(example.image, []).append(index)
    most = QUESTIONS_PER_ROW if share_prefix else min(QUESTIONS_PER_ROW, 4 * images_per_batch)
    groups = [row for group in by_image.values() for row in in_rows(group, examples, most)]
    groups.sort(key=lambda group: -sum(len(examples[index].question) for index in group))
    found: list[list[list[int]]] = []
    room = 0
    for group in groups:
        needed = 1 if share_prefix else len(group)
        if room < needed:
            found.append([])
            room = images_per_batch if share_prefix else 4 * images_per_batch
        found[-1].append(group)
        room -= needed
    return found


def _gathered(processes: Processes, own: dict[int, str]) -> list[dict[int, str]]:
    if processes.count == 1:
        return [own]
    from accelerate.utils import gather_object

    return gather_object([own])
