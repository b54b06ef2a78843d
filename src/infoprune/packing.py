"""Batches of questions with reference answers; questions on one image can share that image's tokens.

A row holds the longest common prefix of its questions once (for the usual prompt: everything up to and including the image), then
each question's remainder, one after another. A remainder sees the prefix and itself, at the positions that it has in its own prompt. For
causal attention this is exact, and saves most of the work where an image has many questions. Rows of one
question each are given to the model as its own processor would: masks and positions are left to it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from infoprune.architecture import FamilyDeclaration
from infoprune.data.example import Example
from infoprune.errors import DataError

# Inputs with one entry per token. All else that a processor returns belongs to the images.
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")

QUESTIONS_PER_ROW = 32  # each adds to the row's length; an image with more passes the tower once per row
CHARACTERS_PER_ROW = 12_000  # of questions and answers, some thousands of tokens: a row's mask has the square of them
LLAVA_IMAGE = "<image>"
QUESTION = "infoprune"  # stands for a question in a rendered prompt


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    Attributes:
        prompt: Ids of the prompt with image tokens expanded.
        answer: Ids of the answer and the end-of-sequence token.
        types: (tokens, ...) the family's further input per token of prompt and answer, if it has one.
        positions: (dimensions, tokens) positions of prompt and answer, where the family does not count them one by one.
        question: What the family makes of the question alone, by the input's name: (length of its own,) each.
    """

    prompt: list[int]
    answer: list[int]
    types: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    question: dict[str, torch.Tensor] = field(default_factory=dict)


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


