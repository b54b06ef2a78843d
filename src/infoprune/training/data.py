"""Training batches: images with all their questions, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from infoprune.data import Example
from infoprune.data.images import identities
from infoprune.errors import DataError
from infoprune.packing import PackedBatch, in_rows, pack
from infoprune.prompts import TOKEN_INPUTS, PromptEncoder
from infoprune.resolve import family_of

CACHE_BYTES = 2_000_000_000
# Parts of a vision tower's output that nothing behind the features reads.
OF_THE_TOWER = ("last_hidden_state", "hidden_states", "attentions", "vision_outputs", "qformer_outputs")


@dataclass(frozen=True)
class Stream:
    """Endless, reproducible passes over the rows of a training set.

    Attributes:
        rows: Questions that are packed together, each row on one image.
        rows_per_step: Rows of one update, over all processes.
        seed: Seed of the shuffles.
    """

    rows: list[list[Example]]
    rows_per_step: int
    seed: int

    def step(self, number: int) -> list[list[Example]]:
        """Rows of update ``number``, 0, 1, ...: the same whatever came before."""
        chosen = []
        for place in range(number * self.rows_per_step, (number + 1) * self.rows_per_step):
            epoch, index = divmod(place, len(self.rows))
            chosen.append(self.rows[_order(self.seed, epoch, len(self.rows))[index]])
        return chosen


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(seed: int, epoch: int, size: int) -> list[int]:
    key = (seed, epoch, size)
    if key not in _orders:
        _orders.clear()
        order = list(range(size))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        _orders[key] = order
    return _orders[key]


def rows_of(examples: Sequence[Example], questions_per_image: int, *, share_prefix: bool) -> list[list[Example]]:
    """Questions grouped by image, in chunks of at most ``questions_per_image``; one by one where a prefix can't be shared."""
    if not examples:
        raise DataError("There are no examples to train on.")
    if not share_prefix:
        return [[example] for example in examples]
    groups: dict[Path, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.image, []).append(index)
    rows = [row for group in groups.values() for row in in_rows(group, examples, questions_per_image)]
    return [[examples[index] for index in row] for row in rows]


def hold_out(examples: Sequence[Example], seed: int, share: int = 20) -> tuple[list[Example], list[Example]]:
    """Split off the questions of one image in ``share``: (train, validation). Copies under other names are one image.

    Raises:
        DataError: Fewer than two images.
    """
    of_example = identities([example.image for example in examples])
    images = list(dict.fromkeys(of_example))
    if len(images) < 2:
        raise DataError("Training needs questions on at least two images: one to train on and one to stop early on.")
    held = set(random.Random(seed).sample(images, max(1, len(images) // share)))
    apart = [(example, image in held) for example, image in zip(examples, of_example, strict=True)]
    return [e for e, out in apart if not out], [e for e, out in apart if out]


@dataclass
class VisionCache:
    """Image features of a model whose vision tower does not change, computed once per image.

    Attributes:
        model: The conditional-generation model.
        limit: Bytes to keep at most; further images are computed every time.
    """

    model: Any
    limit: int = CACHE_BYTES
    _features: dict[Path, torch.Tensor] = field(default_factory=dict)
    _bytes: int = 0
    _joined: bool = False  # the family wants one tensor, with one or more entries (tiles) per image, not one tensor per image
    _others: dict[str, Any] = field(default_factory=dict)  # what a family adds to the features, the same for every image

    @torch.no_grad()
    def replace(self, batch: PackedBatch, images: Sequence[Path]) -> PackedBatch:
        """``batch`` with image features in place of pixels.

        Unchanged where the model takes none, where they depend on the question, or where the tiles of all images are stacked.

        Args:
            batch: On the model's device.
            images: The image of each row.
        """
        base = self.model.base_model
        if family_of(self.model).question_inputs or "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
            return batch
        pixels = {name: value for name, value in batch.inputs.items() if name not in TOKEN_INPUTS}
        if any(len(value) != len(images) for value in pixels.values()):
            return batch
        fresh: dict[int, torch.Tensor] = {}
        for row, image in enumerate(images):
            if image in self._features:
                continue
            # One by one: the last bits of a batch depend on its size, and a resumed run lacks other images than one that went through.
            output = base.get_image_features(**{n: v[row : row + 1] for n, v in pixels.items()}, return_dict=True)
            self._others = {name: None if name in OF_THE_TOWER else value for name, value in output.items()}
            found = output.pooler_output
            self._joined = isinstance(found, torch.Tensor)
            fresh[row] = (found if self._joined else found[0]).detach()
            if self._bytes + fresh[row].nbytes <= self.limit:
                self._features[image] = fresh[row].clone()
                self._bytes += fresh[row].nbytes
        features = [fresh[row] if row in fresh else self._features[image] for row, image in enumerate(images)]
        held = SimpleNamespace(**self._others | {"pooler_output": torch.cat(features) if self._joined else features})
        text = {name: value for name, value in batch.inputs.items() if name in TOKEN_INPUTS}
        return replace(batch, inputs=text | {"pixel_values": None, "mm_encoder_outputs": {"image": held}})


def pack_rows(encoder: PromptEncoder, rows: Sequence[Sequence[Example]], device: torch.device) -> PackedBatch:
    """One batch of rows on ``device``."""
    return pack(encoder, rows).to(device)


def images_of_rows(batch: PackedBatch, examples: Sequence[Example]) -> list[Path]:
    """The image of each row of ``batch``, whose questions are ``examples``, in their order."""
    of_row = dict(zip(batch.rows.tolist(), batch.question.tolist(), strict=True))  # every question has an answer token in its row
    return [examples[of_row[row]].image for row in range(len(batch.segments))]
