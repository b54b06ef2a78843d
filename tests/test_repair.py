from __future__ import annotations

import collections
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import ALL
from infoprune.calibrate import calibrate
from infoprune.criteria.ffn import FFNOptions
from infoprune.layers import stream_name
from infoprune.least_squares import LeastSquares
from infoprune.linears import add_, readers_of
from infoprune.packing import answer_logits, batches
from infoprune.plan import FFNDecision, HeadDecision
from infoprune.repair import _LayerRepair, _stacks, cut_and_repair_, evened
from infoprune.streams import capture
from infoprune.surgery import apply_
from infoprune.tokens import unpadded
from test_families import plan_of
from tiny_models import build


def stream(model, vlm, inputs):
    """Output of the language model's layers on valid tokens, before the final norm would rescale it."""
    last = next(s for s in reversed(vlm.architecture.attention) if s.tower == "text")
    layer, held = model.get_submodule(last.path.rpartition(".")[0]), []
    handle = layer.register_forward_hook(lambda m, a, o: held.append(o if isinstance(o, torch.Tensor) else o[0]))
    for batch in inputs:
        answer_logits(model, batch)
    handle.remove()
    return torch.cat([h[b.valid] for h, b in zip(held, inputs, strict=True)])


@torch.no_grad()
def test_layers_are_replayed_as_the_model_runs_them(vlm, questions):
    batch = next(b for b, _ in batches(vlm.encoder, questions, images_per_batch=2))
    layers = {s.path.rpartition(".")[0]: s for s in vlm.architecture.attention}
    read = {path: [] for path in layers}
    handles = [
        vlm.model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs, held=held: held.append(args[0] if args else kwargs[stream_name(kwargs)]), with_kwargs=True
        )
        for path, held in read.items()
    ]
    answer_logits(vlm.model, batch)
    for handle in handles:
        handle.remove()
    for stack in _stacks(vlm.architecture):
        captured = capture(vlm.model, stack, batch)
        hidden = captured.hidden
        for number, (attention, _) in enumerate(stack):
            path = attention.path.rpartition(".")[0]
            hidden = captured.before(number, hidden)
            torch.testing.assert_close(hidden, read[path][0], atol=1e-5, rtol=1e-5)
            output = vlm.model.get_submodule(path)(hidden, **captured.kwargs[number])
            hidden = output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def test_repair_brings_the_residual_stream_closer(vlm, questions):
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=3)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs, weighting="uniform")
    plan, dense = plan_of(vlm), stream(vlm.model, vlm, inputs)
    plain, repaired = copy.deepcopy(vlm.model), copy.deepcopy(vlm.model)
    apply_(plain, vlm.architecture, plan, statistics)
    cut_and_repair_(repaired, vlm.architecture, plan, statistics, inputs, FFNOptions(), ridge=1e-4)
    before, after = (float((stream(m, vlm, inputs) - dense).square().mean()) for m in (plain, repaired))
    assert after < 0.9 * before
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in repaired.named_parameters()}


@torch.no_grad()
def test_the_next_layer_reads_what_the_repaired_one_leaves(vlm, questions, monkeypatch):
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=3)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs, weighting="uniform")
    run, layers = _LayerRepair.run, []

    def checked(self, dense, compressed, plan, options):
        after_dense, after = run(self, dense, compressed, plan, options)
        for found, hidden, kwargs in zip(after, compressed, self.compressed_kwargs, strict=True):
            torch.testing.assert_close(found, self._call(hidden, kwargs), atol=1e-4, rtol=1e-4)
        layers.append(self.ffn.path)
        return after_dense, after

    monkeypatch.setattr(_LayerRepair, "run", checked)
    cut_and_repair_(vlm.model, vlm.architecture, plan_of(vlm), statistics, inputs, FFNOptions(), ridge=1e-4)
    assert layers == [site.path for site in vlm.architecture.ffn]


@torch.no_grad()
def test_an_empty_plan_is_left_alone(vlm, questions):
    inputs = [b for b, _ in batches(vlm.encoder, questions)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs)
    before = {name: p.clone() for name, p in vlm.model.state_dict().items()}
    cut_and_repair_(vlm.model, vlm.architecture, plan_of(vlm, heads=False, ffn=False), statistics, inputs, FFNOptions())
    assert all(torch.equal(p, before[name]) for name, p in vlm.model.state_dict().items())


