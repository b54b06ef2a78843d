"""First-order sensitivity of the answers to gates on attention heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite
from infoprune.fisher import refuse_float16
from infoprune.freeze import frozen
from infoprune.layers import differentiate_from_first_layers, recompute_layers
from infoprune.moments import exact_sum
from infoprune.packing import PackedBatch, answer_logits


def head_sensitivities(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[PackedBatch],
    progress: Callable[[int], None] = lambda questions: None,
    *,
    recompute: bool = False,
) -> dict[str, torch.Tensor]:
    """Mean absolute derivative of a question's loss in a gate on unit u, I_u = E_q |sum over tokens of c_u . dL_q / dc_u|.

    L_q is the cross-entropy of question q's reference answer, summed over its tokens, c_u the unit's context at the input of the output
    projection: a gate xi_u = 1 on it has dL/dxi_u = sum c_u . dL/dc_u (Michel, Levy & Neubig 2019, arXiv 1905.10650, section 4.1).

    Every question takes a backward pass over the whole batch that it is in, so batches should hold one row. Rows do not see each other,
    so that all of a batch's contexts can be summed.

    Args:
        model: The dense model; used in eval mode and restored, nothing of the hooks stays behind.
        architecture: Its sites.
        batches: The calibration batches.
        progress: Called with the number of questions after each batch.
        recompute: Run each layer again in every backward pass instead of keeping its activations.

    Raises:
        CalibrationError: The model computes in float16.

    Returns:
        (units,) float64 by attention path; zero where no answer depends on the block.
    """
    refuse_float16(model)
    sites, contexts, again = architecture.attention, {}, _Again()
    sums = {site.path: torch.zeros(site.num_units, dtype=torch.float64) for site in sites}
    training, questions = model.training, 0
    model.eval()
    try:
        with ExitStack() as stack, frozen(model), torch.enable_grad():
            differentiate_from_first_layers(model, architecture, stack)
            for site in sites:

                def hold(module: nn.Module, args: Any, path: str = site.path) -> None:
                    if not again.inside:
                        contexts[path] = args[0]

                out = model.get_submodule(f"{site.path}.{site.names.out}")
                stack.callback(out.register_forward_pre_hook(hold).remove)
            if recompute:
                recompute_layers(model, architecture, stack, lambda: again)
            for batch in batches:
                _add_batch_(sums, model, sites, batch, contexts)
                contexts.clear()
                questions += batch.num_questions
                progress(batch.num_questions)
    finally:
        model.train(training)
    return {path: total / max(questions, 1) for path, total in sums.items()}


class _Again:
    """Surrounds what runs a second time; may be entered any number of times, as every question's backward pass does."""

    inside = False

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: Any) -> None:
        self.inside = False


def _add_batch_(
    sums: dict[str, torch.Tensor], model: Any, sites: Sequence[AttentionSite], batch: PackedBatch, contexts: dict[str, torch.Tensor]
) -> None:
    """Add what the batch's questions say; its graph is gone at the end, before another one is made."""
    losses = nn.functional.cross_entropy(answer_logits(model, batch).float(), batch.targets, reduction="none")
    for question in range(batch.num_questions):
        more = question + 1 < batch.num_questions
        loss = losses[batch.question == question].sum()
        found = torch.autograd.grad(loss, [contexts[s.path] for s in sites], retain_graph=more, allow_unused=True)
        for site, gradient in zip(sites, found, strict=True):
            if gradient is not None:
                sums[site.path] += _of_gates(site, contexts[site.path].detach(), gradient).abs()


def _of_gates(site: AttentionSite, contexts: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """(units,) derivatives in the gates, from contexts and their gradients (..., units x width)."""
    products = (contexts.float() * gradients.float()).reshape(-1, site.num_units, site.unit_width)
    return exact_sum(products, (0, 2))
