from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import infoprune
from infoprune.errors import CheckpointError, InfoPruneError, UnsupportedModelError
from infoprune.graphs import Graphs, export_graphs
from infoprune.surgery import apply_
from test_families import dropping, inputs_of, plan_of, statistics_of
from tiny_models import TINY, build

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
GRAPHED = ("llava", "vipllava", "aya_vision", "cohere2_vision", "deepseek_vl", "internvl")


@torch.no_grad()
def cut(vlm, questions):
    """Some heads gone, some blocks whole, FFNs factorised."""
    plan = plan_of(vlm)
    plan = plan.model_copy(update={"heads": plan.heads | dropping(vlm, compensate="least-squares").heads})
    apply_(vlm.model, vlm.architecture, plan, statistics_of(vlm, questions))
    return dataclasses.replace(vlm, plan=plan)


@torch.no_grad()
def check(small, inputs, graphs):
    ids, pixel_values = inputs["input_ids"].numpy(), inputs["pixel_values"].numpy()
    logits, _ = graphs.prefill(ids, pixel_values)
    expected = small.model(**inputs).logits[0, -1].numpy()
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()
    known = small.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    answer = graphs.generate(ids, pixel_values, 5)
    assert answer == known[: len(answer)]
    assert len(answer) == 5 or known[len(answer)] == small.processor.tokenizer.eos_token_id


def test_onnx_runtime_answers_as_pytorch_does(vlm, questions, tmp_path):
    inputs = inputs_of(vlm, questions)
    plain = set(inputs) == {"input_ids", "attention_mask", "pixel_values"} and vlm.architecture.family.model_type in GRAPHED
    if not plain or getattr(vlm.model.config.get_text_config(), "sliding_window", None):
        with pytest.raises(UnsupportedModelError, match="can't be written as graphs"):
            export_graphs(vlm, tmp_path / "graphs")
        assert not (tmp_path / "graphs").exists()
        return
    small = cut(vlm, questions)
    graphs = Graphs(export_graphs(small, tmp_path / "graphs"))
    check(small, inputs, graphs)
    prompt = small.encoder.prompt("what colour is the circle ?")
    for size in ((30, 30), (20, 50), (50, 20)):  # processors that cut images into tiles make other numbers of them
        check(small, small.encoder.inputs([prompt], [Image.effect_noise(size, 80).convert("RGB")]), graphs)


def test_openvino_reads_both_formats(gqa_vlm, questions, tmp_path):
    pytest.importorskip("openvino")
    inputs, small = inputs_of(gqa_vlm, questions), cut(gqa_vlm, questions)
    for to in ("onnx", "openvino"):
        check(small, inputs, Graphs(export_graphs(small, tmp_path / to, to), "openvino"))
    assert not list((tmp_path / "openvino").glob("*.onnx*"))
    with pytest.raises(CheckpointError, match=r"no vision\.onnx"):
        Graphs(tmp_path / "openvino", "onnxruntime")


def test_dynamic_rotary_embeddings_are_those_of_contexts_that_the_model_knows(questions, tmp_path):
    def config():
        found = TINY[1].config()
        text = found.text_config
        text.max_position_embeddings, text.rope_parameters = 40, text.rope_parameters | {"rope_type": "dynamic", "factor": 2.0}
        return found

    vlm = build(dataclasses.replace(TINY[1], config=config))
    inputs = inputs_of(vlm, questions)
    long = inputs | {"input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:].repeat(1, 60)], 1)}
    long["attention_mask"] = torch.ones_like(long["input_ids"])
    vlm.model(**long)  # leaves other frequencies behind
    graphs = Graphs(export_graphs(vlm, tmp_path / "graphs"))
    check(vlm, inputs, graphs)
    with pytest.raises(InfoPruneError, match="at most 40 tokens"):
        graphs.prefill(long["input_ids"].numpy(), inputs["pixel_values"].numpy())


def test_what_pytorch_can_not_write_is_one_message(gqa_vlm, tmp_path, monkeypatch):
    def failing(*args, **options):
        raise torch.onnx.OnnxExporterError("no such operator\nand pages of graphs")

    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(UnsupportedModelError, match=r"can't write this model's vision as a graph \(no such operator\)"):
        export_graphs(gqa_vlm, tmp_path / "graphs")
    assert not any(tmp_path.glob("*graphs*"))


def test_graphs_need_a_place_for_every_image_token(gqa_vlm, questions, tmp_path):
    inputs = inputs_of(gqa_vlm, questions)
    graphs = Graphs(export_graphs(gqa_vlm, tmp_path / "graphs"))
    with pytest.raises(infoprune.InfoPruneError, match="image tokens"):
        graphs.prefill(inputs["input_ids"].numpy()[:, 1:], inputs["pixel_values"].numpy())
