"""The Fisher information of the answers in the logits, as random vectors to differentiate."""

from __future__ import annotations

import torch
from torch import nn

from infoprune.errors import CalibrationError

TARGETS_AT_ONCE = 256  # half a dozen tensors of so many rows of the vocabulary are needed on the way


def refuse_float16(model: nn.Module) -> None:
    """Check that gradients can be taken.

    Raises:
        CalibrationError: The model computes in float16, in which they vanish without an error.
    """
    if next(model.parameters()).dtype == torch.float16:
        raise CalibrationError("Gradients of calibration vanish in float16. Load the model in float32, or with dtype=torch.bfloat16.")


def fisher_sample(logits: torch.Tensor, temperature: float, generator: torch.Generator, *, top_k: int | None = None) -> torch.Tensor:
    """Random vector v with E[v v^T] = diag(p) - p p^T, the Fisher information of a categorical in its logits.

    v = sqrt(p) * n - p (sqrt(p) . n), n standard normal: unbiased like the gradient of a label drawn from the model, but without the
    draw's variance when the model is nearly certain. Gradients of sum(v * logits) then have the Fisher information as their
    covariance (cf. Martens, "New insights and perspectives on the natural gradient method", 2020).

    Args:
        logits: (targets, vocabulary).
        temperature: p = softmax(logits / temperature). Above 1, answers the model is sure of still count: their margin can be lost to
            a large change though their curvature is nearly zero.
        generator: Source of randomness.
        top_k: p of the k most probable tokens alone, summing to 1 again (as in IO-SVD, arXiv 2605.15626, whose abstract takes the KL
            divergence over them); ``None``: of the whole vocabulary.

    Returns:
        (targets, vocabulary), zero on tokens that do not count.
    """
    return torch.cat([_sample(part, temperature, generator, top_k) for part in logits.split(TARGETS_AT_ONCE)])


def _sample(logits: torch.Tensor, temperature: float, generator: torch.Generator, top_k: int | None) -> torch.Tensor:
    logits = logits.float()
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    root = torch.softmax(logits / temperature, dim=-1).sqrt()
    noise = torch.randn(root.shape, generator=generator).to(root.device)
    return root * noise - root.square() * (root * noise).sum(-1, keepdim=True)
