from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import infoprune
from conftest import ALL, built
from infoprune.data import Example
from infoprune.errors import DataError, InfoPruneError
from infoprune.evaluation import generation
from infoprune.evaluation.decoding import batched_answers
from infoprune.evaluation.generation import batches, dtype_for, generate_answers
from infoprune.evaluation.metrics import score_answers
from infoprune.evaluation.record import RecordFile, weights_digest
from infoprune.surgery import apply_
from test_families import dropping, statistics_of
from tiny_models import TINY, WORDS, build

FEW: dict[str, Any] = {"max_new_tokens": 6, "images_per_batch": 2}


def one_by_one(vlm, examples, max_new_tokens):
    """What the runner has to be equal to."""
    texts = []
    for example in examples:
        inputs = vlm.encoder.inputs([vlm.encoder.prompt(example.question)], [example.load_image()])
        output = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts += vlm.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def speaking(vlm):
    """A random model that answers in words, and does not say the same word again and again."""
    words = {i for i, word in enumerate(WORDS) if not word.startswith("<") or word == "<eos>"}
    vlm.model.generation_config.suppress_tokens = [i for i in range(64) if i not in words]
    vlm.model.generation_config.repetition_penalty = 1.3
    return vlm


@pytest.fixture
def mixed(questions):
    """Images of several shapes with one to three questions each, not one after the other."""
    for number, size in enumerate([(16, 16), (32, 16), (16, 32), (48, 16), (40, 24), (20, 20)]):
        path = questions[3 * number].image
        with Image.open(path) as image:
            image.resize(size).save(path)
    kept = [example for index, example in enumerate(questions) if index not in (4, 5, 7, 12, 13)]
    return kept[::2] + kept[1::2]


# --- answers -----------------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate_one_by_one(vlm, mixed):
    speaking(vlm)
    expected = one_by_one(vlm, mixed, 6)
    assert generate_answers(vlm, mixed, **FEW) == expected
    assert len(set(expected)) > 2 or vlm.model_id in ("paligemma2", "gemma3", "mllama")  # those hardly look at a question when untrained


def test_answers_do_not_depend_on_the_way_to_them(gqa_vlm, mixed):
    speaking(gqa_vlm)
    expected = one_by_one(gqa_vlm, mixed, 16)
    assert {len(answer.split()) for answer in expected} != {16}  # some end early, and leave their rows
    for images in (1, 3, 50):
        assert generate_answers(gqa_vlm, mixed, images_per_batch=images) == expected
    assert batched_answers(gqa_vlm, mixed, 16) == expected
    gqa_vlm.model.config.get_text_config().sliding_window = 200  # longer than all prompts, but what is no longer shared
    assert generate_answers(gqa_vlm, mixed) == expected


def test_a_compressed_model_without_some_blocks_answers(gqa_vlm, mixed):
    statistics = statistics_of(gqa_vlm, mixed)
    apply_(gqa_vlm.model, gqa_vlm.architecture, dropping(gqa_vlm, compensate="least-squares"), statistics)
    speaking(gqa_vlm)
    assert generate_answers(gqa_vlm, mixed, **FEW) == one_by_one(gqa_vlm, mixed, 6)


@pytest.mark.parametrize("name", ["llava-siglip-qwen2-gqa", "gemma3", "paligemma"])
def test_an_image_passes_the_tower_once(mixed, monkeypatch, name):
    vlm, seen, prepared = built(next(tiny for tiny in ALL if tiny.name == name), monkeypatch), [], []
    preprocess = type(vlm.processor.image_processor).preprocess
    monkeypatch.setattr(
        type(vlm.processor.image_processor), "preprocess", lambda *args, **kw: prepared.append(1) or preprocess(*args, **kw)
    )
    vlm.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len((args or tuple(kwargs.values()))[0])), with_kwargs=True
    )
    generate_answers(vlm, mixed, max_new_tokens=2, images_per_batch=6)
    assert sum(seen) == 6
    if name.startswith("llava"):
        assert len(prepared) == 6 + 1  # once for the prompts of each image, and all of them together for the tower


@pytest.mark.parametrize("name", ["llava-siglip-qwen2-gqa", "gemma3", "qwen2.5-vl"])
def test_half_precision(questions, monkeypatch, name):
    vlm = built(next(tiny for tiny in ALL if tiny.name == name), monkeypatch)
    vlm.model.to(torch.bfloat16)
    answers = generate_answers(vlm, questions[:4], **FEW)
    assert len(answers) == 4
    assert vlm.model.dtype == torch.bfloat16


def test_precision_of_a_device():
    cpu = torch.device("cpu")
    assert dtype_for("auto", cpu) == dtype_for("fp32", cpu) == torch.float32
    assert (dtype_for("bf16", cpu), dtype_for("fp16", cpu)) == (torch.bfloat16, torch.float16)
    with pytest.raises(InfoPruneError, match="choose auto"):
        dtype_for("int4", cpu)