@torch.no_grad()
def test_readers_come_nearer_to_what_they_computed_and_others_stay(vlm, questions, monkeypatch):
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=3)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs, weighting="uniform")
    refit, refitted = _LayerRepair._refit_readers, []

    def checked(self, site, dense, hidden, writes=None):
        readers = readers_of(self.model, site)
        first, x = next(iter(readers.values())), next(iter(dense.values()))
        valid = [unpadded(site, values, batch.valid) for values, batch in zip(x, self.batches, strict=True)]
        seen = [unpadded(site, v, b.valid) for v, b in zip(self._read(first, hidden), self.batches, strict=True)]
        if writes is not None:  # attention that does not run again says the same
            known = [unpadded(site, v, b.valid) for v, b in zip(self._read(first, hidden, writes), self.batches, strict=True)]
            torch.testing.assert_close(known, seen)
        before = {name: nn.functional.linear(torch.cat(valid), reader.weight) for name, reader in readers.items()}
        biases = {name: 0.0 if reader.bias is None else reader.bias.clone() for name, reader in readers.items()}
        old = {name: reader.weight.clone() for name, reader in readers.items()}
        refit(self, site, dense, hidden, writes)
        for name, reader in readers.items():
            if name in dense and dense[name][0] is not x[0]:
                assert torch.equal(reader.weight, old[name])
                continue
            error = (before[name] + biases[name] - nn.functional.linear(torch.cat(seen), reader.weight, reader.bias)).square().sum()
            assert error <= (before[name] - nn.functional.linear(torch.cat(seen), old[name])).square().sum() * (1 + 1e-3)
            refitted.append((site.path, name, not torch.equal(reader.weight, old[name])))

    monkeypatch.setattr(_LayerRepair, "_refit_readers", checked)
    cut_and_repair_(vlm.model, vlm.architecture, plan_of(vlm), statistics, inputs, FFNOptions(), ridge=1e-4)
    assert sum(changed for *_, changed in refitted) > len(refitted) / 2


def test_tokens_count_by_relevance_and_evenly_beside_it():
    weights = [torch.tensor([0.0, 1.0]), torch.tensor([7.0])]
    assert torch.equal(torch.cat(evened(weights, 0.0)), torch.tensor([0.0, 0.375, 2.625]))
    assert torch.equal(torch.cat(evened(weights, 0.5)), torch.tensor([0.5, 0.875, 3.125]))
    assert torch.equal(torch.cat(evened([10 * w for w in weights], 0.5)), torch.tensor([0.5, 0.875, 3.125]))
    assert torch.equal(evened([torch.zeros(2)], 0.5)[0], torch.tensor([0.5, 0.5]))


def test_what_counts_beside_relevance_is_relative_to_the_energy():
    weights, energies = [torch.tensor([0.0, 1.0]), torch.tensor([7.0])], [torch.tensor([1.0, 4.0]), torch.tensor([4.0])]
    relevant = torch.cat(evened(weights, 0.0, energies))
    assert torch.equal(relevant, torch.tensor([0.0, 0.375, 2.625]))
    beside = torch.cat(evened(weights, 0.5, energies)) - relevant
    torch.testing.assert_close(beside, torch.tensor([1.0, 0.25, 0.25]))  # mean 0.5, in proportion to 1 / energy
    torch.testing.assert_close(torch.cat(evened(weights, 0.5, [1e6 * e for e in energies])) - relevant, beside)
    nothing = torch.cat(evened(weights, 1.0, [torch.tensor([0.0, 4.0]), torch.tensor([4.0])])) - relevant
    assert nothing[0] / nothing[1] == pytest.approx(100)  # and not infinity
    assert torch.cat(evened(weights, 1.0, [torch.zeros(2), torch.zeros(1)])).isfinite().all()


@torch.no_grad()
def test_repair_is_not_for_massive_activations_alone(gqa_vlm, questions, monkeypatch):
    inputs = [b for b, _ in batches(gqa_vlm.encoder, questions, images_per_batch=3)]
    with torch.no_grad():  # one word of every prompt with a hundred times the others' norm
        gqa_vlm.model.get_input_embeddings().weight[inputs[0].inputs["input_ids"][0, -2]] *= 100
    with torch.enable_grad():
        statistics = calibrate(gqa_vlm.model, gqa_vlm.architecture, inputs, weighting="uniform")
    dense, errors = stream(gqa_vlm.model, gqa_vlm, inputs), []
    for relative in (False, True):
        monkeypatch.setattr("infoprune.repair.evened", evened if relative else lambda w, even, energies=None: evened(w, even))
        model = copy.deepcopy(gqa_vlm.model)
        cut_and_repair_(model, gqa_vlm.architecture, plan_of(gqa_vlm), statistics, inputs, FFNOptions(), ridge=1e-4, even=10.0)
        errors.append(float(((stream(model, gqa_vlm, inputs) - dense).square().sum(1) / dense.square().sum(1)).mean()))
    assert errors[1] < errors[0]


