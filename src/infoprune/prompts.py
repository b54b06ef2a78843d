"""Prompts and answers to token ids, with a model's own processor and chat template."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from infoprune.architecture import FamilyDeclaration
from infoprune.data.example import Example
from infoprune.errors import DataError

# Inputs with one entry per token. All else that a processor returns belongs to the images.
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")

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
