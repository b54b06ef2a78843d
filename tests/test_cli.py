from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
import yaml
from typer.testing import CliRunner

from infoprune.cli import compress as compress_verb
from infoprune.errors import CheckpointError
from infoprune.plan import CompressionPlan
from tiny_models import teach_


def run(*arguments, status=0, env=None):
    command = [sys.executable, "-m", "infoprune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    assert done.returncode == status, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done


def test_compress_evaluate_ask_and_plan(checkpoint, jsonl, questions, tmp_path):
    out = tmp_path / "small"
    report = json.loads(run("compress", checkpoint, "--data", jsonl, "--flops", 0.7, "--rank-multiple", 2, "-o", out, "--json").stdout)
    assert report["flops_ratio"] <= 0.7
    assert (out / "plan.json").is_file()
    assert (out / "report.json").is_file()
    result = json.loads(run("evaluate", out, "--against", checkpoint, "--data", jsonl, "--repeats", 1, "--json").stdout)
    assert result["comparison"]["flops_ratio"] == pytest.approx(report["flops_ratio"])
    shown = run("evaluate", out, "--against", checkpoint, "--data", jsonl, "--repeats", 1).stdout
    assert all(
        text in shown for text in ("dense / compressed", "McNemar", "right (score > 0.5)", "drop at most, 95%: betting", "same answer")
    )
    answers = json.loads(run("ask", out, questions[0].image, "what shape ?", "--against", checkpoint, "--json").stdout)["answers"]
    assert [a["model"] for a in answers] == [str(out), str(checkpoint)]
    assert "units" in run("plan", "show", out).stdout
    plan = json.loads(run("plan", "show", out, "--json").stdout)
    assert plan["budget"] == {"flops": 0.7}
    again = tmp_path / "again"
    run("plan", "apply", out / "plan.json", checkpoint, "--data", jsonl, "-o", again)
    assert json.loads((again / "plan.json").read_text()) == plan


def test_compress_for_a_speed_up(checkpoint, jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("INFOPRUNE_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(checkpoint), "data": str(jsonl), "flops": 0.7, "rank_multiple": 2, "examples": 6}))
    out = tmp_path / "small"
    done = run("compress", "--recipe", recipe, "--speedup", 1.0005, "-o", out)
    assert "end to end, asked 1.00x" in done.stdout and "times faster, measured" in done.stderr
    assert json.loads((out / "plan.json").read_text())["budget"] == {"speedup": 1.0005}
    assert json.loads((out / "report.json").read_text())["speedup"]["measured"] > 0
    refused = run("compress", "--recipe", recipe, "--speedup", 1000, "-o", tmp_path / "x", status=2).stderr
    assert "the largest speed-up" in refused and "timing this machine" not in refused  # the table was kept
    assert "above 1" in run("compress", "--recipe", recipe, "--speedup", 0.9, "-o", tmp_path / "x", status=2).stderr


def test_neurons_and_layers(checkpoint, jsonl, tmp_path):
    out = tmp_path / "narrow"
    common = ("compress", checkpoint, "--data", jsonl, "--examples", 12, "--rank-multiple", 2)
    report = json.loads(run(*common, "--flops", 0.7, "--ffn", "width", "--neurons", "fluctuation", "-o", out, "--json").stdout)
    assert report["flops_ratio"] <= 0.7
    assert "neurons of" in run("plan", "show", out).stdout
    assert "neurons out of" in (out / "README.md").read_text()
    stock = tmp_path / "stock"
    written = json.loads(run("export", out, "--to", "onnx", "-o", stock, "--json").stdout)
    assert written == {"output": str(stock), "format": "onnx"} and stock.is_dir()
    out = tmp_path / "shallow"
    report = json.loads(run(*common, "--flops", 0.8, "--layers", "block-influence", "-o", out, "--json").stdout)
    assert report["flops_ratio"] <= 0.8
    assert "dropped whole" in run("plan", "show", out).stdout
    refused = run(*common, "--flops", 0.8, "--layers", "block-influence", "--ffn", "width", "-o", tmp_path / "x", status=2).stderr
    assert "leave out heads and ffn" in refused


def test_certified_compression_and_a_report(checkpoint, jsonl, gqa_vlm, questions, tmp_path):
    out, page = tmp_path / "small", tmp_path / "report.html"
    teach_(gqa_vlm, questions)
    gqa_vlm.model.save_pretrained(checkpoint)
    refused = run("compress", checkpoint, "--data", jsonl, "--max-drop", 0.5, "-o", out, status=2).stderr
    assert "at least 602 images" in refused
    assert "calibrating" not in refused  # told before any work
    refused = run("compress", checkpoint, "--data", jsonl, "--max-drop", 60, "--certify-metric", "official", "-o", out, status=2).stderr
    assert "no metric 'official' for own" in refused
    told = run("compress", checkpoint, "--data", jsonl, "--max-drop", 60, "--share", 0.9, "--share", 0.7, "--rank-multiple", 2, "-o", out)
    assert "certifying a drop of at most 60 points" in told.stderr
    assert "With 95% confidence" in told.stdout
    certificate = json.loads((out / "certificate.json").read_text())
    assert [step["share"] for step in certificate["path"]] == [0.9, 0.7]
    assert certificate["metric"] == "exact" and "{question}" in certificate["prompt"]
    assert "With 95% confidence" in (out / "README.md").read_text()
    assert "With 95% confidence" in run("plan", "show", out).stdout
    assert not (tmp_path / "small.work").exists()
    evaluated = run("evaluate", out, "--against", checkpoint, "--data", jsonl, "--repeats", 0, "--report", page, "--json")
    compared = json.loads(evaluated.stdout)["comparison"]
    assert {"betting", "empirical_bernstein", "bootstrap"} == compared["drop_bounds"].keys()
    assert "With 95% confidence" in page.read_text()


def test_inspect(checkpoint, jsonl, tmp_path):
    picture = tmp_path / "heads.png"
    found = json.loads(run("inspect", checkpoint, "--data", jsonl, "--plot", picture, "--json").stdout)
    assert picture.stat().st_size > 10_000
    assert all(len(block["erank"]) == block["num_units"] for block in found["attention"])
    assert run("inspect", checkpoint, "--data", jsonl).stdout.count("mlp") >= 4


def test_families():
    rows = {row["family"]: row for row in json.loads(run("families", "--json").stdout)["families"]}
    assert {"llava", "llava_next", "idefics3"} <= rows.keys() and all(row["available"] for row in rows.values())
    shown = run("families").stdout
    assert all(name in shown for name in rows)


ENDING = """
import atexit, sys, torch
from infoprune.cli import main
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print("in a group:", torch.distributed.is_initialized()))
sys.argv = ["infoprune", "families"]
main()
"""


def test_the_command_leaves_the_group_of_its_launcher():
    """Else Gloo's threads may abort a process whose work is done."""
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "in a group: False" in done.stdout


def test_a_budget_on_the_command_line_takes_the_place_of_a_certificate(checkpoint, jsonl, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"usual: &usual\n  rank_multiple: 2\n<<: *usual\nmodel: {checkpoint}\ndata: {jsonl}\nmax_drop: 1\nconfidence: 0.9\nshares: [0.8]\n"
    )
    assert "unknown keys" in run("compress", "--recipe", recipe, "--flops", 0.7, "-o", tmp_path / "a", status=2).stderr.lower()
    recipe.write_text(recipe.read_text().replace("usual: &usual\n  rank_multiple: 2\n<<: *usual", "<<: {rank_multiple: 2}"))
    run("compress", "--recipe", recipe, "--flops", 0.7, "-o", tmp_path / "a")
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert plan["budget"] == {"flops": 0.7} and "neurons" in plan["method"]
    assert not {"structure", "whitening", "shrinkage"} & set(plan["method"])  # which neurons do not have


def test_recipe(checkpoint, jsonl, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(checkpoint), "data": str(jsonl), "flops": 0.7, "rank_multiple": 2, "heads": "erank-ks",
                                      "output": str(tmp_path / "a")}))  # fmt: skip
    run("compress", "--recipe", recipe)
    run("compress", "--recipe", recipe, "--ks", 0.2, "-o", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "plan.json").read_text())["budget"] == {"ks": 0.2}
    recipe.write_text("flopz: 0.5")
    assert "flopz" in run("compress", "--recipe", recipe, status=2).stderr


