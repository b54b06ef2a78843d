"""Questions that a model can't take are found before the work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

import infoprune
from conftest import ALL
from infoprune import fitting as module
from infoprune.data import Loaded
from infoprune.errors import DataError
from infoprune.fitting import fitting
from tiny_models import build


def tiny(name):
    return build(next(tiny for tiny in ALL if tiny.name == name))


def with_image(tmp_path, example, size):
    path = tmp_path / f"{size[0]}x{size[1]}.png"
    Image.new("RGB", size, "red").save(path)
    return replace(example, image=path)


def test_images_that_are_too_thin(questions, tmp_path):
    encoder = tiny("qwen2-vl").encoder
    thin = [with_image(tmp_path, questions[0], size) for size in ((2, 900), (900, 2))]  # smart_resize takes 200 times as long as wide
    wide = with_image(tmp_path, questions[0], (900, 30))
    loaded = Loaded([*questions, *thin, wide], 3)
    with pytest.raises(DataError, match=r"some data can't be used.* 2 bad records:\s+2 x question that the model can't take: 2x900"):
        fitting(encoder, loaded, "some data")
    said = []
    found = fitting(encoder, loaded, "some data", skip_bad=True, notify=said.append)
    assert found == Loaded([*questions, wide], 5) and "900x2.png" in said[0]
    assert fitting(encoder, Loaded(questions, 0), "some data") == Loaded(questions, 0)
    with pytest.raises(DataError, match="no usable question"):
        fitting(encoder, Loaded(thin, 0), "some data", skip_bad=True)


def test_texts_that_are_too_long(questions):
    encoder = tiny("instructblip-llama").encoder
    long = replace(questions[0], question="what shape ? " * 400)
    found = fitting(encoder, Loaded([questions[1], long, *questions[2:]], 0), "some data", skip_bad=True)
    assert found == Loaded(questions[1:], 1)


def test_where_all_are_refused_it_does_not_go_on_for_ever(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    thin = with_image(tmp_path, questions[0], (2, 900))
    with pytest.raises(DataError, match="more than 2 questions"):
        fitting(tiny("qwen2-vl").encoder, Loaded([thin] * 3, 0), "some data", skip_bad=True)


def test_what_is_loaded_for_a_model_is_checked(questions, jsonl, tmp_path):
    vlm = tiny("instructblip-llama")
    with jsonl.open("a") as file:
        record = {"image": questions[0].image.name, "question": "what shape ? " * 400, "answer": "red"}
        file.write("\n" + json.dumps(record))
    with pytest.raises(DataError, match="question that the model can't take"):
        infoprune.compress(vlm, str(jsonl), flops=0.7, rank_multiple=2)
    assert infoprune.compress(vlm, str(jsonl), flops=0.7, rank_multiple=2, skip_bad=True).flops_ratio <= 0.7
