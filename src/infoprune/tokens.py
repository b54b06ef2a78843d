"""Tokens of a batch: which are real, whose they are, and what they count."""

from __future__ import annotations

import torch

from infoprune.architecture import AttentionSite, FFNSite
from infoprune.packing import PackedBatch


def unpadded(site: AttentionSite | FFNSite, values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(n, dimension) from (rows, length, dimension) or (rows length, dimension), without padding; vision towers see whole images."""
    flat = values.reshape(-1, values.shape[-1])
    padded = site.tower == "text" and len(flat) == valid.numel() and not bool(valid.all())
    return flat[valid.flatten()] if padded else flat


def rows_of_tokens(site: AttentionSite | FFNSite, count: int, batch: PackedBatch) -> torch.Tensor | None:
    """(tokens,) the row, and with it the image, of each of the ``count`` tokens of :func:`unpadded`, in its order.

    ``None`` where that is not known: vision towers to which all tiles of a batch come in one list.
    """
    rows = batch.valid.shape[0]
    if site.tower == "text":
        found = batch.valid.nonzero()[:, 0]
        return found if len(found) == count else None
    shares = _shares_of_vision(batch)
    if shares is None or len(shares) != rows or not int(shares.sum()) or (count * shares % shares.sum()).any():
        return None
    return torch.arange(rows, device=shares.device).repeat_interleave(count * shares // shares.sum())


def _shares_of_vision(batch: PackedBatch) -> torch.Tensor | None:
    """(rows,) what the vision tower's tokens of each row are in proportion to."""
    grid, sizes, pixels = (batch.inputs.get(name) for name in ("image_grid_thw", "image_sizes", "pixel_values"))
    if grid is not None:  # patches of images of any size, one after the other
        return grid.prod(-1)
    if pixels is None or len(pixels) != batch.valid.shape[0]:
        return None
    if pixels.ndim == 5:  # tiles, with empty ones behind them that the model leaves out
        return (pixels.flatten(2) != 0).any(2).sum(1)
    if pixels.ndim == 4 and sizes is not None:
        return sizes.prod(-1)
    return torch.ones(len(pixels), dtype=torch.long, device=pixels.device)


def by_image(weights: torch.Tensor, rows: torch.Tensor | None, floor: float = 0.0) -> torch.Tensor:
    """Weights (tokens,) over their mean in their row, which no other row has a part in; ones in a row that has none.

    ``floor``: share of that mean that every token gets beside its own; the mean stays one. Where ``rows`` are not known all are one row.
    """
    least = torch.finfo(weights.dtype).tiny
    if rows is None:
        mean = weights.mean()
    else:
        count = int(rows.max()) + 1 if len(rows) else 0
        mean = (weights.new_zeros(count).index_add(0, rows, weights) / rows.bincount(minlength=count))[rows]
    relative = torch.where(mean > 0, weights / mean.clamp_min(least), 1.0)
    return (relative + floor) / (1 + floor)


def all_finite(values: torch.Tensor) -> bool:
    """No NaN and no infinity in ``values``; reads them once and writes nothing as large."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())
