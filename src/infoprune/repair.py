"""Cut a model layer by layer and repair each block against the dense model's residual stream, in closed form.

Local optimality is not enough: every cut shifts what the next layers read, and small errors add up over depth. So blocks are cut in
the order of the forward pass, each on the inputs that the compressed model will really see, and the linear that writes to the
residual stream is refitted by weighted least squares with a ridge towards its own weights:

    W = argmin sum_t w_t ||y_t + (h_t - h'_t) - W z_t||^2 + rho ||W - W_0||^2

with z what the linear reads in the compressed model, y the dense block's output, h and h' the dense and compressed residual streams
before the block, and w the calibration's token weights. The target contains the drift h - h', so a block also corrects what earlier
cuts left behind. Only one layer runs at a time, dense and compressed, on stored activations: little more than a dense and two compressed
forward passes in all, and no second copy of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.calibrate import Statistics, stream_name, unpadded
from infoprune.criteria.ffn import FFNOptions
from infoprune.modeling_infoprune import Constant, ConstantAttention
from infoprune.packing import PackedBatch, answer_logits
from infoprune.plan import CompressionPlan
from infoprune.surgery import cut_ffn_, prune_heads_

RIDGE = 0.05


class _Stop(Exception):
    """Ends a forward pass where nothing behind it is needed."""


@dataclass
class _Stream:
    """Residual stream of one batch before the first layer of a stack, and what the model does around the layers.

    Attributes:
        hidden: What the first layer reads.
        kwargs: What else each layer is called with.
        added: What the model adds to the stream before each layer, where it adds anything (image features of a lower level, for example).
    """

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]
    added: list[torch.Tensor | None]

    def before(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer reads, given what the layer before it left."""
        added = self.added[layer]
        return hidden if added is None else hidden + added


@torch.no_grad()
def cut_and_repair_(
    model: nn.Module,
    architecture: Architecture,
    plan: CompressionPlan,
    statistics: Statistics,
    batches: Sequence[PackedBatch],
    options: FFNOptions,
    *,
    ridge: float = RIDGE,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Cut ``model`` by ``plan`` in place, with sequential least-squares repair.

    Args:
        model: The dense model.
        architecture: Its sites.
        plan: What to keep.
        statistics: Moments of the dense model, with the token weights of the same batches.
        batches: The calibration batches, in the same order.
        options: The FFN method.
        ridge: rho relative to the mean diagonal of E[z z^T].
        progress: Called after each layer.

    Raises:
        PlanError: The plan does not fit the model; nothing was changed.
    """
    plan.check(architecture)
    was_training = model.training
    model.eval()
    stacks = _stacks(architecture)
    untouched = [[_capture(model, layers, batch) for batch in batches] for layers in stacks]
    for layers, first in zip(stacks, untouched, strict=True):
        current = first if layers is stacks[0] else [_capture(model, layers, batch) for batch in batches]
        dense, compressed = ([stream.hidden for stream in streams] for streams in (first, current))
        for number, (attention, ffn) in enumerate(layers):
            dense, compressed = (
                [s.before(number, h) for s, h in zip(streams, hidden, strict=True)]
                for streams, hidden in ((first, dense), (current, compressed))
            )
            dense_kwargs, compressed_kwargs = ([s.kwargs[number] for s in streams] for streams in (first, current))
            worker = _LayerRepair(model, attention, ffn, batches, dense_kwargs, compressed_kwargs, statistics, ridge)
            dense, compressed = worker.run(dense, compressed, plan, options)
            progress()
    model.train(was_training)


def _stacks(architecture: Architecture) -> list[list[tuple[AttentionSite, FFNSite]]]:
    """The blocks of each list of layers, in the order of the forward pass."""
    layers = zip(architecture.attention, architecture.ffn, strict=True)
    return [list(stack) for _, stack in itertools.groupby(layers, key=lambda blocks: blocks[0].stack)]


def _capture(model: nn.Module, sites: Sequence[tuple[AttentionSite, FFNSite]], batch: PackedBatch) -> _Stream:
    """What a stack's layers are called with. They pass on what they get, but for the last, behind which nothing is needed."""
    layers = [_layer(model, attention) for attention, _ in sites]
    read: list[torch.Tensor] = []
    kwargs: list[dict[str, Any]] = []

    def forward(*args: Any, **given: Any) -> torch.Tensor:
        hidden = args[0] if args else given.pop(stream_name(given))
        if len(args) > 1:  # positional after the hidden states: the attention mask, in every declared tower
            given["attention_mask"] = args[1]
        read.append(hidden)
        kwargs.append(given)
        if len(read) == len(layers):
            raise _Stop
        return hidden

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_restore, layer, layer.__dict__.get("forward"))
            layer.forward = forward
        with suppress(_Stop):
            answer_logits(model, batch)
    added = [None] + [None if now is before else now - before for before, now in itertools.pairwise(read)]
    return _Stream(read[0], kwargs, added)