@dataclass
class PromptEncoder:
    """Turns examples into token ids and image tensors with a model's own processor.

    Attributes:
        processor: A Transformers processor with a tokenizer and an image processor.
        image_token_id: Id that marks image positions.
        suffix: Appended to each question, e.g. an instruction to answer in one word.
        answer_prefix: Put before the answer, as the chat template does. ``None``: a space where the rendered prompt ends in neither space
            nor newline.
        family: The model's family; ``None``: one whose questions can share a prefix and whose tokens have no types.
        rope: What makes the positions of a family that has :attr:`FamilyDeclaration.positions`: token ids, token types and the sizes of the
            images to positions (dimensions, rows, tokens) and something else.
        eos: Id of the token that ends answers; ``None``: the tokenizer's. :attr:`end` is the one in use.
        longest: Tokens that the model has places for, by the input's name, where places are learned.
    """

    processor: Any
    image_token_id: int
    suffix: str = ""
    answer_prefix: str | None = None
    family: FamilyDeclaration | None = None
    rope: Callable[..., tuple[torch.Tensor, Any]] | None = None
    eos: int | None = None
    longest: Mapping[str, int] = field(default_factory=dict)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.processor.tokenizer.eos_token_id if self.eos is None else self.eos

    def prompt(self, question: str, *, images: int = 1) -> str:
        """The prompt text of one question, with a marker for each of its images in front."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * images + [{"type": "text", "text": question + self.suffix}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        template = "{image}{question}" if self.family is None else self.family.prompt
        return template.format(image=str(self.processor.image_token) * images, question=question + self.suffix)

    def prompt_of(self, example: Example, *, images: int = 1) -> str:
        """The prompt text of an example: as its benchmark puts the question, unless the user has a suffix of their own.

        Data made for LLaVA say in the question where the image goes, whatever model they are then given to; the prompt does, so the
        question loses the token, this model's too.
        """
        asked = example.question if self.suffix or example.prompt is None else example.prompt
        for token in {LLAVA_IMAGE, str(getattr(self.processor, "image_token", None) or LLAVA_IMAGE)}:
            if token in asked:
                asked = asked.replace(token, "").strip()
        return self.prompt(asked, images=images)

    def encode(self, example: Example, image: Any) -> Encoded:
        """Ids of one example; ``image`` is its loaded image, or a list of them."""
        text = self.prompt_of(example, images=len(_listed(image)))
        inputs = self.inputs([text], [image])
        last = self.processor.tokenizer.decode(inputs["input_ids"][0, -1:])
        prefix = self.answer_prefix
        if prefix is None:
            prefix = "" if (text + last)[-1:].isspace() else " "  # some processors append a line break to the text
        answer = self._continued(last, prefix + example.answer)
        if not example.answered:
            raise DataError(f"The question '{example.question}' about {example.image} has no reference answer to score or train on.")
        if not answer:
            raise DataError(f"The answer '{example.answer}' to '{example.question}' has no tokens in this model's vocabulary.")
        return self._encoded(inputs, answer)

    def _continued(self, before: str, text: str) -> list[int]:
        """Ids of ``text`` behind a prompt that ends in ``before``.

        Tokenizers may put a space before whatever they read (Llama 2's do): text by itself would get one too many. Where the two would be
        read as one token, a line break stands for the prompt.
        """
        tokenizer = self.processor.tokenizer
        for anchor in (before, "\n"):
            first, both = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (anchor, anchor + text))
            if first and both[: len(first)] == first:
                return both[len(first) :]
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_question(self, example: Example, image: Any) -> Encoded:
        """Ids of a question that is to be answered: all that is known of the answer is that it ends."""
        return self._encoded(self.inputs([self.prompt_of(example)], [image]), [])

    def _encoded(self, inputs: dict[str, torch.Tensor], answer: list[int]) -> Encoded:
        prompt, types = inputs["input_ids"][0].tolist(), self._types(inputs, len(answer))
        self._check_length("input_ids", len(prompt) + len(answer), f"... and an answer of {len(answer)} tokens")
        question = {name: inputs[name][0] for name in self.question_inputs}
        return Encoded(prompt, [*answer, self.end], types, self._positions(inputs, [*prompt, *answer], types), question)

    def _positions(self, inputs: dict[str, torch.Tensor], ids: list[int], types: torch.Tensor | None) -> torch.Tensor | None:
        if self.rope is None or self.token_types is None or types is None:
            return None
        sizes = {name: value for name, value in inputs.items() if name.endswith("grid_thw")}
        return self.rope(torch.tensor([ids]), **{self.token_types: types[None]}, **sizes)[0][:, 0]

    def _types(self, inputs: dict[str, torch.Tensor], answer: int) -> torch.Tensor | None:
        if self.family is None or self.family.token_types is None:
            return None
        types = inputs[self.family.token_types][0]
        last = types[-1:] if self.family.answer_type is None else torch.full_like(types[-1:], self.family.answer_type)
        return torch.cat([types, last.expand(answer, *types.shape[1:])])

    def inputs(self, texts: Sequence[str], images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """What the model reads for rendered prompts with the image, or list of images, of each; lengths and numbers of tiles are padded."""
        listed = [_listed(image) for image in images]
        # A template that writes the beginning of the sequence itself leaves none to be added; apply_chat_template(tokenize=True) agrees.
        begin = self.processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
        try:
            batch = self.processor(text=list(texts), images=listed if any(listed) else None, padding=True, return_tensors="pt", **options)
        except Exception as error:  # processors raise many kinds, about images too thin for them, for example
            sizes = ", ".join(f"{image.width} x {image.height}" for several in listed for image in several)
            raise DataError(
                f"The model's processor can't take {texts[0]!r}{' and others' if texts[1:] else ''}, images of {sizes or 'none'} "
                f"pixels ({type(error).__name__}: {error}). Leave such questions out."
            ) from error
        found = {name: value for name, value in batch.items() if name != "labels"}
        if self.question_inputs:  # on the left, where processors may pad them, padding would move their absolute positions
            alone = [self.processor(text=[text], return_tensors="pt", **options) for text in texts]
            found |= {name: pad_sequence([one[name][0] for one in alone], batch_first=True) for name in self.question_inputs}
        for name in self.longest:
            self._check_length(name, found[name].shape[1] if name in found else 0, max(texts, key=len))
        return found

    def _check_length(self, name: str, tokens: int, text: str) -> None:
        if tokens > self.longest.get(name, tokens):
            raise DataError(
                f"A question takes {tokens} tokens ({name}), where the model has places for {self.longest[name]}: {text[:200]!r}. Shorten "
                "it, or leave it out."
            )

    @contextmanager
    def one_image(self) -> Iterator[None]:
        """All that is encoded inside the block is about one image: the processor prepares it once, not for every question."""
        prepares = self.processor.image_processor
        self.processor.image_processor = _Remembering(prepares)
        try:
            yield
        finally:
            self.processor.image_processor = prepares

    @property
    def shares_prefix(self) -> bool:
        """Whether questions on one image can share a row: where the family allows it, and the prompt has the image before the question."""
        if self.family is not None and not self.family.shares_prefix:
            return False
        behind = [self.prompt(QUESTION, images=number).rpartition(QUESTION)[2] for number in (0, 1)]
        return behind[0] == behind[1]

    @property
    def token_types(self) -> str | None:
        """Name of the family's input of token types."""
        return None if self.family is None else self.family.token_types

    @property
    def question_inputs(self) -> tuple[str, ...]:
        """Names of inputs made of the question alone."""
        return () if self.family is None else self.family.question_inputs

    def image_inputs(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Image tensors of several images, or lists of them, padded to a common number of tiles by the processor."""
        batch = self.inputs([self.prompt("", images=len(_listed(image))) for image in images], images)
        return {name: value for name, value in batch.items() if name not in (*TOKEN_INPUTS, *self.question_inputs)}


def _listed(image: Any) -> list[Any]:
    return image if isinstance(image, list) else [image]


class _Remembering:
    """Stands in for an image processor that is asked for the same again and again."""

    def __init__(self, prepares: Any) -> None:
        self._prepares, self._found = prepares, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prepares, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._found is None:
            self._found = self._prepares(*args, **options)
        return copy.deepcopy(self._found)  # processors take things out of it


def encode_groups(
    encoder: PromptEncoder, groups: Sequence[Sequence[Example]], images: Sequence[Any], *, answers: bool
) -> list[list[Encoded]]:
    """Questions by group, each group about one image, with or without their reference answers."""
    found = []
    for group, image in zip(groups, images, strict=True):
        with encoder.one_image():
            found.append([encoder.encode(e, image) if answers else encoder.encode_question(e, image) for e in group])
    return found


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
