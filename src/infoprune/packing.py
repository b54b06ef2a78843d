"""Batches of questions with reference answers; questions on one image can share that image's tokens.

A row holds the longest common prefix of its questions once (for the usual prompt: everything up to and including the image), then
each question's remainder, one after another. A remainder sees the prefix and itself, at the positions that it has in its own prompt. For
causal attention this is exact, and saves most of the work where an image has many questions. Rows of one
question each are given to the model as its own processor would: masks and positions are left to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from infoprune.data.example import Example
from infoprune.errors import DataError
from infoprune.prompts import Encoded, PromptEncoder, encode_groups

QUESTIONS_PER_ROW = 32  # each adds to the row's length; an image with more passes the tower once per row
CHARACTERS_PER_ROW = 12_000  # of questions and answers, some thousands of tokens: a row's mask has the square of them


@dataclass(frozen=True)
class PackedBatch:
    """Rows ready for a model's forward.

    Attributes:
        inputs: Keyword arguments of the model's forward: ``input_ids`` (rows, length), the image tensors, and for packed rows
            ``attention_mask`` (rows, 1, length, length) boolean and ``position_ids`` (rows, length) or (dimensions, rows, length), for rows
            of one question ``attention_mask`` (rows, length) and what else the family's processor says about tokens.
        segments: (rows, length) whose token it is: -1 padding, 0 the row's prefix, k its k-th question.
        image: (rows, length) boolean, true on image tokens.
        rows, columns: (targets,) where in the hidden states each answer token is predicted.
        targets: (targets,) ids of the reference answer's tokens, end-of-sequence included.
        question: (targets,) index of the question, within this batch, that each target belongs to.
        num_questions: Questions in this batch, numbered in the order in which they were given.
    """

    inputs: dict[str, torch.Tensor]
    segments: torch.Tensor
    image: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    question: torch.Tensor
    num_questions: int

    @property
    def valid(self) -> torch.Tensor:
        """(rows, length) boolean, false on padding."""
        return self.segments >= 0

    def without_inputs(self) -> PackedBatch:
        """The same tokens without what a model is given: no images, no masks."""
        return replace(self, inputs={})

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on ``device``."""
        moved = {name: value.to(device) for name, value in self.__dict__.items() if isinstance(value, torch.Tensor)}
        return PackedBatch(inputs={k: v.to(device) for k, v in self.inputs.items()}, num_questions=self.num_questions, **moved)


def batches(
    encoder: PromptEncoder,
    examples: Sequence[Example],
    *,
    images_per_batch: int = 8,
    share_prefix: bool = True,
    done: Container[int] = (),
) -> Iterator[tuple[PackedBatch, list[int]]]:
    """Packed batches over ``examples``, each with the indices of its examples.

    Args:
        encoder: Encodes prompts and images.
        examples: Those on one image are packed together, up to :data:`QUESTIONS_PER_ROW`.
        images_per_batch: Rows of a batch.
        share_prefix: ``False`` puts every question on a row of its own, as some families always do.
        done: Indices of examples; batches of such alone are left out.
    """
    if not examples:
        raise DataError("There are no examples to run.")
    groups = rows_by_image(examples) if share_prefix and encoder.shares_prefix else [[index] for index in range(len(examples))]
    for start in range(0, len(groups), images_per_batch):
        chunk = groups[start : start + images_per_batch]
        indices = [index for group in chunk for index in group]
        if not all(index in done for index in indices):
            yield pack(encoder, [[examples[index] for index in group] for group in chunk]), indices


