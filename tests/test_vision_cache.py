"""Image features that are computed once: every family of the shared suite, with images of several shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from conftest import ALL
from infoprune.packing import answer_logits, batches
from infoprune.training.data import VisionCache, images_of_rows
from tiny_models import build

WITHOUT = ("mllama", "instructblip")  # whose forward takes no features; whose features depend on the question


@pytest.fixture
def batch_and_images(vlm, questions, tmp_path):
    """A batch with one image that is wider than the others, and the image of each row."""
    with Image.open(questions[0].image) as image:
        image.convert("RGB").resize((image.width * 2, image.height)).save(tmp_path / "wide.png")
    questions = [replace(e, image=tmp_path / "wide.png") if e.image == questions[0].image else e for e in questions]
    batch, indices = next(iter(batches(vlm.encoder, questions)))
    return batch, images_of_rows(batch, [questions[index] for index in indices])


@torch.no_grad()
def test_cached_features_change_nothing(vlm, batch_and_images):
    batch, images = batch_and_images
    expected = answer_logits(vlm.model, batch)
    cache, calls = VisionCache(vlm), []
    assert (cache.replace(batch, images) is not batch) == (vlm.model.config.model_type not in WITHOUT)
    handle = vlm.model.get_submodule(vlm.architecture.family.vision).register_forward_hook(lambda *a: calls.append(1))
    replaced = cache.replace(batch, images)
    torch.testing.assert_close(answer_logits(vlm.model, replaced), expected, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert bool(calls) == (replaced is batch)


@torch.no_grad()
def test_features_do_not_depend_on_the_images_beside(vlm, batch_and_images):
    """A run that goes on where it was lacks other images than one that went through, and shall find the same bits."""
    batch, images = batch_and_images
    cache = VisionCache(vlm)
    if cache.replace(batch, images) is batch:
        return
    for image in dict.fromkeys(images):
        alone = VisionCache(vlm).replace(batch, [image]).inputs["mm_encoder_outputs"]["image"].pooler_output
        held = cache._kept[image]["pooler_output"]
        assert all(torch.equal(*pair) for pair in zip(held, alone, strict=True))


@torch.no_grad()
def test_an_image_of_a_single_token(questions, tmp_path):
    """Alone it is too much for the code of Mistral 3, which drops all dimensions of size one."""
    vlm = build(next(tiny for tiny in ALL if tiny.name == "mistral3"))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "small.png")
    mixed = [replace(questions[0], image=tmp_path / "small.png"), *questions[3:]]
    batch, indices = next(iter(batches(vlm.encoder, mixed)))
    assert int(batch.image[0].sum()) == 1 and int(batch.image.sum()) > 1
    replaced = VisionCache(vlm).replace(batch, images_of_rows(batch, [mixed[index] for index in indices]))
    assert replaced is not batch
    torch.testing.assert_close(answer_logits(vlm.model, replaced), answer_logits(vlm.model, batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_does_not_fit_is_computed_again(gqa_vlm, questions):
    batch, indices = next(iter(batches(gqa_vlm.encoder, questions)))
    images = images_of_rows(batch, [questions[index] for index in indices])
    cache = VisionCache(gqa_vlm, limit=1)
    for _ in range(2):
        found = answer_logits(gqa_vlm.model, cache.replace(batch, images))
        torch.testing.assert_close(found, answer_logits(gqa_vlm.model, batch), atol=1e-5, rtol=1e-5)
    assert not cache._kept and not cache._bytes
