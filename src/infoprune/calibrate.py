"""Streaming moments of every site's inputs, outputs and output gradients, in one pass over the data.

The task side of the bottleneck enters twice. Gradients of the log-likelihood at a block's output give the metric
F = E[g g^T], in which a small change costs 1/2 tr(F Cov) nats. And tokens differ in how much the answer depends on them: under
``weighting="relevance"`` each token counts with |g|^2, one step of the power iteration for the nearest Kronecker factorisation of
E[x x^T (x) g g^T] (Van Loan & Pitsianis 1993), where plain moments assume that x and g are independent. Between images |g|^2 says
how unsure the model is of its answers (at the logits it is 1 - sum p^2 in the mean) and vanishes where it is sure; a compressed model can
fail there as anywhere. So weights are relative to their mean over the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.errors import CalibrationError
from infoprune.fisher import fisher_sample, refuse_float16
from infoprune.freeze import frozen
from infoprune.layers import differentiate_from_first_layers, recompute_layers, stream_name
from infoprune.memory import trim_heap
from infoprune.moments import DiagonalMoments, Moments, exact_sum
from infoprune.packing import PackedBatch, answer_logits
from infoprune.site_statistics import SiteStatistics, Statistics, TokenClass, Weighting
from infoprune.tokens import all_finite, by_image, rows_of_tokens, unpadded

Site = AttentionSite | FFNSite
# Every token gets this share of its image's mean weight beside its own. In the last layers only the few positions that predict answers
# carry a gradient; without a floor, their moments would be of lower rank than the space.
RELEVANCE_FLOOR = 0.1
RELEASE_EVERY = 4  # batches; activations of many sizes fragment the heap by gigabytes otherwise


def calibrate(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[PackedBatch],
    *,
    weighting: Weighting = "relevance",
    gradients: bool = True,
    branches: bool = False,
    magnitudes: bool = False,
    split_tokens: bool = False,
    factors: bool = True,
    neurons: bool = False,
    layers: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    recompute: bool = False,
    progress: Callable[[int], None] = lambda questions: None,
) -> Statistics:
    """Run the model over ``batches`` once and gather the moments of all sites.

    Nothing of the hooks stays behind, and parameters keep their ``requires_grad``.

    Args:
        model: The dense model; used in eval mode and restored.
        architecture: Its sites.
        batches: Batches from :mod:`infoprune.packing`; padding is excluded.
        weighting: ``relevance`` weights tokens by |g|^2 at the site's output, relative to the image's mean, and needs gradients.
        gradients: Also gather gradient moments.
        branches: Also gather the gate's and the up projection's gradients apart.
        magnitudes: Also gather mean absolute inputs of the FFNs' linears.
        split_tokens: Keep image and text tokens of the language model apart (twice the memory for inputs and outputs).
        factors: Gather the moments of FFNs that factorisations need: of what they read, with its gradients, and of what they write.
        neurons: Also gather means and variances of the FFNs' neurons.
        layers: Also compare what each layer reads with what it leaves.
        temperature, top_k: See :func:`infoprune.fisher.fisher_sample`.
        seed: Seed of the gradient noise.
        recompute: Keep of each layer what it reads, and run it once more in the backward pass: a third more time, a fraction of the memory.
        progress: Called with the number of questions after each batch.

    Raises:
        CalibrationError: No data, float16 where gradients are needed, or a value that is not finite; names the site.
    """
    if not (factors or neurons):
        raise CalibrationError("FFNs need moments of their factors or of their neurons.")
    if weighting == "relevance" and not gradients:
        raise CalibrationError("Relevance weighting needs gradients; use uniform weighting or keep gradients on.")
    if gradients:
        refuse_float16(model)
    collector = _Collector(_Options(weighting, gradients, branches, magnitudes, split_tokens, factors, neurons))
    generator = torch.Generator().manual_seed(seed)
    training, questions = model.training, 0
    model.eval()
    try:
        with ExitStack() as stack, frozen(model), torch.set_grad_enabled(gradients):
            for site in (*architecture.attention, *architecture.ffn):
                collector.attach(model, site, stack)
                if layers and isinstance(site, AttentionSite):
                    collector.attach_layer(model, site, stack)
            if gradients:
                differentiate_from_first_layers(model, architecture, stack)
            if gradients and recompute:
                recompute_layers(model, architecture, stack, collector.second_time)
            for number, batch in enumerate(batches):
                if number % RELEASE_EVERY == 0:
                    trim_heap()
                collector.begin(batch)
                logits = answer_logits(model, batch)
                collector.check_values()  # before a backward pass would spread a NaN to every site
                if gradients:
                    logits.backward(fisher_sample(logits.detach(), temperature, generator, top_k=top_k).to(logits.dtype))
                collector.finish()
                questions += batch.num_questions
                progress(batch.num_questions)
    finally:
        model.train(training)
    if questions == 0:
        raise CalibrationError("Calibration saw no questions; give it data.")
    collector.check()
    similarity = {path: cosines.mean.item() for path, cosines in collector.layers.items()}
    return Statistics(collector.sites, questions, weighting, similarity)


@dataclass(frozen=True)
class _Options:
    weighting: Weighting
    gradients: bool
    branches: bool
    magnitudes: bool
    split_tokens: bool
    factors: bool
    neurons: bool


class _Collector:
    """Hooks that feed moments; holds what the current batch still needs until its backward pass has run."""

    def __init__(self, options: _Options) -> None:
        self.sites: dict[str, SiteStatistics] = {}
        self.layers: dict[str, DiagonalMoments] = {}
        self.options = options
        self._batch: PackedBatch | None = None
        self._again = False  # a layer runs a second time, for its backward pass: there is nothing new to see
        self._rows: dict[tuple[str, int], torch.Tensor | None] = {}  # of the batch's tokens, by tower and how many these are
        self._not_finite: str | None = None  # first site, in the order of the forward pass, with a value that is not finite
        # Values waiting for the gradient that weighs them: (site, tap) -> (site, values, gradient energy so far, energies to come).
        self._pending: dict[tuple[str, str], tuple[Site, torch.Tensor, torch.Tensor | float, int]] = {}

    def begin(self, batch: PackedBatch) -> None:
        self._batch, self._rows = batch, {}

    @contextmanager
    def second_time(self) -> Iterator[None]:
        """A layer runs again inside the block."""
        self._again = True
        try:
            yield
        finally:
            self._again = False

    def finish(self) -> None:
        # What no gradient reached has no influence on the answer (e.g. layers after the one whose features are used): its metric is
        # zero, but its moments are still needed to cut it sensibly.
        for (path, tap), (site, values, _, _) in self._pending.items():
            self._add(site, tap, values, None)
            gradient = Moments(site.hidden_size)
            if tap in ("output", "neurons") or isinstance(site, AttentionSite):
                self.sites[path].output_gradient = self.sites[path].output_gradient or gradient
            else:
                self.sites[path].input_gradient = self.sites[path].input_gradient or gradient
                if self.options.branches and site.gated:
                    for name in ("up", "gate"):
                        self.sites[path].branch_gradients.setdefault(name, Moments(site.hidden_size))
        self._batch, self._pending = None, {}

    def check_values(self) -> None:
        if self._not_finite is not None:
            raise CalibrationError(
                f"Calibration met NaN or infinity at '{self._not_finite}'. Check the checkpoint's weights there and the input images."
            )

    def check(self) -> None:
        for path, statistics in self.sites.items():
            if not statistics.count:
                raise CalibrationError(f"Calibration saw no tokens at '{path}': no image or prompt token reached it.")
            moments = [m for classes in statistics.by_class.values() for m in classes.values()]
            moments += [m for m in (statistics.output_gradient, statistics.input_gradient) if m is not None]
            if not all(m.is_finite() for m in moments):
                raise CalibrationError(f"Calibration met gradients that are NaN or infinite at '{path}'. Compute in float32.")

    def attach(self, model: nn.Module, site: Site, stack: ExitStack) -> None:
        self.sites[site.path] = SiteStatistics()
        block = model.get_submodule(site.path)
        if isinstance(site, AttentionSite):
            self._watch(site, {"input": lambda args, output: args[0]}, block.get_submodule(site.names.out), stack)
            return
        if self.options.factors:
            self._watch_inputs(site, block, stack)
        down = block.get_submodule(site.names.down)
        taps: dict[str, Callable[[Any, Any], torch.Tensor]] = {}
        if self.options.factors:
            taps["output"] = lambda args, output: output
        if self.options.neurons:
            self.sites[site.path].neurons = DiagonalMoments(site.intermediate_size)
            taps["neurons"] = lambda args, output: args[0]
        self._watch(site, taps, down, stack)
        if self.options.magnitudes:
            for tap, reading in (("input", block.get_submodule(site.names.up)), ("intermediate", down)):
                stack.callback(reading.register_forward_pre_hook(partial(self._add_magnitude, site, tap)).remove)

    def _watch_inputs(self, site: FFNSite, block: nn.Module, stack: ExitStack) -> None:
        """What an FFN reads, and the gradients there."""
        inputs = {"up": block.get_submodule(site.names.up)}
        if site.names.gate:
            inputs["gate"] = block.get_submodule(site.names.gate)
        # The input is captured before the block runs, so that it is waiting when the linears below meet their gradients.
        reader = block if site.names.ffn else inputs["up"]
        stack.callback(reader.register_forward_pre_hook(lambda module, args: (self._ffn_input(site, args[0]), *args[1:])).remove)
        for name, linear in inputs.items():
            if self.options.gradients:
                stack.callback(linear.register_forward_hook(partial(self._ffn_branch, site, name)).remove)

    def attach_layer(self, model: nn.Module, site: AttentionSite, stack: ExitStack) -> None:
        """Compare what the layer of an attention block reads with what it leaves."""
        path = site.path.rpartition(".")[0]
        self.layers[path] = DiagonalMoments(1)

        def after(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs[stream_name(kwargs)]
            left = output[0] if isinstance(output, tuple) else output
            # In float32: layers that do next to nothing differ by less than what bfloat16 tells from 1.
            read, written = (self._tokens(site, values).float() for values in (before, left))
            self.layers[path].update(torch.cosine_similarity(read, written)[:, None])

        stack.callback(model.get_submodule(path).register_forward_hook(after, with_kwargs=True).remove)

    def _watch(self, site: Site, taps: dict[str, Callable[[Any, Any], torch.Tensor]], module: nn.Module, stack: ExitStack) -> None:
        """A projection onto the residual stream: moments of its input or output, weighted by the gradient at its output."""

        def after(_: nn.Module, args: Any, output: torch.Tensor) -> None:
            if self._again:
                return
            for tap, values in taps.items():
                self._hold(site, tap, values(args, output), expected=1)
            if self.options.gradients:
                output.register_hook(on_gradient)

        def on_gradient(gradient: torch.Tensor) -> None:
            tokens, statistics = self._tokens(site, gradient), self.sites[site.path]
            statistics.output_gradient = statistics.output_gradient or Moments(tokens.shape[1])
            statistics.output_gradient.update(tokens)
            for tap in taps:
                self._weigh(site, tap, tokens.float().square().sum(1))

        stack.callback(module.register_forward_hook(after).remove)

    def _ffn_input(self, site: FFNSite, values: torch.Tensor) -> torch.Tensor:
        if self._again:
            return values
        self._hold(site, "input", values, expected=site.num_inputs)
        if not self.options.gradients:
            return values

        # A view, which the FFN's input linears alone read, so that the gradient here is W^T g summed over them.
        values = values.view_as(values)

        def on_gradient(gradient: torch.Tensor) -> None:
            tokens, statistics = self._tokens(site, gradient), self.sites[site.path]
            statistics.input_gradient = statistics.input_gradient or Moments(tokens.shape[1])
            statistics.input_gradient.update(tokens)

        values.register_hook(on_gradient)
        return values

    def _ffn_branch(self, site: FFNSite, name: str, linear: Any, args: Any, output: torch.Tensor) -> None:
        if self._again:
            return

        def on_gradient(gradient: torch.Tensor) -> None:
            tokens, statistics = self._tokens(site, gradient), self.sites[site.path]
            energy = tokens.float().square().sum(1)
            statistics.intermediate_gradient_energy += float(exact_sum(energy, 0))
            if self.options.branches and site.gated:
                mapped = tokens @ linear.weight
                statistics.branch_gradients.setdefault(name, Moments(mapped.shape[1])).update(mapped)
            self._weigh(site, "input", energy)

        output.register_hook(on_gradient)

    def _add_magnitude(self, site: FFNSite, tap: str, _: nn.Module, args: Any) -> None:
        if self._again:
            return
        found = exact_sum(self._tokens(site, args[0]).abs(), 0)
        sums = self.sites[site.path].magnitudes
        sums[tap] = sums[tap] + found if tap in sums else found

    def _tokens(self, site: Site, values: torch.Tensor) -> torch.Tensor:
        assert self._batch is not None
        return unpadded(site, values.detach(), self._batch.valid)

    def _hold(self, site: Site, tap: str, values: torch.Tensor, expected: int) -> None:
        tokens = self._tokens(site, values)
        if self._not_finite is None and not all_finite(tokens):
            self._not_finite = site.path
        if self.options.gradients:
            self._pending[site.path, tap] = (site, tokens, 0.0, expected)
        else:
            self._add(site, tap, tokens, None)

    def _weigh(self, site: Site, tap: str, energy: torch.Tensor) -> None:
        _, tokens, so_far, expected = self._pending.pop((site.path, tap))
        total = energy + so_far
        if expected > 1:
            self._pending[site.path, tap] = (site, tokens, total, expected - 1)
            return
        weights = None
        if self.options.weighting == "relevance":
            weights = by_image(total, self._rows_of(site, len(tokens)), RELEVANCE_FLOOR)
        self._add(site, tap, tokens, weights)

    def _rows_of(self, site: Site, count: int) -> torch.Tensor | None:
        assert self._batch is not None
        key = site.tower, count
        if key not in self._rows:
            self._rows[key] = rows_of_tokens(site, count, self._batch)
        return self._rows[key]

    def _add(self, site: Site, tap: str, tokens: torch.Tensor, weights: torch.Tensor | None) -> None:
        assert self._batch is not None
        statistics = self.sites[site.path]
        if isinstance(site, AttentionSite) or tap == ("output" if self.options.factors else "neurons"):
            statistics.token_weights.append(torch.ones(len(tokens)) if weights is None else weights.float().cpu())
        if tap == "neurons":
            assert statistics.neurons is not None
            statistics.neurons.update(tokens, weights)
            return
        classes = statistics.by_class.setdefault(tap, {})
        parts: dict[TokenClass, torch.Tensor | None] = {"image" if site.tower == "vision" else "all": None}
        if site.tower == "text" and self.options.split_tokens:
            image = self._batch.image[self._batch.valid]
            parts = {"image": image, "text": ~image}
        for name, chosen in parts.items():
            moments = classes.setdefault(name, Moments(tokens.shape[1]))
            moments.update(tokens if chosen is None else tokens[chosen], weights if chosen is None or weights is None else weights[chosen])
