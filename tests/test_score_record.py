"""Scores on disk: an interrupted run of teacher-forced scoring goes on where it was, and ends as an undisturbed one."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from infoprune.data import Example
from infoprune.errors import DataError
from infoprune.evaluation import quality
from infoprune.evaluation.generation import generate_answers
from infoprune.evaluation.quality import score
from infoprune.evaluation.record import RecordFile, fingerprint
from test_cli import run
from tiny_models import TINY, build, examples


def equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.scores, other.scores) and one.answers == other.answers
        assert (one.kl is None) == (other.kl is None)
        if one.kl is not None:
            assert one.kl.dtype == other.kl.dtype and np.array_equal(one.kl, other.kl)
            assert np.array_equal(one.token_question, other.token_question)
    return True


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two models, questions, what scoring finds, the final file of an undisturbed run, and the part that it leaves before the end."""
    folder = tmp_path_factory.mktemp("recorded")
    models, questions = [build(TINY[1]), build(TINY[1], seed=3)], examples(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quality, "IMAGES_PER_BATCH", 1)
        expected = score(models, questions, record=folder / "whole.jsonl")
        patched.setattr(RecordFile, "finish", lambda self, found: None)
        score(models, questions, record=folder / "part.jsonl")
    return models, questions, expected, (folder / "whole.jsonl").read_bytes(), (folder / "part.jsonl.0.part").read_bytes()


def test_images_of_equal_size_are_told_apart(tmp_path):
    image = tmp_path / "a.bmp"
    asked = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(image)
        os.utime(image, ns=(0, len(asked)))
        asked.append(fingerprint(build(TINY[1]), [Example(image, "what ?", "red")])["data"])
    assert asked[0] != asked[1]


def test_a_record_holds_what_was_found(recorded, tmp_path):
    models, questions, expected, whole, part = recorded
    assert equal(score(models, questions), expected)
    header, *lines = map(json.loads, whole.decode().splitlines())
    assert header["format"] == "infoprune-scores-1" and len(header["against"]) == 1 and header["num_questions"] == len(questions)
    assert [line["index"] for line in lines] == list(range(len(questions)))
    assert [line["scored"][1]["right"] for line in lines] == list(expected[1].scores)
    assert np.array_equal(np.float32([kl for line in lines for kl in line["scored"][1]["kl"]]), expected[1].kl)
    assert all("kl" not in line["scored"][0] for line in lines)
    assert sorted(part.splitlines()) == sorted(whole.splitlines())
    record = tmp_path / "scores.jsonl"
    record.write_bytes(whole)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quality, "answer_logits", None)  # a finished file is read
        assert equal(score(models, questions, record=record), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_crash_at_any_byte_leaves_nothing_wrong(recorded, tmp_path, monkeypatch, data):
    models, questions, expected, whole, part = recorded
    monkeypatch.setattr(quality, "IMAGES_PER_BATCH", 1)
    record, first = tmp_path / "scores.jsonl", part.index(b"\n") + 1
    cut = data.draw(st.integers(0, len(part)), "cut")
    garbage = data.draw(st.sampled_from([b"", b"\0\0", b'{"index": 1, "scored": [{}]}\n', b'{"index": 1, "scored": 3}\n', b"null\n"]))
    record.with_name("scores.jsonl.0.part").write_bytes(part[:cut] + (garbage if cut >= first else b""))
    assert equal(score(models, questions, record=record), expected)
    assert record.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
    record.unlink()


def test_only_what_is_left_is_scored(recorded, tmp_path, monkeypatch):
    models, questions, expected, whole, _ = recorded
    monkeypatch.setattr(quality, "IMAGES_PER_BATCH", 1)
    record, scored, real = tmp_path / "scores.jsonl", [], quality._score_batch

    def stopping(models, batch):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(batch.num_questions)
        return real(models, batch)

    monkeypatch.setattr(quality, "_score_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        score(models, questions, record=record)
    assert not record.exists() and [path.name for path in tmp_path.iterdir()] == ["scores.jsonl.0.part"]
    monkeypatch.setattr(quality, "_score_batch", lambda *arguments: scored.append(arguments[1].num_questions) or real(*arguments))
    assert equal(score(models, questions, record=record), expected)
    assert sum(scored) == len(questions) and record.read_bytes() == whole


def test_scores_of_something_else_are_refused(recorded, tmp_path):
    models, questions, _, whole, _ = recorded
    record = tmp_path / "scores.jsonl"
    record.write_bytes(whole)
    other = models[1].copy()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[3] += 1e-6
    relabelled = [Example(q.image, q.question, q.answer + " ball", id=q.id) for q in questions]
    for now, asked, differs in (([models[0], other], questions, "model"), ([other, models[1]], questions, "against")):
        with pytest.raises(DataError, match=f"holds scores that differ in {differs}"):
            score(now, asked, record=record)
    with pytest.raises(DataError, match="differ in reference"):
        score(models, relabelled, record=record)
    with pytest.raises(DataError, match="not a file of answers"):
        generate_answers(models[1], questions, record=record)
    record.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"damaged: \d+ of \d+ scores"):
        score(models, questions, record=record)
    assert record.read_bytes() == whole[:-5]


def test_two_runs_do_not_write_one_file(recorded, tmp_path):
    models, questions, expected, _, _ = recorded
    record = tmp_path / "found.jsonl"
    with FileLock(tmp_path / "found.jsonl.0.lock"):
        for begin in (lambda: score(models, questions, record=record), lambda: generate_answers(models[0], questions, record=record)):
            with pytest.raises(DataError, match=r"Another run is writing .*found\.jsonl"):
                begin()
    assert equal(score(models, questions, record=record), expected)  # the lock of a run that is gone is no lock
    assert [path.name for path in tmp_path.iterdir()] == ["found.jsonl"]


def test_the_command_keeps_scores_and_goes_on(checkpoint, jsonl, tmp_path):
    record = tmp_path / "scores.jsonl"
    arguments = ("evaluate", checkpoint, "--against", checkpoint, "--data", jsonl, "--repeats", 0, "--json")
    plain = json.loads(run(*arguments).stdout)
    kept = json.loads(run(*arguments, "--answers", record).stdout)
    whole = record.read_bytes()
    header, *lines = whole.splitlines(keepends=True)
    record.unlink()
    record.with_name("scores.jsonl.0.part").write_bytes(header + b"".join(lines[:5]))
    again = run(*arguments, "--answers", record)
    assert "5 of" in again.stderr and "scored by an interrupted run" in again.stderr
    assert plain["comparison"] == kept["comparison"] == json.loads(again.stdout)["comparison"]
    assert record.read_bytes() == whole
    both = run(*arguments, "--generate", "--answers", tmp_path / "a.jsonl")
    assert {path.name for path in tmp_path.glob("a*")} == {"a.jsonl", "a-against.jsonl", "a-scores.jsonl"}, both.stderr
