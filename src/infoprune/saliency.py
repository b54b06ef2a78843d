"""What the calibration answers' loss owes to the weights of every unit and every neuron, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.errors import CalibrationError
from infoprune.fisher import refuse_float16
from infoprune.freeze import frozen
from infoprune.layers import recompute_layers
from infoprune.moments import exact_sum
from infoprune.packing import PackedBatch, answer_logits
from infoprune.surgery import kept_places


def weight_saliencies(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[PackedBatch],
    *,
    recompute: bool = False,
    progress: Callable[[int], None] = lambda questions: None,
) -> dict[str, torch.Tensor]:
    """Grouped first-order Taylor of every site (LLM-Pruner: Ma, Fang & Wang, arXiv 2305.11627; element-wise, first order).

    The change of the loss when a weight is set to zero is about -w dL/dw. A group is all weights that go with a unit (its rows of the
    query, key and value projections, its columns of the output projection) or a neuron (its rows of gate and up, its column of down), and
    its score is the sum of |w dL/dw| over them. As there, the loss is the mean cross-entropy of all calibration answers, so gradients
    add up over batches before the modulus is taken: one further copy of the sites' weights for the time of the pass. Biases do not count.

    Args:
        model: The dense model; used in eval mode and restored, without gradients.
        architecture: Its sites.
        batches: Calibration batches with reference answers.
        recompute: Run each layer again in the backward pass instead of keeping its activations.
        progress: Called with the number of questions after each batch.

    Returns:
        By site path, (units,) or (neurons,) float64, in nats per answer token.

    Raises:
        CalibrationError: The model computes in float16, no data, or a gradient that is not finite; names the site.
    """
    refuse_float16(model)
    sites = (*architecture.attention, *architecture.ffn)
    weights = {site.path: _weights(model, site) for site in sites}
    training, targets = model.training, 0
    model.eval()
    try:
        with ExitStack() as stack, frozen(model), torch.enable_grad():
            if recompute:
                recompute_layers(model, architecture, stack, nullcontext)
            for weight in (weight for named in weights.values() for weight in named.values()):
                weight.requires_grad_(True)
                weight.grad = None
            for batch in batches:
                logits = answer_logits(model, batch)
                nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum").backward()
                targets += len(batch.targets)
                progress(batch.num_questions)
        if not targets:
            raise CalibrationError("Calibration saw no questions; give it data.")
        found = {site.path: _reduced(site, weights[site.path]) / targets for site in sites}
    finally:
        for weight in (weight for named in weights.values() for weight in named.values()):
            weight.grad = None
        model.train(training)
    for path, saliency in found.items():
        if not torch.isfinite(saliency).all():
            raise CalibrationError(f"Calibration met gradients that are NaN or infinite at '{path}'. Compute in float32.")
    return found


def _weights(model: nn.Module, site: AttentionSite | FFNSite) -> dict[str, Any]:
    """Weights of a site's linears by the linears' names; the one that writes to the residual stream comes last."""
    names = site.names
    linears = (*names.projections, names.out) if isinstance(site, AttentionSite) else (names.gate, names.up, names.down)
    return {name: model.get_submodule(f"{site.path}.{name}").weight for name in linears if name}


@torch.no_grad()
def _reduced(site: AttentionSite | FFNSite, weights: dict[str, Any]) -> torch.Tensor:
    """One number per unit or neuron from the weights and their gradients; zero where no gradient arrived."""
    *inputs, writer = weights
    products = {name: torch.zeros_like(w) if w.grad is None else (w.float() * w.grad.float()).abs() for name, w in weights.items()}
    rows = {name: exact_sum(products[name], 1) for name in inputs}
    columns = exact_sum(products[writer], 0)
    if isinstance(site, FFNSite):
        return columns + sum(rows.values())
    saliency = torch.zeros(site.num_units, dtype=torch.float64)
    for unit in range(site.num_units):
        own_columns, own_rows = kept_places(site, [unit])
        saliency[unit] = columns[own_columns].sum() + sum(rows[name][places].sum() for name, places in own_rows.items())
    return saliency
