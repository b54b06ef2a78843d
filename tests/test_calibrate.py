from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from conftest import ALL, built
from infoprune import CompressionOptions, compress, fisher, memory
from infoprune.calibrate import calibrate
from infoprune.calibration_batches import CalibrationBatches
from infoprune.errors import CalibrationError
from infoprune.fisher import fisher_sample
from infoprune.layers import differentiate_from_first_layers, kept_for_backward, recompute_layers
from infoprune.linalg import BLOCK
from infoprune.moments import Moments
from infoprune.packing import answer_logits, batches, pack
from infoprune.progress import SILENT
from infoprune.saliency import weight_saliencies
from infoprune.sensitivity import head_sensitivities
from infoprune.steps import statistics_of
from infoprune.tokens import all_finite, by_image, rows_of_tokens, unpadded


def test_moments_equal_the_direct_ones_and_are_safe_in_float64():
    torch.manual_seed(0)
    x = torch.randn(1000, 6) * 1e-2 + 100.0  # a mean far larger than the spread
    moments = Moments(6)
    for chunk in x.double().split(130):
        moments.update(chunk)
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(x.double().T, correction=0), rtol=1e-5, atol=1e-9)
    assert moments.count == 1000


@pytest.mark.parametrize("dimension", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_moments_of_vectors_longer_than_a_block_of_products(dimension):
    torch.manual_seed(0)
    vectors, weights = torch.randn(60, dimension) + 0.3, torch.rand(60)
    moments = Moments(dimension)
    for part in (slice(0, 25), slice(25, 60)):
        moments.update(vectors[part], weights[part])
    assert torch.equal(moments.second_moment, moments.second_moment.T)
    expected = (vectors * weights[:, None]).double().T @ vectors.double() / weights.double().sum()
    torch.testing.assert_close(moments.second_moment, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moments.merge(moments).covariance, moments.covariance)
    assert not Moments(dimension).second_moment.any()


def test_weighted_moments_and_merge():
    torch.manual_seed(1)
    x, w = torch.randn(50, 4, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    whole, a, b = Moments(4), Moments(4), Moments(4)
    whole.update(x, w)
    a.update(x[:20], w[:20])
    b.update(x[20:], w[20:])
    torch.testing.assert_close(whole.mean, (w[:, None] * x).sum(0) / w.sum())
    torch.testing.assert_close(a.merge(b).covariance, whole.covariance)


def test_fisher_sample_has_the_fisher_information_as_covariance():
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    samples = fisher_sample(logits.expand(200_000, 4), 1.0, torch.Generator().manual_seed(0)).double()
    p = torch.softmax(logits[0].double(), 0)
    torch.testing.assert_close(samples.T @ samples / len(samples), torch.diag(p) - torch.outer(p, p), atol=2e-3, rtol=0)


def test_the_most_probable_tokens_alone():
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    samples = fisher_sample(logits.expand(200_000, 4), 2.0, torch.Generator().manual_seed(0), top_k=2).double()
    p = torch.tensor([1.0, 0.0, 0.0, 1.0]) * torch.exp(logits[0] / 2)
    p = (p / p.sum()).double()
    torch.testing.assert_close(samples.T @ samples / len(samples), torch.diag(p) - torch.outer(p, p), atol=2e-3, rtol=0)
    assert not samples[:, 1:3].any()
    everything = [fisher_sample(logits, 1.0, torch.Generator().manual_seed(1), top_k=k) for k in (None, 4, 99)]
    assert torch.equal(everything[0], everything[1]) and torch.equal(everything[0], everything[2])


def run(vlm, questions, rows, **options):
    return calibrate(vlm.model, vlm.architecture, (b for b, _ in batches(vlm.encoder, questions, images_per_batch=rows)), **options)


def test_padding_is_excluded(gqa_vlm, questions):
    # Rows alone have no padding; together, the shorter ones are padded.
    uneven = [questions[0], *questions[3:6], questions[6]]
    alone = run(gqa_vlm, uneven, 1, weighting="uniform", gradients=False)
    together = run(gqa_vlm, uneven, 3, weighting="uniform", gradients=False)
    for path, site in alone.sites.items():
        for tap in site.by_class:
            a, b = site.pooled(tap), together.sites[path].pooled(tap)
            assert a.count == b.count
            torch.testing.assert_close(a.second_moment, b.second_moment, rtol=1e-4, atol=1e-5)


def test_image_and_text_tokens_apart_add_up(gqa_vlm, questions):
    whole = run(gqa_vlm, questions, 2)
    split = run(gqa_vlm, questions, 2, split_tokens=True)
    images = len({q.image for q in questions})
    for site in gqa_vlm.architecture.ffn:
        a, b = whole.sites[site.path], split.sites[site.path]
        if site.tower == "text":
            assert set(b.by_class["input"]) == {"image", "text"}
            assert b.by_class["input"]["image"].count == 4 * images
        torch.testing.assert_close(a.pooled("input").covariance, b.pooled("input").covariance, rtol=1e-4, atol=1e-5)


def test_gradients_equal_autograd(gqa_vlm, questions):
    """F at a block's output, and the FFN's W^T g, against gradients taken by hand."""
    found = run(gqa_vlm, questions[:3], 1, seed=5)
    site = next(s for s in gqa_vlm.architecture.ffn if s.tower == "text" and s.layer == 0)
    block = gqa_vlm.model.get_submodule(site.path)
    held = {}

    def hold(module, args, output):
        args[0].retain_grad()
        output.retain_grad()
        held.update(x=args[0], y=output)

    handle = block.register_forward_hook(hold)
    batch, _ = next(batches(gqa_vlm.encoder, questions[:3], images_per_batch=1))
    logits = answer_logits(gqa_vlm.model, batch)
    (logits * fisher_sample(logits.detach(), 1.0, torch.Generator().manual_seed(5))).sum().backward()
    handle.remove()
    statistics = found.sites[site.path]
    for tap, gradient in (("x", statistics.input_gradient), ("y", statistics.output_gradient)):
        g = held[tap].grad[batch.valid].double()
        torch.testing.assert_close(gradient.second_moment, g.T @ g / len(g), rtol=1e-3, atol=1e-9)


def test_layers_that_run_again_for_the_backward_pass_tell_the_same(vlm, questions):
    options = {"branches": True, "magnitudes": True, "neurons": True, "layers": True}
    kept, again = (run(vlm, questions, 3, recompute=recompute, **options) for recompute in (False, True))
    assert kept.similarity == again.similarity
    for path, site in kept.sites.items():
        other = again.sites[path]
        for name in ("output_gradient", "input_gradient", "branch_gradients", "by_class", "magnitudes", "token_weights"):
            for a, b in zip(tensors(getattr(site, name)), tensors(getattr(other, name)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        if site.neurons is not None:
            torch.testing.assert_close(site.neurons.variance, other.neurons.variance)
    assert not any("forward" in module.__dict__ for module in vlm.model.modules())


def tensors(value):
    """All of them in a tree of statistics."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Moments):
        return [value.second_moment, value.mean, torch.tensor(value.count)]
    children = value.values() if isinstance(value, dict) else value or []
    return [tensor for child in children for tensor in tensors(child)]


def test_what_a_backward_pass_needs_is_known_before(vlm, questions):
    one, two = (next(iter(batches(vlm.encoder, questions, images_per_batch=rows)))[0] for rows in (1, 2))
    model, architecture = vlm.model.requires_grad_(False), vlm.architecture
    needs = [kept_for_backward(model, architecture, batch) for batch in (one, two)]
    assert 1.3 * needs[0] < needs[1] < 3 * needs[0]
    held, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def hold(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            held[storage.data_ptr()] = tensor
        return tensor

    with ExitStack() as stack, torch.enable_grad():
        differentiate_from_first_layers(model, architecture, stack)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            answer_logits(model, one)
    really = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert really <= needs[0] <= 1.5 * really  # what two layers share counts for both
    model.requires_grad_(True)
    assert kept_for_backward(model, architecture, one) > needs[0]


def test_batches_are_as_large_as_memory_is_meant_to_hold(gqa_vlm, questions, monkeypatch):
    images = len({q.image for q in questions})
    assert len(CalibrationBatches(gqa_vlm, questions)) == -(-images // 4)
    plain = statistics_of(gqa_vlm, CalibrationBatches(gqa_vlm, questions), CompressionOptions(flops=0.5).needs, SILENT)
    monkeypatch.setattr(memory, "ACTIVATIONS", 10)
    ran = []
    monkeypatch.setattr("infoprune.calibrate.recompute_layers", lambda *args: ran.append(recompute_layers(*args)))
    inputs = CalibrationBatches(gqa_vlm, questions)
    assert len(inputs) == images and all(p.requires_grad for p in gqa_vlm.model.parameters())
    found = statistics_of(gqa_vlm, inputs, CompressionOptions(flops=0.5).needs, SILENT)
    assert ran
    for path, site in plain.sites.items():
        assert site.count == found.sites[path].count > 0
    ran.clear()
    forward = replace(CompressionOptions(flops=0.5).needs, gradients=False, weighting="uniform")
    assert statistics_of(gqa_vlm, inputs, forward, SILENT).num_examples == len(questions) and not ran


def test_no_more_of_the_sample_stays_in_memory_than_may(gqa_vlm, questions, monkeypatch):
    size = {name: value.nbytes for name, value in CalibrationBatches(gqa_vlm, questions[:1])[0].inputs.items()}
    monkeypatch.setattr("infoprune.calibration_batches.ROWS_PER_BATCH", 1)
    monkeypatch.setattr(random.Random, "shuffle", lambda self, rows: None)
    monkeypatch.setattr(memory, "INPUTS", int(2.5 * sum(size.values())))
    prepared = []
    monkeypatch.setattr("infoprune.calibration_batches.pack", lambda encoder, groups: prepared.append(groups) or pack(encoder, groups))
    inputs, again = CalibrationBatches(gqa_vlm, questions), len({q.image for q in questions}) - 2
    prepared.clear()  # of what measures activations
    first, second = list(inputs), list(inputs)
    assert len(prepared) == len(inputs) + again and inputs[0] is first[0] and inputs[-1] is not first[-1]
    for a, b, plain in zip(first, second, batches(gqa_vlm.encoder, questions, images_per_batch=1, share_prefix=True), strict=True):
        assert all(torch.equal(a.inputs[name], b.inputs[name]) and torch.equal(a.inputs[name], v) for name, v in plain[0].inputs.items())
    assert [len(chosen) for chosen in (inputs[:2], inputs[1:], inputs[:1])] == [2, len(inputs) - 1, 1]
    with pytest.raises(IndexError):
        inputs[len(inputs)]


def test_the_first_batches_are_of_all_that_the_sample_has(gqa_vlm, questions, monkeypatch):
    """Refits of large models take no more than these, and data may be sorted."""
    monkeypatch.setattr("infoprune.calibration_batches.ROWS_PER_BATCH", 1)
    order = [rows[0][0].image for rows in CalibrationBatches(gqa_vlm, questions)._groups]
    images = list(dict.fromkeys(q.image for q in questions))
    assert sorted(order) == sorted(images) and order != images
    assert order == [rows[0][0].image for rows in CalibrationBatches(gqa_vlm, questions)._groups]


def test_repair_needs_no_images_once_the_streams_are_there(gqa_vlm, questions, monkeypatch):
    options = CompressionOptions(flops=0.6, examples=len(questions))
    monkeypatch.setattr(memory, "INPUTS", 0)
    inputs = CalibrationBatches(gqa_vlm, questions)
    prepared = []
    monkeypatch.setattr("infoprune.calibration_batches.pack", lambda encoder, groups: prepared.append(groups) or pack(encoder, groups))
    small = compress(gqa_vlm, questions, options=options)
    passes = 4  # calibration, the streams of both towers, and the language model's again behind the cut tower
    assert small.flops_ratio < 0.61 and len(prepared) == 1 + passes * len(inputs)


def test_magnitudes_are_of_what_the_linears_read(gqa_vlm, questions):
    uneven = [questions[0], *questions[3:6], questions[6]]  # rows of different lengths: padding is excluded
    found = run(gqa_vlm, uneven, 3, magnitudes=True)
    site = next(s for s in gqa_vlm.architecture.ffn if s.tower == "text")
    block, read = gqa_vlm.model.get_submodule(site.path), {"input": [], "intermediate": []}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda module, args, tap=tap: read[tap].append(args[0]))
        for tap, name in (("input", site.names.up), ("intermediate", site.names.down))
    ]
    for batch, _ in batches(gqa_vlm.encoder, uneven, images_per_batch=1):
        answer_logits(gqa_vlm.model, batch)
    for hook in hooks:
        hook.remove()
    for tap, values in read.items():
        mean = torch.cat([v.flatten(0, 1) for v in values]).double().abs().mean(0)
        torch.testing.assert_close(found.sites[site.path].mean_magnitude(tap), mean, rtol=1e-4, atol=1e-7)
    assert not run(gqa_vlm, uneven, 3).sites[site.path].magnitudes


def test_nan_is_reported_with_its_site(gqa_vlm, questions):
    site = gqa_vlm.architecture.ffn[-1]
    with torch.no_grad():
        gqa_vlm.model.get_submodule(f"{site.path}.{site.names.up}").weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=site.path):
        run(gqa_vlm, questions, 2)


def test_gradients_in_float16_are_refused(gqa_vlm, questions):
    gqa_vlm.model.half()
    with pytest.raises(CalibrationError, match="vanish in float16"):
        run(gqa_vlm, questions, 2)
    for gradients in (head_sensitivities, weight_saliencies):
        with pytest.raises(CalibrationError, match="vanish in float16"):
            gradients(gqa_vlm.model, gqa_vlm.architecture, [])


def test_fisher_samples_of_many_targets_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(fisher, "TARGETS_AT_ONCE", 3)
    logits = 3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([fisher.fisher_sample(logits, 1.0, generator) for _ in range(20_000)])
    p = logits.softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(torch.einsum("dtv,dtw->tvw", draws, draws) / len(draws), expected, atol=0.02, rtol=0)


def test_gated_ffns_that_no_gradient_reaches_are_cut_apart_as_well(monkeypatch, questions):
    """A tower's last layer is not used where features are those of the layer before."""
    vlm = built(next(tiny for tiny in ALL if tiny.name == "llava-pixtral"), monkeypatch)
    vlm.model.config.vision_feature_layer = vlm.model.model.config.vision_feature_layer = -2
    for structure in ("separate", "best"):
        small = compress(vlm, questions, flops=0.8, ffn="low-rank", structure=structure, examples=6, rank_multiple=2)
        assert small.flops_ratio <= 0.8


def test_heads_alone_want_no_moments_of_factors(gqa_vlm):
    needs = CompressionOptions(flops=0.9, ffn="none").needs
    assert needs.neurons and not needs.factors
    assert not CompressionOptions(flops=0.9, ffn="low-rank").needs.neurons and CompressionOptions(flops=0.9, ffn="low-rank").needs.factors


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_seen(value, dtype):
    values = torch.randn(7, 33).to(dtype)
    assert all_finite(values) and all_finite(values[:0])
    values[3, 20] = value
    assert not all_finite(values)


@torch.no_grad()
def test_tokens_are_known_by_their_image(vlm, questions):
    """The tokens that are said to be a row's are those that the row has alone; only towers that see tiles do not know."""
    seen = []
    first = {site.tower: site for site in reversed(vlm.architecture.ffn) if site.layer == 0}
    for site in first.values():
        taken = vlm.model.get_submodule(f"{site.path}.{site.names.up}").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for batch, _ in batches(vlm.encoder, questions, images_per_batch=3):
            seen.clear()
            answer_logits(vlm.model, batch)
            tokens = unpadded(site, seen[0], batch.valid)
            rows = rows_of_tokens(site, len(tokens), batch)
            if rows is None:  # all tiles in one list
                assert site.tower == "vision" and len(batch.inputs["pixel_values"]) != len(batch.valid)
                continue
            for row in range(len(batch.valid)):
                alone = {name: one_row(name, value, batch, row) for name, value in batch.inputs.items()}
                seen.clear()
                vlm.model(**alone)
                own = unpadded(site, seen[0], batch.valid[row : row + 1])
                torch.testing.assert_close(tokens[rows == row], own, atol=1e-4, rtol=1e-4)
        taken.remove()


def one_row(name, value, batch, row):
    """A row's part of an input of the model."""
    grid, rows = batch.inputs.get("image_grid_thw"), len(batch.valid)
    if grid is not None and name == "pixel_values":
        return value.split(grid.prod(-1).tolist())[row]
    if name == "position_ids" and value.ndim == 3:
        return value[:, row : row + 1]
    per = len(value) // rows
    return value[row * per : (row + 1) * per]


def test_weights_are_relative_to_their_image():
    weights, rows = torch.tensor([1.0, 3.0, 10.0, 30.0, 20.0, 0.0]), torch.tensor([0, 0, 1, 1, 1, 2])
    assert by_image(weights, rows).tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5, 1.0, 1.0])
    assert by_image(1e-20 * weights, rows).tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5, 1.0, 1.0])
    assert float(by_image(weights, None).mean()) == pytest.approx(1)
    assert by_image(weights, rows, 0.25).tolist() == pytest.approx([0.6, 1.4, 0.6, 1.4, 1.0, 1.0])
    for nothing in (None, torch.tensor([0, 0, 1])):
        assert by_image(torch.zeros(3), nothing, 0.1).tolist() == [1, 1, 1]


