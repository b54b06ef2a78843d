"""Cut a model layer by layer and repair each block against the dense model's residual stream, in closed form.

Local optimality is not enough: every cut shifts what the next layers read, and small errors add up over depth. So blocks are cut in
the order of the forward pass, each on the inputs that the compressed model will really see, and both of its ends are refitted by
weighted least squares with a ridge. First the linears that read the stream, V, become V (I + D), with the best linear prediction of what
they would have read (x, of the dense model) from what they do read (x'):

    D = argmin sum_t w_t ||(x_t - x'_t) - D x'_t||^2 + rho ||D||^2

Then the linear that writes to the stream,

    W = argmin sum_t w_t ||y_t + (h_t - h'_t) - W z_t||^2 + rho ||W - W_0||^2

with z what it reads in the compressed model, y the dense block's output, h and h' the dense and compressed residual streams before the
block, and w the tokens' weights: their relevance to the calibration questions, and beside it an even part, in which errors count relative
to the stream behind the block, |h_t + y_t|^2: blocks read it through a norm, and a few tokens of thousands of times the others' energy
(massive activations, arXiv 2402.17762) would have it to themselves. The target contains the drift h - h', so a block also corrects what
earlier cuts left behind. Of blocks that are not cut only the readers are refitted, and only behind a cut. One layer runs at a time,
dense and compressed, on stored activations: little more than a dense and two compressed forward passes in all, and no second copy of the
model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.constants import behind, constant_before
from infoprune.criteria.ffn import FFNOptions
from infoprune.layers import restore_forward
from infoprune.least_squares import LeastSquares
from infoprune.linears import add_, last_linear, readers_of, writer_of
from infoprune.modeling_infoprune import ALONE, Constant
from infoprune.packing import PackedBatch
from infoprune.plan import CompressionPlan
from infoprune.site_statistics import Statistics
from infoprune.streams import Stop, capture, captured, layer_of, placed, reading
from infoprune.surgery import cut_ffn_, prune_heads_
from infoprune.tokens import unpadded

RIDGE = 0.05
# What tokens count beside their relevance, in means of that. Relevance is a few tokens' (a hundredth of them have most of it): what it
# leaves out, the questions of calibration did not need, and others may.
EVEN = 1.0
LEAST_ENERGY = 0.01  # of the median: below that a token's stream is as good as nothing, and relative errors say nothing
_Inputs = dict[str, list[torch.Tensor]]  # what each of a block's input linears read in the dense model, per batch, by its name


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
    even: float = EVEN,
    progress: Callable[[], None] = lambda: None,
    notify: Callable[[str], None] = lambda message: None,
) -> None:
    """Cut ``model`` by ``plan`` in place, with sequential least-squares repair.

    Args:
        model: The dense model.
        architecture: Its sites.
        plan: What to keep.
        statistics: Moments of the dense model, with the token weights of the same batches.
        batches: The calibration batches, in the same order. A stack of layers is repaired on as many of them as keep its stream below
            :data:`STREAM_BYTES`, and all else that its layers read below :data:`ELSE_BYTES`.
        options: The FFN method.
        ridge: rho relative to the mean diagonal of E[x' x'^T] or E[z z^T].
        even: What is added to the tokens' calibration weights in the mean, in means of the block's.
        progress: Called after each layer.
        notify: Called with one line for people where not all batches are used.

    Raises:
        PlanError: The plan does not fit the model; nothing was changed.
    """
    plan.check(architecture)
    was_training = model.training
    model.eval()
    stacks = _stacks(architecture)
    untouched = [captured(model, layers, batches, notify) for layers in stacks]
    touched = False
    while stacks:
        layers, first = stacks.pop(0), untouched.pop(0)  # what is done with goes
        used = [stream.tokens for stream in first]
        current = [capture(model, layers, batch) for batch in itertools.islice(batches, len(first))] if touched else first
        touched = touched or any(site.path in plan.heads or site.path in plan.ffn for blocks in layers for site in blocks)
        dense, compressed = ([stream.hidden for stream in streams] for streams in (first, current))
        for stream in (*first, *current):
            stream.hidden = torch.empty(0)  # lives in the lists above as long as it is of use
        for number, (attention, ffn) in enumerate(layers):
            dense, compressed = (
                [s.before(number, h) for s, h in zip(streams, hidden, strict=True)]
                for streams, hidden in ((first, dense), (current, compressed))
            )
            dense_kwargs, compressed_kwargs = ([s.kwargs[number] for s in streams] for streams in (first, current))
            worker = _LayerRepair(model, attention, ffn, used, dense_kwargs, compressed_kwargs, statistics, ridge, even)
            dense, compressed = worker.run(dense, compressed, plan, options)
            progress()
    model.train(was_training)


def _stacks(architecture: Architecture) -> list[list[tuple[AttentionSite, FFNSite]]]:
    """The blocks of each list of layers, in the order of the forward pass."""
    layers = zip(architecture.attention, architecture.ffn, strict=True)
    return [list(stack) for _, stack in itertools.groupby(layers, key=lambda blocks: blocks[0].stack)]


def evened(weights: Sequence[torch.Tensor], even: float, energies: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Weights over their mean, which is over all batches, plus ``even`` in the mean; without any relevance that alone.

    Args:
        weights: (tokens,) of each batch.
        even: The same for all tokens, or in proportion to 1 / energy.
        energies: (tokens,) of each batch, or ``None``.
    """
    mean = torch.cat(list(weights)).mean().clamp_min(torch.finfo(torch.float32).tiny)
    if energies is None:
        return [w / mean + even for w in weights]
    least = (LEAST_ENERGY * torch.cat(list(energies)).median()).clamp_min(torch.finfo(torch.float32).tiny)
    shares = [1 / energy.clamp_min(least) for energy in energies]
    total = torch.cat(shares).mean()
    return [w / mean + even * (share / total).to(w) for w, share in zip(weights, shares, strict=True)]


