"""What BLIP-2 and InstructBLIP do otherwise than the families that the shared suite was written for."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
import torch

from conftest import ALL
from infoprune.calibrate import calibrate
from infoprune.compress import compress
from infoprune.evaluation import latency
from infoprune.evaluation.cost import count_flops
from infoprune.model import prompt_encoder
from infoprune.modeling_infoprune import NarrowAttention
from infoprune.packing import answer_logits, batches
from infoprune.surgery import apply_
from infoprune.training.data import VisionCache
from test_families import inputs_of, plan_of, statistics_of
from tiny_models import IMAGE, build


def tiny(name):
    return next(tiny for tiny in ALL if tiny.name == name)


@pytest.fixture
def blip2():
    return build(tiny("blip2-opt"))


@pytest.fixture
def instructblip():
    return build(tiny("instructblip-llama"))


def normalised_behind():
    """BLIP-2 with an OPT like OPT-350m, whose layers normalise the stream behind their blocks."""
    config = tiny("blip2-opt").config()
    config.text_config.do_layer_norm_before = False
    return build(dataclasses.replace(tiny("blip2-opt"), config=lambda: config))


def test_prompts_are_put_as_the_family_was_trained(blip2, instructblip):
    assert blip2.encoder.prompt("what shape ?") == "Question: what shape ? Answer:"
    assert instructblip.encoder.prompt("what shape ?") == "what shape ?"


def test_answers_end_where_generation_stops(blip2, questions):
    own = blip2.model.language_model.generation_config
    for stops, expected in ((7, 7), ([7, 1], 1), (None, 1)):
        own.eos_token_id = stops
        encoder = prompt_encoder(blip2.model, blip2.processor)
        assert encoder.encode(questions[0], questions[0].load_image()).answer[-1] == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-llama"])
def test_generation_goes_on_from_the_prompt_also_in_padded_batches(name, questions):
    vlm = build(tiny(name))
    texts, images = [vlm.encoder.prompt(e.question) for e in questions[:3]], [e.load_image() for e in questions[:3]]
    inputs = vlm.encoder.inputs(texts, images)  # image tokens, padding, question
    assert not inputs["attention_mask"].all()
    answers = vlm.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert answers.shape == (3, 4)
    for text, image, answer in zip(texts, images, answers, strict=True):
        alone = vlm.encoder.inputs([text], [image])
        found = vlm.model.generate(**alone, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        logits = vlm.model(**alone).logits[0, -1]
        logits[1] = -torch.inf  # no end before four tokens
        assert torch.equal(found, answer) and int(found[0]) == int(logits.argmax())


@torch.no_grad()
def test_every_question_has_its_own_image_tokens_where_they_depend_on_it(blip2, instructblip, questions):
    for vlm, rows in ((blip2, 2), (instructblip, 6)):
        batch, _ = next(iter(batches(vlm.encoder, questions[:6])))
        assert int(batch.image.sum()) == 3 * rows
        assert (batch.inputs["input_ids"] == IMAGE).equal(batch.image)
    lengths = batch.inputs["qformer_attention_mask"].sum(1).tolist()
    assert batch.inputs["qformer_input_ids"].shape == (6, max(lengths)) and len(set(lengths)) > 1
    assert VisionCache(instructblip).replace(batch, [e.image for e in questions[:6]]) is batch
    other = dict(batch.inputs, qformer_input_ids=batch.inputs["qformer_input_ids"].flip(0))
    assert not torch.allclose(instructblip.model(**other).logits, instructblip.model(**batch.inputs).logits)


@pytest.mark.parametrize("build_", [lambda: build(tiny("blip2-opt")), normalised_behind], ids=["before", "behind"])
def test_input_gradients_are_those_of_the_ffn_alone(build_, questions):
    # Where the stream is normalised behind blocks, what the FFN reads is also what it adds to.
    vlm = build_()
    site = next(s for s in vlm.architecture.ffn if s.tower == "text")
    assert site.names.rescaled is (build_ is normalised_behind)
    linear, found = vlm.model.get_submodule(f"{site.path}.{site.names.up}"), []
    with ExitStack() as stack:
        stack.callback(linear.register_forward_hook(lambda m, a, output: output.register_hook(found.append) and None).remove)
        packed = [batch for batch, _ in batches(vlm.encoder, questions)]
        statistics = calibrate(vlm.model, vlm.architecture, packed)
    valid = torch.cat([batch.valid.flatten() for batch in packed])
    mapped = (torch.cat(found)[valid] @ linear.weight).double()
    moments = statistics.sites[site.path].input_gradient
    assert moments.count == int(valid.sum())
    torch.testing.assert_close(moments.second_moment, (mapped.T @ mapped).detach() / len(mapped), atol=1e-6, rtol=1e-4)


def test_a_language_model_that_normalises_behind_its_blocks_is_repaired(questions):
    vlm = normalised_behind()
    result = compress(vlm, questions, flops=0.8, rank_multiple=2, examples=12)
    batch, _ = next(iter(batches(vlm.encoder, questions)))
    with torch.no_grad():
        known, found = (answer_logits(model, batch) for model in (vlm.model, result.vlm.model))
        assert float((known - found).norm() / known.norm()) < 0.5
    assert result.flops_ratio <= 0.8


def test_heads_that_no_longer_fill_the_stream(blip2, questions):
    apply_(blip2.model, blip2.architecture, plan_of(blip2), statistics_of(blip2, questions))
    blocks = [blip2.model.get_submodule(s.path) for s in blip2.architecture.attention if s.tower == "vision"]
    assert all(isinstance(block, NarrowAttention) and block.qkv.out_features == 3 * 18 for block in blocks)
    block = blocks[0].train()
    block.dropout = 0.5
    x = torch.randn(1, 5, 24)
    assert not torch.equal(block(x)[0], block(x)[0]) and torch.equal(block.eval()(x)[0], block(x)[0])


def test_parts_add_up_though_the_head_is_inside_the_language_model(blip2, questions):
    family, inputs = blip2.architecture.family, inputs_of(blip2, questions)
    flops = count_flops(blip2.model, family, inputs, 1)
    hidden, vocabulary = 32, 64
    assert flops.lm_head == 2 * hidden * vocabulary
    layers = 2 * (8 * hidden**2 + 4 * hidden * 48)  # attention's four and the FFN's two linears of two layers, per token
    assert 0 < flops.decode_step - layers == 2 * 2 * 2 * hidden * (inputs["input_ids"].shape[1] + 1)  # scores and weighted values
    assert flops.projector > 2 * 24 * hidden * 3
    times = latency.measure([blip2], family, inputs, answer_tokens=2, repeats=2, warmup=1)[0]
    assert all(times[part]["median"] > 0 for part in latency.PARTS)