def test_errors_are_one_message(checkpoint, jsonl, tmp_path):
    missing = run("compress", tmp_path / "nowhere", "--data", jsonl, "--flops", 0.5, "-o", tmp_path / "x", status=2).stderr
    assert missing.count("error:") == 1
    assert "nowhere" in missing
    assert "smallest share" in run("compress", checkpoint, "--data", jsonl, "--flops", 0.001, "-o", tmp_path / "x", status=2).stderr
    assert "exactly one" in run("compress", checkpoint, "--data", jsonl, "-o", tmp_path / "x", status=2).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    assert "not empty" in run("compress", checkpoint, "--data", jsonl, "--flops", 0.5, "-o", tmp_path / "full", status=2).stderr
    own = run("compress", checkpoint, "--data", jsonl, "--flops", 0.5, "-o", checkpoint, "--overwrite", status=2).stderr
    assert "never modified" in own
    assert "No data" in run("evaluate", checkpoint, "--data", tmp_path / "none.jsonl", status=2).stderr
    assert "Cannot read the image" in run("ask", checkpoint, tmp_path / "no.png", "what ?", status=2).stderr
    assert "Cannot read the plan" in run("plan", "show", tmp_path / "no.json", status=2).stderr
    plot = run("inspect", tmp_path / "nowhere", "--data", jsonl, "--plot", tmp_path / "no" / "x.png", status=2).stderr
    assert "Cannot write the picture" in plot  # told before the model is loaded
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x-*"))
    odd = tmp_path / "odd.json"
    odd.write_text('{"\\u001b]0;owned\\u0007": 1}')
    assert "\x1b" not in run("plan", "show", odd, status=2).stderr
    kept = run("compress", "demo", "--flops", 0.5, "-o", tmp_path / "y", status=2, env={"INFOPRUNE_CACHE": "/proc/nowhere"}).stderr
    assert kept.splitlines()[-1].startswith("error: /proc/nowhere") and "INFOPRUNE_CACHE" in kept


