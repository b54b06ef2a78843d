from __future__ import annotations

import itertools

import pytest
import torch

from infoprune.calibrate import calibrate
from infoprune.compress import compress
from infoprune.depth import Layer, least_influential
from infoprune.errors import BudgetError
from infoprune.evaluation.cost import num_parameters
from infoprune.packing import answer_logits, batches


def layers(gqa_vlm, influences):
    sites = itertools.cycle(zip(gqa_vlm.architecture.attention, gqa_vlm.architecture.ffn, strict=True))
    return [Layer(*next(sites), influence, 0.0) for influence in influences]


def test_least_influential_layers_go_until_the_budget_is_met(gqa_vlm):
    found = layers(gqa_vlm, [0.3, 0.1, 0.2, 0.4])
    dropped = [found.index(layer) for layer in least_influential(found, [10.0] * 4, 60.0, 80.0)]
    assert dropped == [1, 2]
    assert least_influential(found, [10.0] * 4, 60.0, 100.0) == []
    assert len(least_influential(found, [10.0] * 4, 60.0, 60.0)) == 4


def test_layers_that_a_larger_one_makes_up_for_are_put_back(gqa_vlm):
    found = layers(gqa_vlm, [0.1, 0.2, 0.3])
    assert least_influential(found, [2.0, 3.0, 20.0], 0.0, 5.0) == found[2:]  # 25 in all: the last one alone is enough
    assert least_influential(found, [2.0, 3.0, 20.0], 0.0, 3.0) == [found[0], found[2]]


def test_impossible_depth_says_the_smallest_share(gqa_vlm):
    with pytest.raises(BudgetError, match=r"smallest share is 0\.6\."):
        least_influential(layers(gqa_vlm, [0.1] * 4), [10.0] * 4, 60.0, 50.0)


def test_similarity_is_the_mean_cosine_of_what_layers_read_and_leave(gqa_vlm, questions):
    inputs = [b for b, _ in batches(gqa_vlm.encoder, questions, images_per_batch=2)]
    found = calibrate(gqa_vlm.model, gqa_vlm.architecture, inputs, layers=True).similarity
    assert set(found) == {s.path.rpartition(".")[0] for s in gqa_vlm.architecture.attention}
    site = next(s for s in gqa_vlm.architecture.attention if s.tower == "text" and s.layer == 1)
    path = site.path.rpartition(".")[0]
    cosines, batch = [], None

    def after(module, args, output):
        assert batch is not None
        left = output[0] if isinstance(output, tuple) else output
        cosines.append(torch.cosine_similarity(args[0], left, dim=-1)[batch.valid])

    handle = gqa_vlm.model.get_submodule(path).register_forward_hook(after)
    with torch.no_grad():
        for batch in inputs:
            answer_logits(gqa_vlm.model, batch)
    handle.remove()
    assert found[path] == pytest.approx(float(torch.cat(cosines).double().mean()), rel=1e-5)


def test_layers_are_dropped_whole_and_those_that_must_stay_do(gqa_vlm, questions):
    dense = {name: p.clone() for name, p in gqa_vlm.model.named_parameters()}
    result = compress(gqa_vlm, questions, flops=0.7, layers="block-influence", examples=12)
    plan = result.vlm.plan
    assert result.flops_ratio <= 0.7 and result.predicted_loss > 0
    assert plan.heads and all(not d.keep_units and d.compensate == "none" for d in plan.heads.values())
    assert {p.rpartition(".")[0] for p in plan.heads} == {p.rpartition(".")[0] for p in plan.ffn}
    assert all(d.keep_neurons == () for d in plan.ffn.values())
    first = next(s for s in gqa_vlm.architecture.attention if s.min_units)
    assert first.path not in plan.heads
    left = dict(result.vlm.model.named_parameters())
    assert all(torch.equal(p, dense[name]) for name, p in left.items() if name in dense)  # nothing is refitted
    assert num_parameters(result.vlm.model) < sum(p.numel() for p in dense.values())