@torch.no_grad()
def test_repair_serves_tokens_that_had_no_relevance(gqa_vlm, questions):
    inputs = [b for b, _ in batches(gqa_vlm.encoder, questions, images_per_batch=3)]
    with torch.enable_grad():
        statistics = calibrate(gqa_vlm.model, gqa_vlm.architecture, inputs, weighting="uniform")
    for site in statistics.sites.values():  # as if all relevance were the first token's
        for weights in site.token_weights:
            weights.zero_()
            weights[0] = 1.0
    dense, errors = stream(gqa_vlm.model, gqa_vlm, inputs), []
    for even in (0.0, 1.0):
        model = copy.deepcopy(gqa_vlm.model)
        cut_and_repair_(model, gqa_vlm.architecture, plan_of(gqa_vlm), statistics, inputs, FFNOptions(), ridge=1e-4, even=even)
        errors.append(float((stream(model, gqa_vlm, inputs) - dense).square().mean()))
    assert errors[1] < errors[0]


def of_the_last_ffn(vlm, questions):
    """Batches, their statistics, the model's last FFN, and a plan that cuts it alone."""
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=3)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs)
    last = vlm.architecture.ffn[-1]
    plan = plan_of(vlm, heads=False)
    return inputs, statistics, last, plan.model_copy(update={"ffn": {last.path: plan.ffn[last.path]}})


@torch.no_grad()
def test_nothing_before_the_first_cut_changes(vlm, questions):
    inputs, statistics, last, plan = of_the_last_ffn(vlm, questions)
    before = copy.deepcopy(vlm.model.state_dict())
    cut_and_repair_(vlm.model, vlm.architecture, plan, statistics, inputs, FFNOptions())
    after = vlm.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if not name.startswith(f"{last.path}."))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
@pytest.mark.parametrize("block", ["attention", "ffn"])
def test_a_block_dropped_in_front_of_a_norm_leaves_the_best_constant_behind_it(name, block, questions):
    vlm = build(next(tiny for tiny in ALL if tiny.name == name))
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=2)]
    statistics = calibrate(vlm.model, vlm.architecture, inputs, weighting="uniform", gradients=False, neurons=True)
    free = tuple(replace(s, min_units=0) for s in vlm.architecture.attention)  # the caches of two layers are too few to drop one
    architecture = replace(vlm.architecture, attention=free)
    site = next(s for s in getattr(architecture, block) if s.tower == "text" and s.layer == 1)
    layer = vlm.model.get_submodule(site.path.rpartition(".")[0])
    norm = layer.post_attention_layernorm if block == "attention" else layer.post_feedforward_layernorm
    outputs, normed = [], []

    def hold(module, args, output):
        outputs.append(args[0])
        normed.append(output)

    handle = norm.register_forward_hook(hold)
    for batch in inputs:
        answer_logits(vlm.model, batch)
    handle.remove()
    o, y = (torch.cat([v[b.valid] for v, b in zip(values, inputs, strict=True)]) for values in (outputs, normed))
    decisions = {
        "attention": {"heads": {site.path: HeadDecision(keep_units=(), num_units=getattr(site, "num_units", 1))}, "ffn": {}},
        "ffn": {"heads": {}, "ffn": {site.path: FFNDecision(keep_neurons=(), num_neurons=getattr(site, "intermediate_size", 1))}},
    }
    plan = plan_of(vlm).model_copy(update=decisions[block])
    cut_and_repair_(vlm.model, architecture, plan, statistics, inputs, FFNOptions())
    found = vlm.model.get_submodule(site.path)
    constant = (found if block == "attention" else found.get_submodule(site.names.down)).bias
    torch.testing.assert_close(norm(constant), y.mean(0), rtol=1e-3, atol=1e-4)
    error = [float((v - y).square().mean()) for v in (norm(constant), norm(o.mean(0)), torch.zeros_like(constant))]
    assert error[0] < min(error[1:])


