"""The linears of a block that read the residual stream and write to it, as they are after a cut, and changes to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from infoprune.architecture import AttentionSite, FFNSite
from infoprune.modeling_infoprune import ConstantAttention, LowRankGatedFFN, LowRankLinear


def writer_of(model: nn.Module, site: AttentionSite | FFNSite) -> nn.Module:
    """The linear (dense or low-rank), or the constant, that writes to the residual stream."""
    block = model.get_submodule(site.path)
    if isinstance(block, ConstantAttention):
        return block
    return block.get_submodule(site.names.out if isinstance(site, AttentionSite) else site.names.down)


def last_linear(module: nn.Module) -> Any:
    """The linear itself, or the second factor of a low-rank one."""
    return module if isinstance(module, nn.Linear) else module.get_submodule("up")


def readers_of(model: nn.Module, site: AttentionSite | FFNSite) -> dict[str, Any]:
    """The linears of a block that read its input: of what was factorised the first factor, nothing of what was dropped whole."""
    block: Any = model.get_submodule(site.path)
    if isinstance(block, ConstantAttention):
        return {}
    if isinstance(site, FFNSite) and isinstance(block, LowRankGatedFFN):
        return {"shared_proj": block.shared_proj}
    names = site.names.projections if isinstance(site, AttentionSite) else (site.names.up, site.names.gate)
    found = {name: block.get_submodule(name) for name in names if name}
    return {name: module.down if isinstance(module, LowRankLinear) else module for name, module in found.items()}


def add_(linear: Any, change: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Add (out, in) to a linear's weight, or (out, in + 1) to weight and bias; gives the change as a linear map."""
    change = change.to(linear.weight.device, torch.float32)
    weight, bias = change[:, : linear.in_features], None if change.shape[1] == linear.in_features else change[:, -1]
    # What was added is not what was to be where weights are coarse (bfloat16): the stream must not have what the model has not.
    return partial(nn.functional.linear, weight=_added(linear.weight, weight), bias=None if bias is None else _added(linear.bias, bias))


def _added(parameter: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Add ``change`` to a parameter; gives by how much that moved it."""
    before = parameter.clone()
    parameter.copy_(parameter.float() + change)
    return parameter - before