def test_bad_records_are_counted_and_skipped_on_request(checkpoint, jsonl):
    jsonl.write_text(jsonl.read_text() + '\n{"image": "[/gone].png", "question": "what ?", "answer": "red"}\n{"image": 1}\n')
    refused = run("evaluate", checkpoint, "--data", jsonl, "--repeats", 0, status=2).stderr
    assert "18 questions are good. 2 bad records" in refused and "[/gone].png" in refused and "--skip-bad" in refused
    done = run("evaluate", checkpoint, "--data", jsonl, "--repeats", 0, "--skip-bad", "--json")
    assert json.loads(done.stdout)["models"][0]["num_questions"] == 18
    assert "going on with 18 questions. Skipped: 2 bad records" in done.stderr and "[/gone].png" in done.stderr
    assert json.loads(done.stdout)["skipped"] == 2


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_interrupt_leaves_nothing(checkpoint, jsonl, tmp_path, sent):
    import signal
    import time

    process = subprocess.Popen(
        [sys.executable, "-m", "infoprune", "compress", str(checkpoint), "--data", str(jsonl), "--flops", "0.7", "-o", str(tmp_path / "x")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "calibrating" in line:
            break
    time.sleep(0.05)
    process.send_signal(getattr(signal, sent))
    rest = process.stderr.read()
    assert process.wait(timeout=60) in (0, 130)  # 0: it was faster than the signal
    if process.returncode == 130:
        assert "Interrupted" in rest
        assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x-*"))


def test_a_checkpoint_that_cannot_be_saved_leaves_its_plan(checkpoint, jsonl, tmp_path, monkeypatch):
    out, plan = tmp_path / "out", tmp_path / "out.plan.json"
    command = [checkpoint, "--data", jsonl, "--flops", 0.7, "--rank-multiple", 2, "-o", out]
    app = typer.Typer()
    compress_verb.register(app)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        patch.setattr("infoprune.checkpoint.save_processor", no_space)
        result = CliRunner().invoke(app, list(map(str, command)))
    told = str(result.exception)
    assert isinstance(result.exception, CheckpointError) and "disk full" in told and f"infoprune plan apply {plan}" in told
    assert "may not fit" in result.output.replace("\n", " ") and not out.exists()
    run("plan", "apply", plan, checkpoint, "-o", out)
    assert CompressionPlan.read(out).heads == CompressionPlan.read(plan).heads


def no_space(*args):
    raise OSError(28, "No space left on device")


def test_time_left_is_told_where_output_is_a_file(monkeypatch, capsys):
    from infoprune.cli.console import BarProgress

    monkeypatch.setattr(BarProgress, "SECONDS", 1e-9)
    progress = BarProgress()
    with progress.task("answering", 90) as advance:
        advance(30)
        advance(30)
        advance(30)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines() if "min left" in line] == ["30/90", "60/90"]
    with progress.task("training", 75) as advance:
        for _ in range(75):
            progress.status({"loss": 0.5})
            advance(1)
    told = capsys.readouterr().err
    assert told.count("loss 0.5") == 3 and "min left" not in told


def test_a_benchmark_is_judged_by_its_own_metric(checkpoint, questions, tmp_path):
    people = ["red"] * 7 + ["Red.", "blue", "blue"]
    asked = [{"question_id": 10 + n, "image_id": 1, "question": text} for n, text in enumerate(("what colour ?", "what shape ?"))]
    told = [{k: q[k] for k in ("question_id", "image_id")} for q in asked]
    given = [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number, answer in enumerate(people, start=1)]
    told = [q | {"question_type": "what", "answer_type": "other", "multiple_choice_answer": "red", "answers": given} for q in told]
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": told}))
    questions[0].load_image().save(tmp_path / "COCO_val2014_000000000001.jpg")
    data, results = f"vqav2:val@{tmp_path}", tmp_path / "results.json"
    arguments = ("evaluate", checkpoint, "--data", data, "--repeats", 0)
    found = json.loads(run(*arguments, "--generate", "--results", results, "--json").stdout)
    record = found["models"][0]
    assert record["metric"]["metric"] == "vqav2/official" and record["metric"]["breakdown"]["answer_type"]["other"]["count"] == 2
    assert record["accuracy"] == pytest.approx(record["metric"]["overall"], abs=0.01)
    assert "using a single word or phrase" in found["prompt"]
    assert [row["question_id"] for row in json.loads(results.read_text())] == [10, 11]
    few = run(*arguments, "--generate", "--results", results, "--limit", 1).stderr
    assert "Warning: it may be incomplete (questions left out by --limit: 1)" in few
    own = json.loads(run(*arguments, "--generate", "--prompt-suffix", " !", "--metric", "lmms-eval", "--json").stdout)
    assert " !" in own["prompt"] and "single word" not in own["prompt"] and own["models"][0]["metric"]["metric"] == "vqav2/lmms-eval"
    assert "overall" in run(*arguments, "--generate").stdout
    assert "--generate" in run(*arguments, "--metric", "official", status=2).stderr
    assert "no form of result files" in run("evaluate", "nowhere", "--generate", "--results", results, status=2).stderr
    both = json.loads(run(*arguments, "--against", checkpoint, "--generate", "--json").stdout)
    assert both["comparison"]["drop_points"] == 0 and both["comparison"]["agreement"] == 100
    asked.append(asked[0] | {"question_id": 12, "image_id": 2})
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    skipping = run(*arguments, "--generate", "--results", results, "--skip-bad").stderr
    assert "incomplete (bad records skipped: 1); evaluation servers want every question" in skipping
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked[:2]}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    secret = run(*arguments, "--generate", "--results", results)
    assert "nothing is judged" in secret.stderr and not secret.stdout and "incomplete" not in secret.stderr
