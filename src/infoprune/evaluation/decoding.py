"""Greedy answers to a batch of questions, as ``generate(do_sample=False)`` gives them one by one.

Questions that can share an image's tokens are laid out in packed rows (:mod:`infoprune.packing`): the image and what else the prompts have
in common is computed once, with its keys and values cached, and each decoding step appends one token per unfinished question to its row.
Nothing is repeated per question, neither work nor memory; a finished question takes no further part, and neither does the row of a
finished image. ``generate`` itself prepares and applies what a checkpoint's generation configuration asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache

from infoprune.data import Example
from infoprune.evaluation.quality import can_share_prefix
from infoprune.model import VLM
from infoprune.packing import PackedBatch, logits_at, pack_encoded, visible
from infoprune.prompts import TOKEN_INPUTS, encode_groups
from infoprune.resolve import family_of

GREEDY = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False}


def can_pack(vlm: VLM) -> bool:
    """Whether questions on one image can be answered in one row: not where ``generate`` hands over to a language model inside."""
    return can_share_prefix(vlm) and not family_of(vlm.model).decoder


@torch.no_grad()
def packed_answers(vlm: VLM, groups: Sequence[Sequence[Example]], max_new_tokens: int) -> list[str]:
    """Answers to the questions of several images in order, for a model that :func:`can_pack`.

    Args:
        vlm: The model.
        groups: Questions on one image each.
        max_new_tokens: Longest answer.
    """
    images = [group[0].load_image() for group in groups]
    encoded = encode_groups(vlm.encoder, groups, images, answers=False)
    batch = pack_encoded(vlm.encoder, encoded, vlm.encoder.image_inputs(images), always=True)
    batch = replace(batch, inputs=_on(vlm, batch.inputs)).to(vlm.device)
    prompts = [item.prompt for group in encoded for item in group]
    length = max(map(len, prompts))
    # Padding is masked, but a repetition penalty counts what it sees: fill up with a token that the prompt has anyway.
    ids = torch.tensor([prompt[-1:] * (length - len(prompt)) + prompt for prompt in prompts], device=vlm.device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=vlm.device)
    decoder = PackedDecoder(batch, DynamicCache(config=vlm.model.config.get_text_config()))
    places = mask.cumsum(-1)  # for generate's own bookkeeping; the forward passes take those of the packed rows
    vlm.model.generate(
        input_ids=ids, attention_mask=mask, position_ids=places, max_new_tokens=max_new_tokens, custom_generate=decoder, **GREEDY
    )
    return _texts(vlm, decoder.answers)


class PackedDecoder:
    """The decoding loop that ``generate`` is given.

    Attributes:
        answers: Token ids of the answer to each question, up to and including what ended it.
    """

    def __init__(self, batch: PackedBatch, cache: DynamicCache) -> None:
        self.answers: list[list[int]] = [[] for _ in range(batch.num_questions)]
        self._batch, self._cache = batch, cache
        self._segments, self._row = batch.segments, batch.rows  # of the cached tokens (rows, cached), and of each question
        self._segment = batch.segments[batch.rows, batch.columns]
        positions = batch.inputs["position_ids"]
        self._flat = positions.ndim == 2
        self._position = (positions[None] if self._flat else positions)[:, batch.rows, batch.columns] + 1  # of each question's next token

    def __call__(self, model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any) -> torch.Tensor:
        """Answer every question; the rows of ``input_ids`` are their prompts, each alone."""
        options = {"past_key_values": self._cache, "use_cache": True}
        logits = logits_at(model, self._batch.inputs, self._batch.rows, self._batch.columns, **options).float()
        alive = torch.arange(len(input_ids), device=input_ids.device)
        while True:
            tokens = logits_processor(input_ids, logits).argmax(-1)
            input_ids = torch.cat([input_ids, tokens[:, None]], -1)
            for question, token in zip(alive.tolist(), tokens[alive].tolist(), strict=True):
                self.answers[question].append(token)
            alive = alive[~stopping_criteria(input_ids, None)[alive]]
            if not len(alive):
                return input_ids
            self._drop_rows(alive)
            logits[alive] = logits_at(model, *self._appended(alive, tokens[alive]), **options).float()

    def _drop_rows(self, alive: torch.Tensor) -> None:
        kept = self._row[alive].unique()
        if len(kept) < len(self._segments):
            self._cache.batch_select_indices(kept)
            self._segments = self._segments[kept]
            self._row = torch.searchsorted(kept, self._row)  # those of finished questions are not used again

    def _appended(self, alive: torch.Tensor, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Inputs of a forward pass over one more token of each question ``alive``, and the rows and columns where these are."""
        rows = self._row[alive]
        columns = (rows[:, None] == rows[None, :]).tril(-1).sum(-1)  # earlier questions in the same row
        shape = (len(self._segments), int(columns.max()) + 1)
        ids, segments = tokens.new_zeros(shape), self._segments.new_full(shape, -1)
        positions = self._position.new_zeros(len(self._position), *shape)
        ids[rows, columns] = tokens
        segments[rows, columns] = self._segment[alive]
        positions[:, rows, columns] = self._position[:, alive]
        self._segments = torch.cat([self._segments, segments], -1)
        self._position[:, alive] += 1
        inputs = {
            "input_ids": ids,
            "attention_mask": visible(segments, self._segments)[:, None],
            "position_ids": positions[0] if self._flat else positions,
        }
        return inputs, rows, columns