def rows_by_image(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the examples that share a row: those on one image, wherever they stand; images in the order of their first questions."""
    found: dict[Path, list[int]] = {}
    for index, example in enumerate(examples):
        found.setdefault(example.image, []).append(index)
    return [row for group in found.values() for row in in_rows(group, examples, QUESTIONS_PER_ROW)]


def in_rows(group: Sequence[int], examples: Sequence[Example], most: int) -> list[list[int]]:
    """Indices of questions on one image in rows of at most ``most``; rows of several have no more text than :data:`CHARACTERS_PER_ROW`."""
    rows: list[list[int]] = []
    room = 0
    for index in group:
        example = examples[index]
        length = len(example.prompt or example.question) + len(example.answer)
        if not rows or len(rows[-1]) == most or room < length:
            rows.append([])
            room = CHARACTERS_PER_ROW
        rows[-1].append(index)
        room -= length
    return rows


def pack(encoder: PromptEncoder, groups: Sequence[Sequence[Example]]) -> PackedBatch:
    """One row per group of examples that share an image."""
    images = [group[0].load_image() for group in groups]
    return pack_encoded(encoder, encode_groups(encoder, groups, images, answers=True), encoder.image_inputs(images))


def pack_encoded(
    encoder: PromptEncoder, encoded: Sequence[Sequence[Encoded]], image_inputs: dict[str, torch.Tensor], *, always: bool = False
) -> PackedBatch:
    """Lay out encoded questions, one row per group; see the module's docstring for the layout.

    Args:
        encoder: Encoded the questions.
        encoded: Questions by row.
        image_inputs: Tensors of the rows' images.
        always: Make masks and positions also where no row has more than one question.
    """
    layouts = [_layout(group) for group in encoded]
    ids = _padded([layout.ids for layout in layouts], encoder.processor.tokenizer.pad_token_id or 0)
    segments = _padded([layout.segments for layout in layouts], -1)
    valid, image = segments >= 0, ids == encoder.image_token_id
    inputs = {"input_ids": ids, **image_inputs}
    if not always and all(len(group) == 1 for group in encoded):
        inputs["attention_mask"] = valid.long()
        if encoder.token_types:
            inputs[encoder.token_types] = pad_sequence([item.types for (item,) in encoded if item.types is not None], batch_first=True)
        inputs |= {name: pad_sequence([item.question[name] for (item,) in encoded], batch_first=True) for name in encoder.question_inputs}
    else:
        seen = visible(segments, segments) & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        positions = pad_sequence([layout.positions.T for layout in layouts], batch_first=True).movedim(-1, 0)
        inputs |= {"attention_mask": seen[:, None], "position_ids": positions[0] if len(positions) == 1 else positions}
    offsets = itertools.accumulate((len(group) for group in encoded), initial=0)
    targets = [
        (row, *target[:2], offset + target[2]) for (row, layout), offset in zip(enumerate(layouts), offsets) for target in layout.targets
    ]
    row_index, columns, target_ids, question = (torch.tensor(column) for column in zip(*targets, strict=True))
    return PackedBatch(inputs, segments, valid & image, row_index, columns, target_ids, question, sum(len(group) for group in encoded))


def visible(asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """(rows, a, b) which of the tokens with segments ``asked`` (rows, b) those with ``asking`` (rows, a) may see, were they all earlier."""
    return (asking[:, :, None] == asked[:, None, :]) | (asked[:, None, :] == 0)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(rows, longest row), padded on the right."""
    found = torch.full((len(rows), max(map(len, rows))), value)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    return found


@dataclass(frozen=True)
class _Layout:
    ids: list[int]
    segments: list[int]
    positions: torch.Tensor  # (dimensions, tokens)
    targets: list[tuple[int, int, int]]  # column, token id, question within the row


def _layout(group: Sequence[Encoded]) -> _Layout:
    prompts = [item.prompt for item in group]
    # At least one prompt token stays outside the prefix, so that each question predicts its first answer token itself.
    shared = min(len(prompt) for prompt in prompts) - 1 if len(group) > 1 else 0
    prefix = next((i for i in range(shared) if any(p[i] != prompts[0][i] for p in prompts)), shared)
    places = [torch.arange(len(item.prompt) + len(item.answer))[None] if item.positions is None else item.positions for item in group]
    ids, segments, positions, targets = prompts[0][:prefix], [0] * prefix, [places[0][:, :prefix]], []
    for number, item in enumerate(group, start=1):
        tail = item.prompt[prefix:] + item.answer[:-1]  # the last answer token is predicted, never read
        first = len(ids) + len(item.prompt) - prefix - 1
        targets += [(first + i, token, number - 1) for i, token in enumerate(item.answer)]
        ids = ids + tail
        segments += [number] * len(tail)
        positions.append(places[number - 1][:, prefix : prefix + len(tail)])
    return _Layout(ids, segments, torch.cat(positions, 1), targets)


def answer_logits(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Logits (targets, vocabulary) at the positions that predict answer tokens."""
    return logits_at(model, batch.inputs, batch.rows, batch.columns, use_cache=False)


def logits_at(model: Any, inputs: dict[str, torch.Tensor], rows: torch.Tensor, columns: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits (places, vocabulary) at the places (``rows``, ``columns``); the language head runs on these alone.

    The head reads chosen positions, so whatever the family does to its output (scaling, soft-capping) is done to these.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns], *args[1:]))
    try:
        return model(**inputs, **options).logits
    finally:
        handle.remove()
