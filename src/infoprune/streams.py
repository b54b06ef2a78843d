"""Residual streams before a stack of layers, and what a linear reads, of a model that runs one layer at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infoprune.architecture import AttentionSite, FFNSite
from infoprune.layers import restore_forward, stream_name
from infoprune.memory import available_bytes
from infoprune.packing import PackedBatch, answer_logits

# Of the residual stream before a stack of layers, over all batches; up to fourteen lists of tensors as large are kept at a time (streams,
# what blocks read and write, drift), and one of what the down projection reads. On CUDA all of them get half of what is free.
STREAM_BYTES = 2**30
ELSE_BYTES = 2**33  # in the host's memory: image features that cross-attention reads, masks of towers that need one
LISTS = 32
LARGE = 2**20  # bytes of what waits in the host's memory between two layers


class Stop(Exception):
    """Ends a forward pass where nothing behind it is needed."""


@dataclass
class Stream:
    """Residual stream of one batch before the first layer of a stack, and what the model does around the layers.

    Attributes:
        hidden: What the first layer reads.
        kwargs: What else each layer is called with.
        added: What the model adds to the stream before each layer, where it adds anything (image features of a lower level, for example).
        tokens: The batch, without what the model was given.
    """

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]
    added: list[torch.Tensor | None]
    tokens: PackedBatch

    @property
    def beside(self) -> int:
        """Bytes of all but the stream; what several layers are called with counts once."""
        values = [value for given in self.kwargs for value in given.values()] + list(self.added)
        tensors = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}.values())

    def before(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer reads, given what the layer before it left."""
        added = self.added[layer]
        return hidden if added is None else hidden + added.to(hidden.device)


def captured(
    model: nn.Module, layers: Sequence[tuple[AttentionSite, FFNSite]], batches: Sequence[PackedBatch], notify: Callable[[str], None]
) -> list[Stream]:
    """The streams of the first batches, of as many as may be kept: a least squares needs many more tokens than dimensions, not all."""
    found, kept, beside = [], 0, 0
    most = min(STREAM_BYTES, available_bytes(next(model.parameters()).device) / LISTS)
    for batch in batches:
        found.append(capture(model, layers, batch))
        kept += found[-1].hidden.nbytes
        beside += found[-1].beside
        if (kept >= most or beside >= ELSE_BYTES) and len(found) < len(batches):
            where = layers[0][0].path.partition(f".{layers[0][0].names.layers}")[0]
            notify(
                f"'{where}' is repaired on {len(found)} of {len(batches)} calibration batches, whose activations are all that may be kept"
            )
            break
    return found


def capture(model: nn.Module, sites: Sequence[tuple[AttentionSite, FFNSite]], batch: PackedBatch) -> Stream:
    """What a stack's layers are called with. They pass on what they get, but for the last, behind which nothing is needed."""
    layers = [layer_of(model, attention) for attention, _ in sites]
    read: list[torch.Tensor] = []
    kwargs: list[dict[str, Any]] = []
    # By where they are: layers are called with the same tensors. These are held, or others would come to be there.
    aside: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def waiting(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(waiting, value))
        if not isinstance(value, torch.Tensor) or value.nbytes < LARGE:
            return value
        place = value.data_ptr(), value.dtype, value.shape, value.stride()
        if place not in aside:
            aside[place] = value, value.cpu()
        return aside[place][1]

    def forward(*args: Any, **given: Any) -> torch.Tensor:
        hidden = args[0] if args else given.pop(stream_name(given))
        if len(args) > 1:  # positional after the hidden states: the attention mask, in every declared tower
            given["attention_mask"] = args[1]
        read.append(hidden)
        kwargs.append({name: waiting(value) for name, value in given.items()})
        if len(read) == len(layers):
            raise Stop
        return hidden

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(restore_forward, layer, layer.__dict__.get("forward"))
            layer.forward = forward
        with suppress(Stop):
            answer_logits(model, batch)
    added = [None] + [None if now is before else (now - before).cpu() for before, now in itertools.pairwise(read)]
    return Stream(read[0], kwargs, added, batch.without_inputs())


def placed(value: Any, device: torch.device) -> Any:
    """Back where layers compute, what waited elsewhere."""
    if isinstance(value, tuple):
        return tuple(placed(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def layer_of(model: nn.Module, site: AttentionSite) -> nn.Module:
    """The layer that an attention block is in."""
    return model.get_submodule(site.path.rpartition(".")[0])


@contextmanager
def reading(linear: nn.Module, *, stop: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collects what a linear reads; ``stop`` ends each forward pass there."""
    held: list[torch.Tensor] = []

    def hold(module: nn.Module, args: Any) -> None:
        held.append(args[0])
        if stop:
            raise Stop

    handle = linear.register_forward_pre_hook(hold)
    try:
        yield held
    finally:
        handle.remove()
