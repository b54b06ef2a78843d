"""Weighted least squares with a ridge, over batches of any number."""

from __future__ import annotations

import torch

from infoprune.linalg import add_products_, mirrored_


class LeastSquares:
    """Weighted least squares for a linear map, and an intercept where there may be one, that is small where data say little."""

    def __init__(self, inputs: int, outputs: int, *, intercept: bool) -> None:
        self.size, self.intercept = inputs, intercept
        self.weight = 0.0
        self.gram = torch.zeros(inputs + intercept, inputs + intercept, dtype=torch.float64)
        self.cross = torch.zeros(outputs, inputs + intercept, dtype=torch.float64)

    def update(self, z: torch.Tensor, goal: torch.Tensor, weights: torch.Tensor) -> None:
        """Add what is read (n, inputs) and what should come of it (n, outputs), with weights (n,)."""
        if z.is_cuda:  # sums stay where they are made until they are solved; other devices may have no float64
            self.gram, self.cross = self.gram.to(z.device), self.cross.to(z.device)
        z = z.float()  # sums over tokens need more than half precision
        extended = torch.cat([z, torch.ones_like(z[:, :1])], 1) if self.intercept else z
        weighted = extended * weights[:, None].to(z)
        self.weight += float(weights.sum())
        add_products_(self.gram, weighted, extended)
        self.cross += (goal.float().T @ weighted).to(self.cross.device)

    def solve(self, ridge: float) -> torch.Tensor:
        """(outputs, inputs), or (outputs, inputs + 1) with the intercept last; float64, in the host's memory."""
        if self.weight <= 0:
            return torch.zeros_like(self.cross, device="cpu")
        gram, cross = mirrored_(self.gram.div_(self.weight)), self.cross.div_(self.weight)  # in place: none may be larger than these
        gram.diagonal()[: self.size].add_(ridge * float(gram.diagonal()[: self.size].mean()))  # the intercept is free
        gram.diagonal().add_(1e-12)
        factor, failed = torch.linalg.cholesky_ex(gram)
        solution = torch.linalg.solve(gram, cross.T) if int(failed) else torch.cholesky_solve(cross.T, factor)
        return solution.T.cpu()
