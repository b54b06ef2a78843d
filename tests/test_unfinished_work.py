"""What training refuses before it starts, and what it keeps and trusts of a run that was interrupted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import infoprune
from infoprune.errors import BudgetError, CheckpointError, DataError, InfoPruneError
from infoprune.progress import Progress
from infoprune.report.model_card import model_card
from infoprune.training import loop
from infoprune.training.state import WorkFolder, load_state, save_state
from test_training import QUICK
from tiny_models import TINY, build

QUICK = QUICK | {"recovery": "full"}


class Notes(Progress):
    """Keeps what people are told."""

    def __init__(self):
        self.told = []

    def note(self, message):
        self.told.append(message)


@pytest.fixture
def interrupted(gqa_vlm, questions, tmp_path, monkeypatch):
    """The work folder of a run that was stopped in its recovery."""
    real = loop._update

    def stopping(stage, *arguments):
        if stage.name == "recovery" and arguments[3] == 3:
            raise KeyboardInterrupt
        return real(stage, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_update", stopping)
        with pytest.raises(KeyboardInterrupt):
            infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **QUICK)
    assert (tmp_path / "work" / "recovery.safetensors").is_file()
    return tmp_path / "work"


def test_work_on_other_weights_or_images_is_not_gone_on_with(gqa_vlm, questions, interrupted):
    other = build(TINY[1], seed=5)
    with pytest.raises(CheckpointError, match=r"other settings \(weights\)"):
        infoprune.compress(replace(other, model_id=gqa_vlm.model_id), questions, work=interrupted, **QUICK)
    Image.new("RGB", (40, 30), (255, 0, 0)).save(questions[0].image)
    with pytest.raises(CheckpointError, match=r"other settings \(images\)"):
        infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK)


def test_recovery_starts_anew_with_other_settings_of_its_own(gqa_vlm, questions, interrupted):
    """As the message after a divergence asks for; neither the gates nor the cut are lost."""
    cut, gates = interrupted / "cut" / "model.safetensors", interrupted / "gates.safetensors"
    before, notes = (cut.stat().st_mtime_ns, gates.stat().st_mtime_ns), Notes()
    changed = QUICK | {"recovery_rate": 1e-4, "patience": 3, "precision": "bf16", "checkpoint_every": 3}
    result = infoprune.compress(gqa_vlm, questions, work=interrupted, **changed, progress=notes)
    assert (cut.stat().st_mtime_ns, gates.stat().st_mtime_ns) == before
    assert any("(patience, precision, recovery_rate): recovery starts anew" in told for told in notes.told)
    history = result.training["recovery"]["history"]
    assert len(history) == QUICK["recovery_steps"] and result.trained_with["options"]["recovery_rate"] == 1e-4
    again = infoprune.compress(gqa_vlm, questions, work=interrupted, **changed).training["recovery"]["history"]
    assert again == history  # finished work, which nothing starts anew


@pytest.mark.parametrize("changed", [{"rate_weight": 0.5}, {"rank_multiple": 4}])
def test_what_gates_or_the_cut_read_may_not_change(gqa_vlm, questions, interrupted, changed):
    with pytest.raises(CheckpointError, match=rf"other settings \({next(iter(changed))}\)"):
        infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK | changed)
    assert (interrupted / "recovery.safetensors").is_file()


def test_what_both_stages_read_may_change_behind_the_cut_alone(gqa_vlm, questions, interrupted):
    shutil.rmtree(interrupted / "cut")
    with pytest.raises(CheckpointError, match=r"other settings \(precision\)"):
        infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK | {"precision": "bf16"})


def test_a_run_at_work_is_not_robbed_of_its_state(gqa_vlm, questions, interrupted):
    with WorkFolder(interrupted).held(), pytest.raises(CheckpointError, match="Another run is at work"):
        infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK | {"recovery_rate": 1e-4})
    assert (interrupted / "recovery.safetensors").is_file()


def test_one_of_several_processes_saves_what_was_resumed(gqa_vlm, questions, interrupted, monkeypatch):
    monkeypatch.setattr(loop.Processes, "index", property(lambda self: 1))
    assert not infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK).main_process


def test_a_damaged_cut_is_told_apart_from_the_model(gqa_vlm, questions, interrupted):
    report = interrupted / "cut" / "report.json"
    held = report.read_text()
    report.write_text("{")
    with pytest.raises(CheckpointError, match=r"cut model of an interrupted run is damaged .* Delete .*cut to cut again"):
        infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK)
    report.write_text(held)
    weights = interrupted / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"Delete .*cut to cut again"):
        infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK)
    shutil.rmtree(interrupted / "cut")
    result = infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK)
    assert result.training["recovery"]["steps"] == QUICK["recovery_steps"]


def test_a_folder_that_is_no_work_is_left_alone(gqa_vlm, questions, interrupted, tmp_path):
    (interrupted / "work.json").unlink()  # as a removal that was interrupted might leave it
    with pytest.raises(CheckpointError, match=r"not the work\.json"):
        infoprune.compress(gqa_vlm, questions, work=interrupted, **QUICK | {"flops": 0.9})
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="Move them away"):
        WorkFolder(own).claim({})
    assert [entry.name for entry in own.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match=r"can't be kept in .*thesis\.tex"):
        WorkFolder(own / "thesis.tex").claim({})


@pytest.mark.skipif(os.name == "nt", reason="no such permissions")
def test_a_folder_that_cannot_be_written_to_is_told_at_once(tmp_path, monkeypatch):
    folder = WorkFolder(tmp_path / "work")
    folder.claim({"a": 1})

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(CheckpointError, match=r"can't be kept in .*work: Permission denied"):
        folder.claim({"a": 1})


def test_a_removed_folder_leaves_nothing_to_go_on_from(tmp_path, monkeypatch):
    folder = WorkFolder(tmp_path / "work")
    folder.claim({})
    (folder.path / "cut").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed at the first file
    folder.discard()
    assert not folder.path.exists()
    folder.discard()


def test_training_says_what_it_lacks_before_it_starts(gqa_vlm, questions, monkeypatch):
    started = []
    monkeypatch.setattr(sys.modules["infoprune.compress"], "_cut_free", lambda *_: started.append(True))
    half = gqa_vlm.copy()
    half.model.to(torch.bfloat16)
    with pytest.raises(InfoPruneError, match="float32, not bfloat16"):
        infoprune.compress(half, questions, **QUICK)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    for options in ({"recovery": "lora"}, {"gate_lora": 2}):
        with pytest.raises(InfoPruneError, match="needs peft"):
            infoprune.compress(gqa_vlm, questions, **QUICK | options)
    assert not started


def test_a_budget_out_of_reach_is_told_before_gates_train(gqa_vlm, questions, monkeypatch):
    monkeypatch.setattr(loop, "_update", lambda *_: pytest.fail("trained"))
    with pytest.raises(BudgetError, match="smallest share"):
        infoprune.compress(gqa_vlm, questions, **QUICK | {"attention_share": 1.0, "flops": 0.5, "ffn": "none"})


def test_a_budget_that_is_not_used_is_told(gqa_vlm, questions):
    notes = Notes()
    result = infoprune.compress(gqa_vlm, questions, progress=notes, **QUICK | {"attention_share": 0.3, "flops": 0.95, "recovery": "none"})
    assert result.flops_ratio < 0.9
    assert any(f"{result.flops_ratio:.3f} of the FLOPs remain where 0.95 might" in told for told in notes.told)


def test_validation_on_training_images_is_left_out_of_training_and_told(gqa_vlm, questions, jsonl, tmp_path, monkeypatch):
    copies = tmp_path / "copies"
    copies.mkdir()
    lines = jsonl.read_text().splitlines()
    for example in questions:
        shutil.copy(example.image, copies / f"copy-of-{example.image.name}")
    (copies / "all.jsonl").write_text("\n".join(line.replace('"image": "', '"image": "copy-of-') for line in lines))
    (copies / "some.jsonl").write_text("\n".join(line.replace('"image": "', '"image": "copy-of-') for line in lines[:3]))
    with pytest.raises(DataError, match="All training images are in"):
        infoprune.compress(gqa_vlm, questions, **QUICK | {"validation": str(copies / "all.jsonl")})
    notes = Notes()
    result = infoprune.compress(gqa_vlm, questions, progress=notes, **QUICK | {"validation": str(copies / "some.jsonl")})
    told = [note for note in notes.told if "validation data" in note]
    left = {example.image for example in questions[:3]}
    count = sum(example.image in left for example in questions)
    assert told == [f"left out {count} questions on {len(left)} training images that are in the validation data"]
    assert result.trained_with["questions"] == len(questions) - count
    assert result.as_dict()["trained_with"]["options"]["recovery_steps"] == QUICK["recovery_steps"]
    card = model_card(result.vlm.plan, result.as_dict())
    assert "* recovery, full: 6 steps over" in card and "* heads: 8 steps over" in card
    assert f"* validated on {result.trained_with['validation']['questions']} questions" in card


def test_without_training_one_of_several_processes_does_it_all(checkpoint, jsonl, tmp_path):
    command = ["-m", "infoprune", "compress", str(checkpoint), "--data", str(jsonl), "--flops", "0.7", "-o", str(tmp_path / "small")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 0 and not done.stdout
    assert not (tmp_path / "small").exists()


def test_two_runs_do_not_share_a_folder(gqa_vlm, questions, tmp_path):
    work = tmp_path / "work"
    holder = """
import sys, time
from pathlib import Path
from infoprune.training.state import WorkFolder, load_state, save_state
folder = WorkFolder(Path(sys.argv[1]))
folder.path.mkdir()
with folder.held():
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", holder, str(work)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="Another run is at work"):
            infoprune.compress(gqa_vlm, questions, work=work, **QUICK)
        other.kill()  # as a crash would: the lock goes with the process
    result = infoprune.compress(gqa_vlm, questions, work=work, **QUICK)
    assert result.training["recovery"]["steps"] == QUICK["recovery_steps"]
    with WorkFolder(work).held():  # nor does a run that has ended hold it
        pass


def test_a_bit_that_is_another_is_noticed(tmp_path):
    file = tmp_path / "gates.safetensors"
    tensors = {"half": torch.randn(4, 3).to(torch.bfloat16), "none": torch.empty(0), "step": torch.tensor(3)}
    save_state(file, tensors, {"step": 2})
    found, meta = load_state(file) or ({}, {})
    assert meta == {"step": 2} and all(torch.equal(found[name], value) for name, value in tensors.items())
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(file)
