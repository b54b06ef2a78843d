from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml


def run(*arguments, status=0):
    done = subprocess.run([sys.executable, "-m", "infoprune", *map(str, arguments)], capture_output=True, text=True)
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
    assert all(text in shown for text in ("dense / compressed", "McNemar", "drop at most, 95%: betting", "same answer"))
    answers = json.loads(run("ask", out, questions[0].image, "what shape ?", "--against", checkpoint, "--json").stdout)["answers"]
    assert [a["model"] for a in answers] == [str(out), str(checkpoint)]
    assert "units" in run("plan", "show", out).stdout
    plan = json.loads(run("plan", "show", out, "--json").stdout)
    assert plan["budget"] == {"flops": 0.7}
    again = tmp_path / "again"
    run("plan", "apply", out / "plan.json", checkpoint, "--data", jsonl, "-o", again)
    assert json.loads((again / "plan.json").read_text()) == plan


def test_certified_compression_and_a_report(checkpoint, jsonl, tmp_path):
    out, page = tmp_path / "small", tmp_path / "report.html"
    refused = run("compress", checkpoint, "--data", jsonl, "--max-drop", 0.5, "-o", out, status=2).stderr
    assert "at least 602 images" in refused
    assert "calibrating" not in refused  # told before any work
    told = run("compress", checkpoint, "--data", jsonl, "--max-drop", 60, "--share", 0.9, "--share", 0.7, "--rank-multiple", 2, "-o", out)
    assert "certifying a drop of at most 60 points" in told.stderr
    assert "With 95% confidence" in told.stdout
    certificate = json.loads((out / "certificate.json").read_text())
    assert [step["share"] for step in certificate["path"]] == [0.9, 0.7]
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
    assert "not empty" in run("compress", checkpoint, "--data", jsonl, "--flops", 0.5, "-o", tmp_path, status=2).stderr
    own = run("compress", checkpoint, "--data", jsonl, "--flops", 0.5, "-o", checkpoint, "--overwrite", status=2).stderr
    assert "never modified" in own
    assert "No data" in run("evaluate", checkpoint, "--data", tmp_path / "none.jsonl", status=2).stderr
    assert "Cannot read the image" in run("ask", checkpoint, tmp_path / "no.png", "what ?", status=2).stderr
    assert "Cannot read the plan" in run("plan", "show", tmp_path / "no.json", status=2).stderr
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x-*"))


def test_interrupt_leaves_nothing(checkpoint, jsonl, tmp_path):
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
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) in (0, 130)  # 0: it was faster than the signal
    if process.returncode == 130:
        assert "Interrupted" in rest
        assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x-*"))
