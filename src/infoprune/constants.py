"""What a block that is dropped whole leaves where a norm stands behind it, as in Gemma 2 and 3.

There the mean of the block's output will not do: the norm makes any vector as large as an output, however small the mean is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

AGREES = 1e-2  # of the largest entry


@contextmanager
def behind(layer: nn.Module, written: dict[str, list[torch.Tensor]]) -> Iterator[dict[str, nn.Module]]:
    """Which of the layer's modules read what its blocks write, found while the layer runs inside the block.

    Args:
        layer: The layer.
        written: What each block has written so far, by its path; the last one counts.
    """
    found: dict[str, nn.Module] = {}

    def look(module: nn.Module, args: Any) -> None:
        found.update({path: module for path, outputs in written.items() if outputs and args and args[0] is outputs[-1]})

    with ExitStack() as stack:
        for module in layer.children():
            stack.callback(module.register_forward_pre_hook(look).remove)
        yield found


@torch.no_grad()
def constant_before(norm: nn.Module, outputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The vector that an RMS norm makes the mean of what it makes of ``outputs``: the best constant behind it, in the mean square.

    With y = g x / sqrt(mean(x^2) + eps) (Zhang & Sennrich, "Root mean square layer normalization", 2019), m the mean of y and u = m / g,
    whose mean square r^2 is below 1, it is c = u sqrt(eps / (1 - r^2)).

    Args:
        norm: The norm; it has its eps as an attribute.
        outputs: (tokens, hidden) what the block writes, by batch.
        weights: (tokens,) what each token counts.

    Returns:
        (hidden,), or ``None`` where ``norm`` is no such norm.
    """
    eps: Any = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(eps, float):
        return None
    total = sum(float(w.sum()) for w in weights)
    mean = sum(
        (w.to(x.device, torch.float32)[:, None] * norm(x).float()).sum(0).cpu().double() for x, w in zip(outputs, weights, strict=True)
    ) / max(total, 1e-30)
    assert isinstance(mean, torch.Tensor)
    gain = norm(torch.full_like(outputs[0][0], 1e3)).cpu().double()
    u = torch.where(gain.abs() > 1e-12, mean / gain, 0.0)
    square = min(float(u.square().mean()), 1 - 1e-6)
    constant = (u * (eps / (1 - square)) ** 0.5).to(outputs[0])
    difference = norm(constant).cpu().double() - mean
    return constant if float(difference.abs().max()) <= AGREES * float(mean.abs().max()) else None
