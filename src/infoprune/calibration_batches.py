"""The batches of a calibration sample, of which no more stays in memory than may."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import overload

from infoprune import memory
from infoprune.architecture import Architecture
from infoprune.data.example import Example
from infoprune.data.images import sizes
from infoprune.evaluation.quality import can_share_prefix
from infoprune.freeze import frozen
from infoprune.layers import kept_for_backward
from infoprune.model import VLM, dense_architecture
from infoprune.packing import PackedBatch, pack, rows_by_image

ROWS_PER_BATCH = 4  # at most; fewer where activations are large
LOOKED_AT = 4096  # rows whose images' sizes are read to know how large activations are


class CalibrationBatches(Sequence[PackedBatch]):
    """Packed batches on the model's device, of as many images as a backward pass may keep the activations of.

    The first ones stay in memory, as many as take no more than :data:`infoprune.memory.INPUTS` bytes together: images that a processor cuts
    into tiles take tens of megabytes each. The others are prepared anew each time that they are asked for.

    Args:
        vlm: The dense model, whose processor prepares them.
        examples: Those on one image share a row, where the family allows it. Rows are shuffled, always in the same way.

    Attributes:
        num_questions: In all batches together.
        recompute: Whether already one image keeps more than :data:`infoprune.memory.ACTIVATIONS` for a backward pass: then layers had
            better run again in it.
    """

    def __init__(self, vlm: VLM, examples: Sequence[Example]) -> None:
        architecture, share = dense_architecture(vlm), can_share_prefix(vlm)
        rows = [[examples[index] for index in row] for row in rows_by_image(examples)] if share else [[example] for example in examples]
        # The refit of a large model takes the first batches alone, and data often come sorted, by source or by kind of question.
        random.Random(len(rows)).shuffle(rows)
        with frozen(vlm.model):
            kept = kept_by_largest(vlm, architecture, rows)
        fitting = max(1, min(ROWS_PER_BATCH, memory.ACTIVATIONS // kept))
        self.num_questions, self.recompute = len(examples), kept > memory.ACTIVATIONS
        self._encoder, self._device, self._left = vlm.encoder, vlm.device, memory.INPUTS
        self._groups = [rows[start : start + fitting] for start in range(0, len(rows), fitting)]
        self._held: dict[int, PackedBatch] = {}

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> PackedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[PackedBatch]: ...
    def __getitem__(self, index: int | slice) -> PackedBatch | list[PackedBatch]:
        places = range(len(self))[index]
        return [self._batch(place) for place in places] if isinstance(places, range) else self._batch(places)

    def __iter__(self) -> Iterator[PackedBatch]:
        return map(self._batch, range(len(self)))

    def _batch(self, place: int) -> PackedBatch:
        if place in self._held:
            return self._held[place]
        batch = pack(self._encoder, self._groups[place]).to(self._device)
        size = sum(value.nbytes for value in batch.inputs.values())
        if size <= self._left:
            self._left -= size
            self._held[place] = batch
        return batch


def kept_by_largest(vlm: VLM, architecture: Architecture, rows: Sequence[Sequence[Example]]) -> int:
    """Bytes that ``vlm`` keeps for a backward pass of one row: of the largest image, or of most questions, whichever keeps more.

    ``architecture`` is the dense model's, where ``vlm`` was cut from one. Images are those of the first :data:`LOOKED_AT` rows.
    """
    found = sizes(row[0].image for row in rows[:LOOKED_AT])
    pixels = [math.prod(found[row[0].image]) for row in rows[:LOOKED_AT]]
    largest = max(range(len(pixels)), key=lambda index: (pixels[index], len(rows[index])))
    fullest = max(range(len(rows)), key=lambda index: len(rows[index]))
    chosen = [rows[index] for index in ((largest,) if len(rows[largest]) == len(rows[fullest]) else (largest, fullest))]
    return max(1, *(kept_for_backward(vlm.model, architecture, pack(vlm.encoder, [row]).to(vlm.device)) for row in chosen))


def rows_that_fit(vlm: VLM, architecture: Architecture, rows: Sequence[Sequence[Example]], most: int) -> int:
    """How many rows of a batch, from one to ``most``, keep no more than :data:`infoprune.memory.ACTIVATIONS` for a backward pass."""
    return max(1, min(most, memory.ACTIVATIONS // kept_by_largest(vlm, architecture, rows)))
