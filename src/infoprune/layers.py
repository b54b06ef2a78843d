"""A model's layers as a whole: where gradients start, what a backward pass keeps of them, and running them again instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from infoprune.architecture import Architecture
from infoprune.memory import saved_bytes
from infoprune.packing import PackedBatch, answer_logits


def stream_name(kwargs: dict[str, Any]) -> str:
    """What a layer that is called by keywords calls the residual stream."""
    return "hidden_states" if "hidden_states" in kwargs else "hidden_state"


def restore_forward(module: nn.Module, forward: Any) -> None:
    """Undo ``module.forward = ...``; ``forward``: what the module itself held before, ``None`` for nothing."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def differentiate_from_first_layers(model: nn.Module, architecture: Architecture, stack: ExitStack) -> None:
    """Start the graph at the inputs of each tower's first layer while ``stack`` is open: parameters are frozen."""

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def leaf(x: torch.Tensor) -> torch.Tensor:
            return x if x.requires_grad else x.detach().requires_grad_(True)

        if args:
            return (leaf(args[0]), *args[1:]), kwargs
        name = stream_name(kwargs)
        return args, kwargs | {name: leaf(kwargs[name])}

    first = {site.stack: site.path.rpartition(".")[0] for site in reversed(architecture.attention)}
    for path in first.values():
        stack.callback(model.get_submodule(path).register_forward_pre_hook(start, with_kwargs=True).remove)


def recompute_layers(
    model: nn.Module, architecture: Architecture, stack: ExitStack, second_time: Callable[[], AbstractContextManager[None]]
) -> None:
    """While ``stack`` is open, keep of every layer what it reads, and run it again in the backward pass (Chen et al., arXiv 1604.06174).

    ``second_time``: makes what surrounds the second run, in which hooks inside the layer run again, too.
    """
    for path in architecture.layers:
        layer: Any = model.get_submodule(path)
        stack.callback(restore_forward, layer, layer.__dict__.get("forward"))
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), second_time()), preserve_rng_state=False
        )


@torch.enable_grad()
def kept_for_backward(model: nn.Module, architecture: Architecture, batch: PackedBatch) -> int:
    """Bytes that a forward pass over ``batch`` keeps of its activations for a backward pass to the first layers and to what trains.

    ``model`` may be a compressed one; ``architecture`` is the dense one's.
    """
    with ExitStack() as stack:
        differentiate_from_first_layers(model, architecture, stack)
        return saved_bytes(model, map(model.get_submodule, architecture.layers), lambda: answer_logits(model, batch))