@torch.no_grad()
def test_layers_before_the_first_cut_run_once_a_batch(vlm, questions):
    inputs, statistics, _, plan = of_the_last_ffn(vlm, questions)
    runs = collections.Counter()
    for site in vlm.architecture.attention:
        vlm.model.get_submodule(site.path).register_forward_hook(lambda *_, path=site.path: runs.update([path]))
    cut_and_repair_(vlm.model, vlm.architecture, plan, statistics, inputs, FFNOptions())
    stacks = len(_stacks(vlm.architecture))  # each is captured in a pass through those before it
    for site in vlm.architecture.attention[:-1]:
        assert runs[site.path] <= (1 if site.tower == "text" else stacks) * len(inputs)


@torch.no_grad()
def test_a_stack_with_more_tokens_than_may_be_kept_is_repaired_on_some(vlm, questions, monkeypatch):
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=2)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs)
    other = vlm.copy()
    first = copy.deepcopy(statistics)
    for site in first.sites.values():
        del site.token_weights[1:]
    told, plan = [], plan_of(vlm)
    cut_and_repair_(other.model, vlm.architecture, plan, first, inputs[:1], FFNOptions())
    monkeypatch.setattr("infoprune.streams.STREAM_BYTES", 1)
    cut_and_repair_(vlm.model, vlm.architecture, plan, statistics, inputs, FFNOptions(), notify=told.append)
    assert told and all(f"1 of {len(inputs)}" in text for text in told)
    for (name, a), b in zip(vlm.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@torch.no_grad()
def test_all_that_layers_read_may_wait_elsewhere_and_counts(vlm, questions, monkeypatch):
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=2)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs)
    other, told, plan = vlm.copy(), [], plan_of(vlm)
    cut_and_repair_(other.model, vlm.architecture, plan, statistics, inputs, FFNOptions())
    monkeypatch.setattr("infoprune.streams.LARGE", 0)  # everything waits
    cut = vlm.copy()
    cut_and_repair_(cut.model, vlm.architecture, plan, statistics, inputs, FFNOptions())
    for (name, a), b in zip(cut.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    monkeypatch.setattr("infoprune.streams.ELSE_BYTES", 1)
    cut_and_repair_(vlm.model, vlm.architecture, plan, statistics, inputs, FFNOptions(), notify=told.append)
    assert any(f"1 of {len(inputs)}" in text for text in told)  # rotary positions, masks, cross-attention's features


def test_least_squares_of_half_precision_sums_in_float32():
    generator = torch.Generator().manual_seed(0)
    z, goal = (torch.randn(5000, 8, generator=generator).bfloat16() + 1 for _ in range(2))
    found = []
    for read in (z, z.float()):
        fit = LeastSquares(8, 8, intercept=True)
        fit.update(read, goal.to(read), torch.full((5000,), 1e-9))  # relevance weights may be too small for float16
        found.append(fit.solve(0.0))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_equals_the_direct_solution_and_ridge_keeps_the_weights(bias):
    torch.manual_seed(0)
    z, w = torch.randn(200, 6) + 0.5, torch.rand(200) + 0.1
    truth = nn.Linear(6, 4, bias=bias)
    goal = truth(z).detach()
    found = nn.Linear(6, 4, bias=bias)
    fit = LeastSquares(6, 4, intercept=bias)
    with torch.no_grad():
        for part in (slice(start, start + 50) for start in range(0, 200, 50)):
            fit.update(z[part], goal[part] - found(z[part]), w[part])
        add_(found, fit.solve(0.0))
        torch.testing.assert_close(found.weight, truth.weight, atol=1e-4, rtol=1e-4)
        stiff = nn.Linear(6, 4, bias=bias)
        before = stiff.weight.clone()
        fit = LeastSquares(6, 4, intercept=bias)
        fit.update(z, goal - stiff(z), w)
        add_(stiff, fit.solve(1e9))
        torch.testing.assert_close(stiff.weight, before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_stream_has_the_change_that_coarse_weights_have():
    linear = torch.nn.Linear(5, 4, dtype=torch.bfloat16)
    before = linear.weight.clone(), linear.bias.clone()
    change = add_(linear, torch.full((4, 6), 1e-3, dtype=torch.float64))
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x, linear.weight - before[0], linear.bias - before[1])
    assert torch.equal(change(x), expected)
    assert not torch.equal(linear.weight - before[0], torch.full_like(linear.weight, 1e-3))  # some of it fell between the grid's points