def test_images_count_alike_however_sure_the_model_is_of_its_answers(gqa_vlm, questions):
    statistics = run(gqa_vlm, questions, 3)
    found = list(batches(gqa_vlm.encoder, questions, images_per_batch=3))
    for site in (*gqa_vlm.architecture.attention, *gqa_vlm.architecture.ffn):
        for weights, (batch, _) in zip(statistics.sites[site.path].token_weights, found, strict=True):
            rows = rows_of_tokens(site, len(weights), batch)
            means = torch.stack([weights[rows == row].mean() for row in range(len(batch.valid))])
            torch.testing.assert_close(means, torch.ones_like(means))
            assert weights.std() > 0


def test_what_an_image_weighs_does_not_depend_on_those_beside_it(gqa_vlm, questions, monkeypatch):
    """Nor on how many images memory lets into a batch."""

    def noise(logits, *args, **options):
        return torch.zeros_like(logits).index_add(1, torch.tensor([0, 1]), torch.tensor([1.0, -1.0]).expand(len(logits), 2))

    monkeypatch.setattr("infoprune.calibrate.fisher_sample", noise)
    found = {rows: run(gqa_vlm, questions, rows).sites for rows in (1, 3)}
    for site in gqa_vlm.architecture.ffn:
        alone, beside = (torch.cat(found[rows][site.path].token_weights) for rows in (1, 3))
        torch.testing.assert_close(beside, alone, rtol=1e-3, atol=1e-5)


def test_no_data_is_refused(gqa_vlm):
    with pytest.raises(CalibrationError, match="no questions"):
        calibrate(gqa_vlm.model, gqa_vlm.architecture, [])


def test_relevance_needs_gradients(gqa_vlm):
    with pytest.raises(CalibrationError, match="gradients"):
        calibrate(gqa_vlm.model, gqa_vlm.architecture, [], gradients=False)
