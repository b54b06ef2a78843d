"""How much memory a backward pass needs, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from infoprune.errors import InfoPruneError

ACTIVATIONS = 4 * 2**30  # bytes that a forward pass may keep for its backward pass, where there is a choice
NO_MEMORY = "can't allocate memory"  # what PyTorch's allocator on the CPU says, in a RuntimeError
INPUTS = 2**30  # bytes of prepared images and masks that wait in memory for the next pass over them


def saved_bytes(model: nn.Module, parts: Iterable[nn.Module], run: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights apart; nothing of them is kept here.

    Args:
        model: What runs.
        parts: Its layers. What one of them keeps is held until the next one starts, so that what is kept twice counts once.
        run: The forward pass, with gradients.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}
    total = 0

    def count(*_: Any) -> None:
        nonlocal total
        total += sum(tensor.untyped_storage().nbytes() for tensor in held.values())
        held.clear()

    nothing = torch.empty(0)

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            held.setdefault(place, tensor)
        return nothing

    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.register_forward_pre_hook(count).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(hold, lambda kept: kept))
        run()
    count()
    return total


def available_bytes(device: torch.device) -> float:
    """What may still be allocated on a CUDA device; elsewhere no limit is known, and memory pages."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def out_of_memory(what: str, images_per_batch: int) -> Iterator[None]:
    """Says what to do where the device's memory does not suffice to ``what`` (score, answer) questions on so many images at once."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error)):
            raise
        raise InfoPruneError(
            f"The device has not enough memory to {what} questions on {images_per_batch} images at once. Lower images_per_batch "
            "(infoprune evaluate --images-per-batch), or load the model in half precision; what is recorded is kept."
        ) from error


def release_memory() -> None:
    """Collect garbage and return what is free to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # blocks of many sizes, which other sizes don't fit into
    trim_heap()


def trim_heap() -> None:
    """Make the C library return what is free; glibc otherwise keeps it, in pieces that later steps can't use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
