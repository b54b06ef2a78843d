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
from infoprune.data.images import identities, loaded
from infoprune.errors import DataError, out_of_memory
from infoprune.model import VLM
from infoprune.packing import PackedBatch, in_rows
from infoprune.resolve import family_of

CACHE_BYTES = 2_000_000_000
# Parts of a vision tower's output that nothing behind the features reads.
OF_THE_TOWER = ("last_hidden_state", "hidden_states", "attentions", "vision_outputs", "qformer_outputs")
POOLED, BY_LAYER = "pooler_output", "deepstack_features"


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
        vlm: The model.
        limit: Bytes to keep at most, in the host's memory; further images are computed every time.
    """

    vlm: VLM
    limit: int = CACHE_BYTES
    _kept: dict[Path, dict[str, Any]] = field(default_factory=dict)
    _bytes: int = 0

    @torch.no_grad()
    def replace(self, batch: PackedBatch, images: Sequence[Path]) -> PackedBatch:
        """``batch`` with image features in place of pixels; unchanged where the model takes none, or they depend on the question.

        Args:
            batch: On the model's device.
            images: The image of each row.
        """
        model = self.vlm.model
        if family_of(model).question_inputs or "mm_encoder_outputs" not in inspect.signature(model.base_model.forward).parameters:
            return batch
        # Sizes of images stay: some families count positions by them.
        others = {name: None if name == "pixel_values" else value for name, value in batch.inputs.items()}
        features = SimpleNamespace(**joined([self._features(image) for image in images]))
        return replace(batch, inputs=others | {"mm_encoder_outputs": {"image": features}})

    def _features(self, image: Path) -> dict[str, Any]:
        """What the model makes of one image.

        By itself, whatever the images beside: the last bits depend on the size of a batch and on how far its images are padded, and a
        resumed run lacks other images than one that went through.
        """
        if image in self._kept:
            return {name: _moved(value, self.vlm.device) for name, value in self._kept[image].items()}
        picture = loaded(image)
        try:
            found = self._computed([picture])
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            found = self._computed([picture, picture])  # Mistral 3's code fails on an image of a single token that has none beside it
            found[POOLED] = found[POOLED][: len(found[POOLED]) // 2]  # the twin's are as many
        size = sum(tensor.nbytes for tensor in _tensors(list(found.values())))
        if self._bytes + size <= self.limit:
            self._kept[image] = {name: _moved(value, torch.device("cpu")) for name, value in found.items()}
            self._bytes += size
        return found

    def _computed(self, pictures: list[Any]) -> dict[str, Any]:
        inputs = self.vlm.encoder.image_inputs(pictures)
        output = self.vlm.model.base_model.get_image_features(**{n: v.to(self.vlm.device) for n, v in inputs.items()}, return_dict=True)
        return {name: None if name in OF_THE_TOWER else value for name, value in output.items()}


def joined(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Features of several images as a model has them of a batch.

    Those behind the tower, and by layer those that go to deeper layers, are a list with a tensor per image, or one tensor of all tiles or
    tokens. Further parts, such as embeddings of marks around images, are the same for all images.
    """
    found = features[0] | {POOLED: _together([one[POOLED] for one in features])}
    if found.get(BY_LAYER) is not None:
        found[BY_LAYER] = [_together(layer) for layer in zip(*(one[BY_LAYER] for one in features), strict=True)]
    return found


def _together(values: Sequence[Any]) -> Any:
    """One tensor of one from each image, or one list of their lists."""
    return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else [tensor for several in values for tensor in several]


def _tensors(value: Any) -> list[torch.Tensor]:
    """All that are in nested lists."""
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def _moved(value: Any, device: torch.device) -> Any:
    """Copies on ``device`` of all tensors in nested lists, which may be views of more than is kept."""
    if isinstance(value, list | tuple):
        return [_moved(one, device) for one in value]
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value


def images_of_rows(batch: PackedBatch, examples: Sequence[Example]) -> list[Path]:
    """The image of each row of ``batch``, whose questions are ``examples``, in their order."""
    of_row = dict(zip(batch.rows.tolist(), batch.question.tolist(), strict=True))  # every question has an answer token in its row
    return [examples[of_row[row]].image for row in range(len(batch.segments))]