def _restore(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _layer(model: nn.Module, site: AttentionSite) -> nn.Module:
    return model.get_submodule(site.path.rpartition(".")[0])


class _LayerRepair:
    """One layer: run dense, cut and refit attention, cut and refit the FFN, run compressed."""

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionSite,
        ffn: FFNSite,
        batches: Sequence[PackedBatch],
        dense_kwargs: list[dict[str, Any]],
        compressed_kwargs: list[dict[str, Any]],
        statistics: Statistics,
        ridge: float,
    ) -> None:
        self.model, self.attention, self.ffn, self.batches = model, attention, ffn, batches
        self.dense_kwargs, self.compressed_kwargs, self.statistics, self.ridge = dense_kwargs, compressed_kwargs, statistics, ridge
        self.layer = _layer(model, attention)

    def run(
        self, dense: list[torch.Tensor], compressed: list[torch.Tensor], plan: CompressionPlan, options: FFNOptions
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        targets: dict[str, list[torch.Tensor]] = {self.attention.path: [], self.ffn.path: []}
        with ExitStack() as stack:
            for site in (self.attention, self.ffn):
                linear, held = _writer(self.model, site), targets[site.path]
                stack.callback(linear.register_forward_hook(lambda m, a, output, held=held: held.append(output)).remove)
            after_dense = [self._call(h, k) for h, k in zip(dense, self.dense_kwargs, strict=True)]
        # What rescales a block's output would have to be passed backwards by the drift; there each block only aims at its own output.
        scaled = self.attention.names.rescaled
        drift = [torch.zeros_like(h) if scaled else h - c for h, c in zip(dense, compressed, strict=True)]
        read: list[torch.Tensor] = []
        if self.attention.path in plan.heads:
            prune_heads_(self.model, self.attention, plan.heads[self.attention.path], self.statistics.sites[self.attention.path])
        writer = _writer(self.model, self.attention)
        if not isinstance(writer, Constant):
            read = self._read(self.attention, compressed)
            if self.attention.path in plan.heads:  # a constant has nothing to refit; the FFN makes up for it
                self._refit(self.attention, read, targets[self.attention.path], drift)
        if self.ffn.path in plan.ffn:
            cut_ffn_(self.model, self.ffn, plan.ffn[self.ffn.path], self.statistics.sites[self.ffn.path], options)
            if not isinstance(_writer(self.model, self.ffn), Constant):
                now = [writer.constant(h) for h in compressed] if isinstance(writer, Constant) else [writer(z) for z in read]
                middle = [d if scaled else d + t - a for d, t, a in zip(drift, targets[self.attention.path], now, strict=True)]
                read, left = self._run_and_read(self.ffn, compressed)
                change = self._refit(self.ffn, read, targets[self.ffn.path], middle)
                if not scaled:  # the FFN's output is added as it is, so what the refit changed of it can be added afterwards
                    return after_dense, [h + change(z).view_as(h) for h, z in zip(left, read, strict=True)]
        return after_dense, [self._call(h, k) for h, k in zip(compressed, self.compressed_kwargs, strict=True)]

    def _call(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        output = self.layer(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _read(self, site: AttentionSite | FFNSite, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the block's last linear reads, per batch; the rest of the layer does not run."""
        held: list[torch.Tensor] = []

        def hold(module: nn.Module, args: Any) -> None:
            held.append(args[0])
            raise _Stop

        handle = _last_linear(_writer(self.model, site)).register_forward_pre_hook(hold)
        try:
            for h, kwargs in zip(hidden, self.compressed_kwargs, strict=True):
                with suppress(_Stop):
                    self._call(h, kwargs)
        finally:
            handle.remove()
        return held

    def _run_and_read(self, site: FFNSite, hidden: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the block's last linear reads, and what the layer leaves, per batch."""
        held: list[torch.Tensor] = []
        handle = _last_linear(_writer(self.model, site)).register_forward_pre_hook(lambda module, args: held.append(args[0]))
        try:
            left = [self._call(h, kwargs) for h, kwargs in zip(hidden, self.compressed_kwargs, strict=True)]
        finally:
            handle.remove()
        return held, left

    def _refit(
        self, site: AttentionSite | FFNSite, read: list[torch.Tensor], targets: list[torch.Tensor], drift: list[torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Refit the block's last linear; gives how its output changed, by what it reads."""
        fit = _LeastSquares(_last_linear(_writer(self.model, site)))
        for number, batch in enumerate(self.batches):
            z, target, off = (unpadded(site, values[number], batch.valid) for values in (read, targets, drift))
            fit.update(z, target + off, self.statistics.sites[site.path].token_weights[number])
        return fit.solve_(self.ridge)


def _writer(model: nn.Module, site: AttentionSite | FFNSite) -> nn.Module:
    """The linear (dense or low-rank), or the constant, that writes to the residual stream."""
    block = model.get_submodule(site.path)
    if isinstance(block, ConstantAttention):
        return block
    return block.get_submodule(site.names.out if isinstance(site, AttentionSite) else site.names.down)


def _last_linear(module: nn.Module) -> Any:
    return module if isinstance(module, nn.Linear) else module.get_submodule("up")


class _LeastSquares:
    """Weighted least squares for a linear's weight, and bias where it has one, as a ridge-limited change of what it has."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, n = linear, linear.in_features + 1
        self.gram = torch.zeros(n, n, dtype=torch.float64)
        self.cross = torch.zeros(linear.out_features, n, dtype=torch.float64)

    def update(self, z: torch.Tensor, goal: torch.Tensor, weights: torch.Tensor) -> None:
        error = goal - self.linear(z)
        extended = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        weighted = extended * weights[:, None].to(z)
        self.gram += (weighted.T @ extended).cpu().double()
        self.cross += (error.T @ weighted).cpu().double()

    def solve_(self, ridge: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """Change the linear; gives the change as a linear map."""
        size = self.linear.in_features
        change = torch.zeros_like(self.cross)
        total = float(self.gram[-1, -1])
        if total > 0:
            gram, cross = self.gram.div_(total), self.cross.div_(total)  # in place: as wide as the linear, the largest matrices there are
            if self.linear.bias is None:
                gram, cross = gram[:size, :size], cross[:, :size]
            gram.diagonal()[:size].add_(ridge * float(gram.diagonal()[:size].mean()))  # the bias is free
            gram.diagonal().add_(1e-12)
            change[:, : len(gram)] = torch.linalg.solve(gram, cross.T).T
        change = change.to(self.linear.weight)
        weight, bias = change[:, :size], None if self.linear.bias is None else change[:, size]
        self.linear.weight.add_(weight)
        if bias is not None:
            self.linear.bias.add_(bias)
        return partial(nn.functional.linear, weight=weight, bias=bias)
