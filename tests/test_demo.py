"""The demo model and the README, as a new user meets them. Needs a package index on a cold cache."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import infoprune
from infoprune.demo import sources
from infoprune.demo.assemble import ensure_demo
from infoprune.errors import InfoPruneError
from infoprune.evaluation.generation import generate_answers
from infoprune.evaluation.quality import score

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_demo_answers_through_plain_transformers():
    folder = ensure_demo()
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    examples = infoprune.load_examples("easy-vqa:test")[:40]
    right = 0
    for example in examples:
        content = [{"type": "image"}, {"type": "text", "text": example.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        inputs = processor(text=prompt, images=example.load_image(), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8)
        right += processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == example.answer
    assert right >= 37


@pytest.mark.slow
def test_scoring_agrees_with_generate_on_the_demo():
    vlm = infoprune.load("demo")
    examples = infoprune.load_examples("easy-vqa:test")[-60:]
    generated = [a == e.answer for a, e in zip(generate_answers(vlm, examples), examples, strict=True)]
    assert generated == score([vlm], examples)[0].correct.tolist()


@pytest.mark.slow
def test_readme_python_runs(tmp_path):
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "small" / "model.safetensors").is_file()
    examples = infoprune.load_examples("easy-vqa:test")[:150]
    dense, small = score([infoprune.load("demo"), infoprune.load(tmp_path / "small")], examples)
    assert small.accuracy > dense.accuracy - 8


def test_readme_commands_exist():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("infoprune ")]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line, comments=True)
        verb = words[1:3] if words[1] == "plan" else words[1:2]
        text = subprocess.run([sys.executable, "-m", "infoprune", *verb, "--help"], capture_output=True, text=True).stdout
        for option in (word for word in words if word.startswith("-")):
            assert option in text, f"{' '.join(verb)} has no {option}"


def test_readme_recipe_is_valid(tmp_path):
    from infoprune.cli.recipe import read_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(blocks("yaml")[0])
    assert read_recipe(path)["flops"] == 0.5


def test_a_wheel_with_another_digest_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("INFOPRUNE_CACHE", str(tmp_path))
    wheel = tmp_path / "easy_vqa-1.0-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    monkeypatch.setattr(sources, "_download", lambda source, directory: wheel)
    with pytest.raises(InfoPruneError, match="sha256"):
        sources.fetch(sources.EASY_VQA)
    assert not list((tmp_path / "wheels").iterdir())


def test_what_reads_the_demo_models_parts_is_asked_for_before_they_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("INFOPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(InfoPruneError, match=r"onnx, which is not installed: pip install onnx, or .*\[demo\]"):
        sources.fetch(sources.VISION)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("INFOPRUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    source = sources.WheelSource("infoprune-no-such-wheel==1.0", "0" * 64, "x", 1, "none")
    with pytest.raises(InfoPruneError, match="Could not download"):
        sources.fetch(source)
