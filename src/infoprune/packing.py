"""Batches of questions with reference answers; questions on one image can share that image's tokens.

A row holds the longest common prefix of its questions once (for the usual prompt: everything up to and including the image), then
each question's remainder, one after another. A remainder sees the prefix and itself; positions restart after the prefix. For
causal attention with rotary positions this is exact, and saves most of the work where an image has many questions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from infoprune.data.example import Example
from infoprune.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    Attributes:
        prompt: Ids of the prompt with image tokens expanded.
        answer: Ids of the answer and the end-of-sequence token.
    """

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class PackedBatch:
    """Rows ready for a model's forward.

    Attributes:
        inputs: Keyword arguments of the base model's forward: ``input_ids`` (rows, length), ``attention_mask`` (rows, 1, length,
            length) boolean, ``position_ids`` (rows, length), and the image tensors.
        valid: (rows, length) boolean, false on padding.
        image: (rows, length) boolean, true on image tokens.
        rows, columns: (targets,) where in the hidden states each answer token is predicted.
        targets: (targets,) ids of the reference answer's tokens, end-of-sequence included.
        question: (targets,) index of the question, within this batch, that each target belongs to.
        num_questions: Questions in this batch, numbered in the order in which they were given.
    """

    inputs: dict[str, torch.Tensor]
    valid: torch.Tensor
    image: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    question: torch.Tensor
    num_questions: int

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on ``device``."""
        moved = {name: value.to(device) for name, value in self.__dict__.items() if isinstance(value, torch.Tensor)}
        return PackedBatch(inputs={k: v.to(device) for k, v in self.inputs.items()}, num_questions=self.num_questions, **moved)


@dataclass
class PromptEncoder:
    """Turns examples into token ids and image tensors with a model's own processor.

    Attributes:
        processor: A Transformers processor with a tokenizer and an image processor.
        image_token_id: Id that marks image positions.
        suffix: Appended to each question, e.g. an instruction to answer in one word.
        answer_prefix: Put before the answer. ``None``: a space where the rendered prompt ends in neither space nor newline.
    """

    processor: Any
    image_token_id: int
    suffix: str = ""
    answer_prefix: str | None = None
    _eos: int = field(init=False)

    def __post_init__(self) -> None:
        self._eos = self.processor.tokenizer.eos_token_id

    def prompt(self, question: str) -> str:
        """The prompt text of one question, with one image marker."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question + self.suffix}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return f"{self.processor.image_token}{question}{self.suffix}"

    def encode(self, example: Example, image: Any) -> Encoded:
        """Ids of one example; ``image`` is its loaded image."""
        text = self.prompt(example.question)
        prompt = self.processor(text=[text], images=[[image]], return_tensors="pt")["input_ids"][0].tolist()
        prefix = self.answer_prefix if self.answer_prefix is not None else ("" if text[-1:].isspace() else " ")
        answer = self.processor.tokenizer(prefix + example.answer, add_special_tokens=False)["input_ids"]
        if not answer:
            raise DataError(f"The answer '{example.answer}' to '{example.question}' has no tokens in this model's vocabulary.")
        return Encoded(prompt, [*answer, self._eos])

    def image_inputs(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Image tensors of several images, padded to a common number of tiles by the processor."""
        texts = [self.prompt("") for _ in images]
        batch = self.processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
        return {
            name: value
            for name, value in batch.items()
            if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        }


def batches(
    encoder: PromptEncoder, examples: Sequence[Example], *, images_per_batch: int = 8, share_prefix: bool = True
) -> Iterator[tuple[PackedBatch, list[int]]]:
    """Packed batches over ``examples``, each with the indices of its examples.

    Args:
        encoder: Encodes prompts and images.
        examples: Consecutive examples on one image are packed together.
        images_per_batch: Rows of a batch.
        share_prefix: ``False`` puts every question on a row of its own.
    """
    if not examples:
        raise DataError("There are no examples to run.")
    numbered = enumerate(examples)
    key = (lambda pair: pair[1].image) if share_prefix else (lambda pair: pair[0])
    groups = [list(group) for _, group in itertools.groupby(numbered, key=key)]
    for start in range(0, len(groups), images_per_batch):
        chunk = groups[start : start + images_per_batch]
        yield pack(encoder, [[example for _, example in group] for group in chunk]), [index for group in chunk for index, _ in group]


def pack(encoder: PromptEncoder, groups: Sequence[Sequence[Example]]) -> PackedBatch:
    """One row per group of examples that share an image."""
    images = [group[0].load_image() for group in groups]
    encoded = [[encoder.encode(example, image) for example in group] for group, image in zip(groups, images, strict=True)]
    return pack_encoded(encoded, encoder.image_inputs(images), encoder.image_token_id, encoder.processor.tokenizer.pad_token_id or 0)


def pack_encoded(
    encoded: Sequence[Sequence[Encoded]], image_inputs: dict[str, torch.Tensor], image_token_id: int, pad_token_id: int
) -> PackedBatch:
    """Lay out encoded questions, one row per group; see the module's docstring for the layout."""
    layouts = [_layout(group) for group in encoded]
    rows, length = len(layouts), max(len(layout.ids) for layout in layouts)
    ids = torch.full((rows, length), pad_token_id)
    segments = torch.full((rows, length), -1)  # -1 padding, 0 prefix, k the k-th question
    positions = torch.zeros((rows, length), dtype=torch.long)
    for row, layout in enumerate(layouts):
        size = len(layout.ids)
        ids[row, :size] = torch.tensor(layout.ids)
        segments[row, :size] = torch.tensor(layout.segments)
        positions[row, :size] = torch.tensor(layout.positions)
    same = segments[:, :, None] == segments[:, None, :]
    seen = (same | (segments[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
    offsets = itertools.accumulate((len(group) for group in encoded), initial=0)
    targets = [
        (row, *target[:2], offset + target[2]) for (row, layout), offset in zip(enumerate(layouts), offsets) for target in layout.targets
    ]
    row_index, columns, target_ids, question = (torch.tensor(column) for column in zip(*targets, strict=True))
    valid = segments >= 0
    inputs = {"input_ids": ids, "attention_mask": seen[:, None], "position_ids": positions, **image_inputs}
    return PackedBatch(
        inputs, valid, valid & (ids == image_token_id), row_index, columns, target_ids, question, sum(len(group) for group in encoded)
    )


@dataclass(frozen=True)
class _Layout:
    ids: list[int]
    segments: list[int]
    positions: list[int]
    targets: list[tuple[int, int, int]]  # column, token id, question within the row


def _layout(group: Sequence[Encoded]) -> _Layout:
    prompts = [item.prompt for item in group]
    # At least one prompt token stays outside the prefix, so that each question predicts its first answer token itself.
    shared = min(len(prompt) for prompt in prompts) - 1 if len(group) > 1 else 0
    prefix = next((i for i in range(shared) if any(p[i] != prompts[0][i] for p in prompts)), shared)
    ids, segments, positions, targets = prompts[0][:prefix], [0] * prefix, list(range(prefix)), []
    for number, item in enumerate(group, start=1):
        tail = item.prompt[prefix:] + item.answer[:-1]  # the last answer token is predicted, never read
        first = len(ids) + len(item.prompt) - prefix - 1
        targets += [(first + i, token, number - 1) for i, token in enumerate(item.answer)]
        ids = ids + tail
        segments += [number] * len(tail)
        positions += range(prefix, prefix + len(tail))
    return _Layout(ids, segments, positions, targets)


def answer_logits(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Logits (targets, vocabulary) at the positions that predict answer tokens; the language head runs on these alone."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden[batch.rows, batch.columns])
