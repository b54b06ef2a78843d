from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import infoprune
from infoprune.data import Example, subset
from infoprune.errors import CalibrationError, InfoPruneError
from infoprune.options import CompressionOptions
from infoprune.packing import batches
from infoprune.rare import energy_spread, sample_with_rare
from infoprune.steps import calibration_examples


@pytest.fixture
def many(tmp_path):
    """Four questions on each of thirty images of noise."""
    found = []
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        found += [Example(tmp_path / f"{number}.png", f"what shape is it {turn} ?", "circle") for turn in range(4)]
    return found


def test_the_spread_is_that_of_log_energies_over_the_prompt(vlm, many):
    asked = many[::4][:3]
    wanted = []
    layers = [site.path.rpartition(".")[0] for site in vlm.architecture.attention if site.tower == "text"]
    for batch, _ in batches(vlm.encoder, asked, images_per_batch=1):
        held = {}
        handles = [
            vlm.model.get_submodule(path).register_forward_hook(
                lambda m, a, o, path=path, held=held: held.update({path: o[0] if isinstance(o, tuple) else o})
            )
            for path in layers
        ]
        with torch.no_grad():
            vlm.model(**batch.inputs)
        for handle in handles:
            handle.remove()
        prompt = slice(int(batch.columns.min()) + 1)
        spreads = [held[path].view(-1, held[path].shape[-1])[prompt].norm(dim=1).square().log().std(correction=0) for path in layers]
        wanted.append(float(torch.stack(spreads).mean()))
    hooks = [list(module._forward_hooks) for module in vlm.model.modules()]
    assert energy_spread(vlm, asked) == pytest.approx(wanted, rel=1e-4)
    others = [replace(example, answer="circle square red") for example in asked]
    assert energy_spread(vlm, others) == pytest.approx(wanted, rel=1e-4)  # it needs no labels
    assert [list(module._forward_hooks) for module in vlm.model.modules()] == hooks


def test_the_spread_does_not_depend_on_scale_and_is_larger_where_a_token_stands_out(gqa_vlm, many):
    from infoprune.rare import _spread

    energies = torch.tensor([1.0, 2.0, 4.0, 2.0])
    assert _spread({"a": energies, "b": 1e6 * energies}) == pytest.approx(_spread({"a": energies}))
    assert _spread({"a": torch.ones(4)}) == 0 == _spread({"a": torch.zeros(4)}) == _spread({"a": torch.ones(1)})
    assert _spread({"a": torch.tensor([1.0, 2.0, 4.0, 1e6])}) > _spread({"a": energies})
    with pytest.raises(CalibrationError, match="behind 'a'"):
        _spread({"a": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize("rare", [0.25, 1.0])
def test_a_sample_is_random_images_and_those_of_least_spread_among_others(gqa_vlm, many, rare):
    found = sample_with_rare(gqa_vlm, many, 24, rare, seed=1, per_image=3)
    assert found == sample_with_rare(gqa_vlm, many, 24, rare, seed=1, per_image=3)
    assert found != sample_with_rare(gqa_vlm, many, 24, rare, seed=2, per_image=3)
    assert len({(e.image, e.question) for e in found}) == 24 and [e for e in many if e in found] == found
    by_chance = subset(many, 24 - round(24 * rare), seed=1, per_image=3)
    assert all(e in found for e in by_chance)
    others = [i for i in dict.fromkeys(e.image for e in many) if i not in {e.image for e in by_chance}]
    rest = [e for e in found if e not in by_chance]
    chosen = {e.image for e in rest}
    if rare == 0.25:
        assert len(rest) == len(chosen) == 6  # one question each
    else:
        assert len(chosen) == 24
    first = {image: next(e for e in subset(many, 96, seed=1, per_image=3) if e.image == image) for image in others}
    assert len(set(energy_spread(gqa_vlm, list(first.values())))) == len(first)
    spread = dict(zip(first, energy_spread(gqa_vlm, list(first.values())), strict=True))
    assert chosen == set(sorted(spread, key=spread.__getitem__)[: len(chosen)])


def test_samples_that_leave_no_choice(gqa_vlm, many):
    assert sample_with_rare(gqa_vlm, many, 24, 0.0, seed=1, per_image=3) == subset(many, 24, seed=1, per_image=3)
    assert sample_with_rare(gqa_vlm, many, 999, 0.5, seed=1, per_image=3) == many
    two = [replace(many[0], question=f"what {n} ?") for n in range(20)] + [replace(many[4], question=f"what {n} ?") for n in range(20)]
    found = sample_with_rare(gqa_vlm, two, 24, 0.5, seed=1, per_image=3)  # two images: neither is rare, and there are enough questions
    assert len({(e.image, e.question) for e in found}) == 24


def test_plans_find_the_sample_again(gqa_vlm, many):
    given = {"examples": 24, "rare": 0.5, "seed": 3, "rank_multiple": 2}
    cut = infoprune.compress(gqa_vlm, many, flops=0.8, **given)
    record = cut.vlm.plan.calibration
    assert record.rare == 0.5
    again = infoprune.apply_plan(gqa_vlm.copy(), cut.vlm.plan, many)
    for name, value in cut.vlm.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value)
    plain = calibration_examples(gqa_vlm, many, CompressionOptions(flops=0.8, **(given | {"rare": 0.0})))
    assert plain != calibration_examples(gqa_vlm, many, CompressionOptions(flops=0.8, **given))


@pytest.mark.parametrize("rare", [-0.1, 1.5])
def test_what_is_no_share_is_refused(rare):
    with pytest.raises(InfoPruneError, match="share of the calibration questions"):
        CompressionOptions(flops=0.5, rare=rare)
