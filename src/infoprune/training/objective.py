"""The information-bottleneck objective, term by term. Pure functions of tensors, and the budget's multipliers.

L = CE + eta T^2 KL(teacher || student)            keeps I(Z;Y)
+ beta sum_u R_u(z_u) / sum_u R_u(1)           squeezes I(X;Z)
+ kappa mean_blocks KS(gated | open)          keeps the structure
+ mu_1 e + mu_2 e^2,   e = c / c* - 1           meets the budget
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from infoprune.training.structure import BlockStructure


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over answer tokens of -ln p(target), nats; logits (targets, vocabulary), targets (targets,)."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over answer tokens of T^2 KL(teacher || student), both softened by T (Hinton, Vinyals & Dean 2015), nats.

    Args:
        student, teacher: (targets, vocabulary) logits.
        temperature: T.
    """
    p = (teacher.float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(q, p, reduction="sum", log_target=True)


def hidden_distance(student: list[torch.Tensor], teacher: list[torch.Tensor], valid: torch.Tensor) -> torch.Tensor:
    """Sum over real tokens of d / (1 + d), d = ||student - teacher||^2 / ||teacher||^2, mean over depths; dimensionless, below 1 a token.

    Relative, so that the few tokens with massive activations do not drown the others; bounded (Geman & McClure 1985), so that a token
    that gains or loses its massive activation, which few answers depend on, does not rule the step.

    Args:
        student, teacher: Per depth (rows, length, hidden).
        valid: (rows, length) boolean, false on padding.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        s, t = s[valid].float(), t[valid].float()
        distance = (s - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)
        total = total + (distance / (1 + distance)).sum()
    return total / len(student)


def relative_rate(structures: dict[str, BlockStructure], gates: dict[str, torch.Tensor]) -> torch.Tensor:
    """Information rate of the gated heads over that of all heads, sum R(z) / sum R(1); 1 with all gates open, 0 with all closed."""
    rate = torch.stack([structures[path].rate(z) for path, z in gates.items()]).sum()
    full = torch.stack([structures[path].rate(torch.ones_like(z)) for path, z in gates.items()]).sum()
    return rate / full


def mean_ks(structures: dict[str, BlockStructure], gates: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over blocks of the KS distance between the spectra of the gated output and of that with all gates open, in [0, 1]."""
    return torch.stack([structures[path].ks(z) for path, z in gates.items()]).mean()


@dataclass
class Budget:
    """Augmented Lagrangian on the expected cost (Nocedal & Wright, "Numerical optimization", ch. 17; for pruning Xia et al. 2022).

    Attributes:
        target: c*, share of the gated blocks' dense cost that shall remain.
        linear, quadratic: Multipliers mu_1 and mu_2 of the excess relative to the target; they ascend, the gates descend. mu_2 starts
            high, so that the cost follows the target closely: where it lags, mu_1 winds up and then drives the cost far below.
    """

    target: float
    linear: float = 0.0
    quadratic: float = 100.0

    def penalty(self, cost: torch.Tensor) -> torch.Tensor:
        """mu_1 e + mu_2 e^2 with e = c / c* - 1 at the expected cost share c = ``cost``."""
        excess = cost / self.target - 1
        return self.linear * excess + self.quadratic * excess.square()

    def ascend(self, cost: float, rate: float) -> None:
        """One step of gradient ascent on both multipliers; the linear one may turn negative and pull the cost up to the target."""
        excess = cost / self.target - 1
        self.linear += rate * excess
        self.quadratic += rate * excess**2