class _LayerRepair:
    """One layer: run dense, cut and refit attention, cut and refit the FFN, run compressed."""

    def __init__(
        self, model: nn.Module, attention: AttentionSite, ffn: FFNSite, batches: Sequence[PackedBatch],
        dense_kwargs: list[dict[str, Any]], compressed_kwargs: list[dict[str, Any]], statistics: Statistics, ridge: float, even: float,
    ) -> None:  # fmt: skip
        self.model, self.attention, self.ffn, self.batches = model, attention, ffn, batches
        self.dense_kwargs, self.compressed_kwargs, self.statistics, self.ridge = dense_kwargs, compressed_kwargs, statistics, ridge
        self.layer, self.rescaled = layer_of(model, attention), attention.names.rescaled
        self.even = even

    def run(
        self, dense: list[torch.Tensor], compressed: list[torch.Tensor], plan: CompressionPlan, options: FFNOptions
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the layer leaves of either stream, the cut made."""
        drifted = not all(h is c or torch.equal(h, c) for h, c in zip(dense, compressed, strict=True))
        # Layers may read more than the stream: image features by cross-attention, which an earlier stack may have changed.
        alike = not drifted and all(d is c for d, c in zip(self.dense_kwargs, self.compressed_kwargs, strict=True))
        if alike and self.attention.path not in plan.heads and self.ffn.path not in plan.ffn:
            after = [self._call(h, k) for h, k in zip(dense, self.dense_kwargs, strict=True)]
            return after, after
        after_dense, targets, inputs = self._run_dense(dense)
        # What rescales a block's output would have to be passed backwards by the drift; there each block only aims at its own output.
        drift = [torch.zeros_like(h) if self.rescaled else h - c for h, c in zip(dense, compressed, strict=True)]
        streams = [h + t.view_as(h) for h, t in zip(dense, targets[self.attention.path], strict=True)]
        writes = self._cut_attention(compressed, plan, inputs.pop(self.attention.path) if drifted else None, targets, drift, streams)
        del streams
        if self.ffn.path in plan.ffn:
            cut_ffn_(self.model, self.ffn, plan.ffn[self.ffn.path], self.statistics.sites[self.ffn.path], options)
        if isinstance(writer := writer_of(self.model, self.ffn), Constant):
            self._settle(self.ffn, writer, targets)
            return after_dense, self._call_all(compressed, writes)
        if drifted or self.attention.path in plan.heads:
            self._refit_readers(self.ffn, inputs.pop(self.ffn.path), compressed, writes)
        if self.ffn.path not in plan.ffn:
            return after_dense, self._call_all(compressed, writes)
        if not self.rescaled:
            drift = [d + (t - a) for d, t, a in zip(drift, targets[self.attention.path], writes, strict=True)]
        with reading(last_linear(writer_of(self.model, self.ffn))) as read:
            left = self._call_all(compressed, writes)
        change = self._refit(self.ffn, read, targets[self.ffn.path], drift, after_dense)
        if self.rescaled:
            return after_dense, self._call_all(compressed, writes)
        return after_dense, [h + change(z).view_as(h) for h, z in zip(left, read, strict=True)]  # no need to run it again

    def _run_dense(self, dense: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]], dict[str, _Inputs]]:
        """What the layer leaves, and by block what it writes and what its linears read."""
        targets: dict[str, list[torch.Tensor]] = {self.attention.path: [], self.ffn.path: []}
        inputs: dict[str, _Inputs] = {}
        with ExitStack() as stack:
            for site in (self.attention, self.ffn):
                linear, held = writer_of(self.model, site), targets[site.path]
                stack.callback(linear.register_forward_hook(lambda m, a, output, held=held: held.append(output)).remove)
                readers = readers_of(self.model, site)
                inputs[site.path] = {name: stack.enter_context(reading(reader)) for name, reader in readers.items()}
            self.behind = stack.enter_context(behind(self.layer, targets))
            return [self._call(h, k) for h, k in zip(dense, self.dense_kwargs, strict=True)], targets, inputs

    def _cut_attention(
        self, compressed: list[torch.Tensor], plan: CompressionPlan, inputs: _Inputs | None, targets: dict[str, list[torch.Tensor]],
        drift: list[torch.Tensor], streams: list[torch.Tensor],
    ) -> list[torch.Tensor]:  # fmt: skip
        """Cut and refit the attention block; ``inputs`` are given where its readers need it, too. What it writes then."""
        path = self.attention.path
        if path in plan.heads:
            prune_heads_(self.model, self.attention, plan.heads[path], self.statistics.sites[path])
        writer = writer_of(self.model, self.attention)
        if isinstance(writer, Constant):  # nothing to refit; the FFN makes up for it
            self._settle(self.attention, writer, targets)
            return [writer.constant(h) for h in compressed]
        if inputs is not None:
            self._refit_readers(self.attention, inputs, compressed)
        read = self._read(last_linear(writer), compressed)
        if path in plan.heads:
            self._refit(self.attention, read, targets[path], drift, streams)
        return [writer(z) for z in read]

    def _settle(self, site: AttentionSite | FFNSite, constant: Constant, targets: dict[str, list[torch.Tensor]]) -> None:
        """What is left of a dropped block, where the layer normalises it."""
        norm = self.behind.get(site.path)
        if constant.bias is None or norm is None:
            return
        outputs = [unpadded(site, y, b.valid) for y, b in zip(targets[site.path], self.batches, strict=True)]
        found = constant_before(norm, outputs, evened(self._token_weights(site), self.even))
        if found is not None:
            constant.bias.copy_(found)

    def _call_all(self, hidden: list[torch.Tensor], writes: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._call(h, kwargs, a) for h, kwargs, a in zip(hidden, self.compressed_kwargs, writes, strict=True)]

    def _call(self, hidden: torch.Tensor, kwargs: dict[str, Any], writes: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer leaves. ``writes``: what its attention block writes, where that is known and the block need not run again."""
        with nullcontext() if writes is None else self._writing(writes.view_as(hidden)):
            output = self.layer(hidden, **{name: placed(value, hidden.device) for name, value in kwargs.items()})
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _writing(self, writes: torch.Tensor) -> Iterator[None]:
        """Inside the block, the attention block gives ``writes`` whatever it reads."""
        block = self.model.get_submodule(self.attention.path)
        before, given = block.__dict__.get("forward"), writes if self.attention.names.out == ALONE else (writes, None)
        block.forward = lambda *args, **kwargs: given
        try:
            yield
        finally:
            restore_forward(block, before)

    def _read(self, linear: nn.Module, hidden: list[torch.Tensor], writes: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What a linear reads, per batch; the rest of the layer does not run, nor attention where ``writes`` tells what that writes."""
        with reading(linear, stop=True) as held:
            for h, kwargs, a in zip(hidden, self.compressed_kwargs, writes or [None] * len(hidden), strict=True):
                with suppress(Stop):
                    self._call(h, kwargs, a)
        return held

    def _token_weights(self, site: AttentionSite | FFNSite) -> list[torch.Tensor]:
        return self.statistics.sites[site.path].token_weights[: len(self.batches)]

    def _refit_readers(
        self, site: AttentionSite | FFNSite, inputs: _Inputs, hidden: list[torch.Tensor], writes: list[torch.Tensor] | None = None
    ) -> None:
        """Refit the linears that read the stream to what they would have read (``inputs``, dense); ``writes`` as in :meth:`_read`."""
        readers = readers_of(self.model, site)
        dense = next(iter(inputs.values()))
        # Keys and values of cross-attention read something else, which stays as it is.
        same = [r for name, r in readers.items() if name not in inputs or (inputs[name] and inputs[name][0] is dense[0])]
        now = self._read(same[0], hidden, writes)
        fit = LeastSquares(site.hidden_size, site.hidden_size, intercept=all(r.bias is not None for r in same))
        weights = evened(self._token_weights(site), self.even)  # a norm has made these inputs comparable
        for number, batch in enumerate(self.batches):
            x, seen = (unpadded(site, values[number], batch.valid) for values in (dense, now))
            fit.update(seen, x.float() - seen, weights[number])
        change = fit.solve(self.ridge)
        for reader in same:
            add_(reader, reader.weight.float() @ change.to(reader.weight.device, torch.float32))

    def _refit(
        self, site: AttentionSite | FFNSite, read: list[torch.Tensor], targets: list[torch.Tensor], drift: list[torch.Tensor],
        streams: list[torch.Tensor],
    ) -> Callable[[torch.Tensor], torch.Tensor]:  # fmt: skip
        """Refit the block's last linear; gives how its output changed, by what it reads. ``streams``: what the dense block left."""
        linear = last_linear(writer_of(self.model, site))
        fit = LeastSquares(linear.in_features, linear.out_features, intercept=linear.bias is not None)
        energies = None  # what is rescaled before it is added is not in the stream's units
        if not self.rescaled:
            energies = [unpadded(site, h, b.valid).float().square().sum(1) for h, b in zip(streams, self.batches, strict=True)]
        weights = evened(self._token_weights(site), self.even, energies)
        for number, batch in enumerate(self.batches):
            z, target, off = (unpadded(site, values[number], batch.valid) for values in (read, targets, drift))
            error = target.float() + off - linear(z)  # a small difference of large values
            fit.update(z, error, weights[number])
        return add_(linear, fit.solve(self.ridge))