def test_bad_requests_are_refused(gqa_vlm, questions, tmp_path):
    with pytest.raises(DataError, match="no questions"):
        generate_answers(gqa_vlm, [])
    with pytest.raises(InfoPruneError, match="at least one token"):
        generate_answers(gqa_vlm, questions, max_new_tokens=0)
    with pytest.raises(DataError, match="gone"):
        generate_answers(gqa_vlm, [*questions, Example(tmp_path / "gone.png", "what ?", "red")], **FEW)
    with pytest.raises(DataError, match="Cannot write"):
        generate_answers(gqa_vlm, questions[:3], record=questions[0].image / "answers.jsonl", **FEW)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=80), st.integers(1, 4), st.booleans())
def test_batches_hold_every_question_once(asked, images, share):
    examples = [Example(Path(f"{image}.png"), "?" * length, "") for image, length in asked]
    found = batches(examples, images, share_prefix=share)
    assert sorted(index for batch in found for group in batch for index in group) == list(range(len(examples)))
    for batch in found:
        assert all(len({examples[index].image for index in group}) == 1 for group in batch)
        assert len(batch) <= images if share else sum(map(len, batch)) <= 4 * images
        assert max(map(len, batch)) <= generation.QUESTIONS_PER_ROW


# --- the record --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Model, questions, the final file of a run that nothing disturbs, and the part that it leaves before the end."""
    from tiny_models import examples

    folder = tmp_path_factory.mktemp("recorded")
    vlm, questions = speaking(build(TINY[1])), examples(folder)
    questions = [Example(q.image, q.question, q.answer, id=f"ü{number}") for number, q in enumerate(questions)]
    generate_answers(vlm, questions, record=folder / "whole.jsonl", **FEW)
    finish, RecordFile.finish = RecordFile.finish, lambda self, answers: None
    try:
        generate_answers(vlm, questions, record=folder / "part.jsonl", **FEW)
    finally:
        RecordFile.finish = finish
    return vlm, questions, (folder / "whole.jsonl").read_bytes(), (folder / "part.jsonl.0.part").read_bytes()