@torch.no_grad()
def batched_answers(vlm: VLM, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
    """Answers by the family's own batched ``generate``, one question a row, and one pass of an image through the tower if possible."""
    images = {example.image: example.load_image() for example in examples}
    texts = [vlm.encoder.prompt_of(example) for example in examples]
    tokenizer = vlm.processor.tokenizer
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = vlm.encoder.inputs(texts, [images[example.image] for example in examples])
    finally:
        tokenizer.padding_side = side
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    inputs["input_ids"] = torch.where(mask.bool(), ids, ids[:, -1:])  # as above: a token that the prompt has anyway
    inputs = _on(vlm, inputs) | _features(vlm, [example.image for example in examples], images)
    if "mm_encoder_outputs" in inputs:
        inputs = {name: value for name, value in inputs.items() if name in TOKEN_INPUTS or name == "mm_encoder_outputs"}
    sequences = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)
    return _texts(vlm, sequences[:, ids.shape[1] :])


def _features(vlm: VLM, rows: Sequence[Path], images: dict[Path, Any]) -> dict[str, Any]:
    """Features of the image of each row; nothing where no two rows share one, the model takes none, or tiles are not apart by image."""
    takes = not family_of(vlm.model).decoder and "mm_encoder_outputs" in inspect.signature(vlm.model.forward).parameters
    if len(images) == len(rows) or not takes:
        return {}
    pixels = _on(vlm, vlm.encoder.image_inputs(list(images.values())))
    if any(len(value) != len(images) for value in pixels.values()):
        return {}
    found = vlm.model.model.get_image_features(**pixels, return_dict=True)
    features = found.pooler_output
    if len(features) != len(images):
        return {}
    place = {image: number for number, image in enumerate(images)}
    chosen = [features[place[image]] for image in rows]
    chosen = torch.stack(chosen) if isinstance(features, torch.Tensor) else chosen
    return {"mm_encoder_outputs": {"image": SimpleNamespace(**{**found, "pooler_output": chosen})}}


def _on(vlm: VLM, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``inputs`` on the model's device, images in its precision."""
    return {name: value.to(vlm.device, vlm.model.dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def _texts(vlm: VLM, tokens: Any) -> list[str]:
    return [text.strip() for text in vlm.processor.batch_decode(tokens, skip_special_tokens=True)]