def test_the_record_says_what_was_asked(recorded):
    vlm, questions, whole, part = recorded
    header, *lines = map(json.loads, whole.decode().splitlines())
    answers = generate_answers(vlm, questions, **FEW)
    assert header["max_new_tokens"] == 6 and header["prompt"] == "<image>{question}" and header["dtype"] == "float32"
    expected = [
        {"index": i, "id": q.id, "image": q.image.name, "question": q.question, "answer": a}
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    assert lines == expected
    assert sorted(part.splitlines()) == sorted(whole.splitlines())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_crash_at_any_byte_leaves_nothing_wrong(recorded, tmp_path, data):
    vlm, questions, whole, part = recorded
    record, first = tmp_path / "answers.jsonl", part.index(b"\n") + 1
    cut = data.draw(st.integers(0, len(part)), "cut")
    other = data.draw(st.integers(0, len(part)), "cut of a second process")
    garbage = data.draw(st.sampled_from([b"", b"\0\0\0", b'{"index": 99, "answer": "x"}\n', b'{"index": 1', b"null\n"]), "garbage")
    record.with_name("answers.jsonl.0.part").write_bytes(part[:cut] + (garbage if cut >= first else b""))
    record.with_name("answers.jsonl.1.part").write_bytes(part[:other])
    generate_answers(vlm, questions, record=record, **FEW)
    assert record.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    record.unlink()


def test_a_resumed_run_asks_only_what_is_left(recorded, tmp_path, monkeypatch):
    vlm, questions, whole, _ = recorded
    record, asked, allowed, real = tmp_path / "answers.jsonl", [], [1], generation.packed_answers

    def stopping(vlm, groups, max_new_tokens):
        if len(asked) == allowed[0]:
            raise KeyboardInterrupt
        asked.append(sum(map(len, groups)))
        return real(vlm, groups, max_new_tokens)

    monkeypatch.setattr(generation, "packed_answers", stopping)
    for allowed[0] in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            generate_answers(vlm, questions, record=record, **FEW)
        assert not record.exists()
    monkeypatch.setattr(generation, "packed_answers", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(InfoPruneError, match="Lower images_per_batch"):
        generate_answers(vlm, questions, record=record, **FEW)
    monkeypatch.setattr(generation, "packed_answers", stopping)
    allowed[0] = 99
    generate_answers(vlm, questions, record=record, **FEW)
    assert sum(asked) == len(questions) and record.read_bytes() == whole
    assert len(generate_answers(vlm, questions, record=record, **FEW)) == len(questions)  # a finished file is read
    assert sum(asked) == len(questions)


def test_a_file_of_something_else_is_refused(recorded, tmp_path, monkeypatch):
    vlm, questions, whole, part = recorded
    record = tmp_path / "answers.jsonl"
    other = vlm.copy()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[3] += 1e-6
    relabelled = [Example(q.image, q.question + " ?", q.answer, id=q.id) for q in questions]
    for name, content in (("answers.jsonl", whole), ("answers.jsonl.0.part", part), ("answers.jsonl.3.part", part)):
        file = tmp_path / name
        file.write_bytes(content)
        longer = FEW | {"max_new_tokens": 7}
        changes = ((other, questions, FEW, "model"), (vlm, relabelled, FEW, "data"), (vlm, questions, longer, "max_new_tokens"))
        for model, asked, options, differs in changes:
            with pytest.raises(DataError, match=f"differ in {differs}"):
                generate_answers(model, asked, record=record, **options)
        assert [file] == list(tmp_path.iterdir()) and file.read_bytes() == content
        for strange in (b'{"image": "a.png", "question": "?"}\n', b"notes", b"\x89PNG\n\xff"):
            file.write_bytes(strange)
            with pytest.raises(DataError, match="not a file of answers"):
                generate_answers(vlm, questions, record=record, **FEW)
            assert file.read_bytes() == strange
        file.unlink()
    for damaged in (whole[:-5], whole + b"{}", whole[: whole.rindex(b"\n", 0, -1) + 1]):
        record.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            generate_answers(vlm, questions, record=record, **FEW)
    record.unlink()
    record.mkdir()
    with pytest.raises(DataError, match="Cannot read"):
        generate_answers(vlm, questions, record=record, **FEW)


def test_the_digest_is_that_of_the_weights(gqa_vlm):
    digest = weights_digest(gqa_vlm.model)
    assert digest == weights_digest(gqa_vlm.copy().model)
    assert digest != weights_digest(gqa_vlm.copy().model.to(torch.bfloat16))
    with torch.no_grad():
        gqa_vlm.model.lm_head.weight[-1, -1] += 1e-6
    assert digest != weights_digest(gqa_vlm.model)


# --- processes ---------------------------------------------------------------------------------------------------------------------

# Not "accelerate launch --cpu --num_processes 2", which starts one process.
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

KILLED = """
import os, signal, sys
import infoprune
from infoprune.evaluation import generation
real, calls = generation.packed_answers, []
def killing(*args):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
generation.packed_answers = killing
generation.generate_answers(infoprune.load(sys.argv[1]), infoprune.load_examples(sys.argv[2]), record=sys.argv[3], images_per_batch=2)
"""


def test_killed_shared_and_alone(checkpoint, jsonl, tmp_path):
    """A run that is killed and goes on in two processes leaves the file of one process that nothing disturbs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    examples = infoprune.load_examples(str(jsonl))
    answers = generate_answers(infoprune.load(checkpoint), examples, record=alone, images_per_batch=2)
    killed = subprocess.run([sys.executable, "-c", KILLED, checkpoint, jsonl, shared], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert len((tmp_path / "shared.jsonl.0.part").read_text().splitlines()) == 7 and not shared.exists()
    command = [*TWO_PROCESSES, "-m", "infoprune", "evaluate", checkpoint, "--data", jsonl, "--generate", "--answers", shared]
    command += ["--images-per-batch", "2", "--repeats", "0", "--json"]
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("6 of 18 questions were answered by an interrupted run") == 1  # one process speaks
    assert alone.read_bytes() == shared.read_bytes()
    result = json.loads(done.stdout)
    assert result["models"][0]["accuracy"] == score_answers(answers, examples, "exact").overall
    assert (result["answers"], result["prompt"]) == ("generated", "<image>what colour is the circle ?")
    assert not list(tmp_path.glob("*.part*"))


def test_scoring_is_told_by_one_process(checkpoint, jsonl, tmp_path):
    page = tmp_path / "report.html"
    command = [*TWO_PROCESSES, "-m", "infoprune", "evaluate", checkpoint, "--data", jsonl, "--against", checkpoint]
    command += ["--repeats", "0", "--report", page, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["models"][0]["num_questions"] == 18  # one document
    assert done.stderr.count("evaluating (18)") == 1 and page.exists()


def test_the_command_keeps_the_answers_of_both_models(checkpoint, jsonl, tmp_path, capsys):
    from infoprune.cli.evaluate import evaluate

    record = tmp_path / "kept" / "answers.jsonl"
    evaluate(str(checkpoint), data=str(jsonl), against=str(checkpoint), generate=True, answers=record, repeats=0)
    told = capsys.readouterr().out
    assert "answers generated in float32, exact match; prompt: '<image>what colour is the circle ?'" in " ".join(told.split())
    assert record.with_name("answers-against.jsonl").read_bytes() == record.read_bytes()


def test_the_command_says_what_does_not_go_together():
    from infoprune.cli.evaluate import evaluate

    with pytest.raises(InfoPruneError, match="add --generate"):
        evaluate("demo", max_new_tokens=4)
    with pytest.raises(InfoPruneError, match="no precision"):
        evaluate("demo", generate=True, precision="int4")
