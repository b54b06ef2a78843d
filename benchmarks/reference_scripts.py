"""Our metrics beside the scripts that they follow, run as they are, on the sets that ``fuzz.py`` generates.

    git clone https://github.com/GT-Vision-Lab/VQA; git clone https://github.com/facebookresearch/mmf
    pip install --no-deps lmms-eval loguru
    python benchmarks/reference_scripts.py [--vqa VQA] [--python2 python2.7] [--mmf mmf] [--gqa eval.py] [--sets 100000]

VQA's script is Python 2 and runs in one. GQA's ``eval.py`` comes with its data (gqadataset.org) and prints figures alone, not scores. Of
lmms-eval, files are loaded one by one: importing the package needs all that its hundreds of tasks do. What is not named is left out. Scores
and figures must be equal, not close; so must lmms-eval's prompts of VQAv2 and TextVQA, with and without words read in the image.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import re
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from common import log, write
from fuzz import BATCH, SEED, generated, phrase
from infoprune.data import Example
from infoprune.data.textvqa import TEXTVQA
from infoprune.data.vqav2 import VQAV2
from infoprune.evaluation.metrics import score_answers

TOGETHER = 20  # batches of fuzz.py that one process of another Python, or one run of GQA's script, is given
UTILS = "lmms_eval.tasks._task_utils"
PYTHON2 = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from vqaEvaluation.vqaEval import VQAEval
class Known(object):
    def __init__(self, qa):
        self.qa = qa
    def getQuesIds(self):
        return sorted(self.qa)
class Exact(VQAEval):
    def setEvalQA(self, number, accuracy):
        self.exact.append(accuracy)
said, sys.stdout = sys.stdout, open(os.devnull, "w")
found = []
for sets in json.load(sys.stdin):
    asked = [{"answers": [{"answer": a, "answer_id": i} for i, a in enumerate(s["answers"])], "question_type": "", "answer_type": s["type"]}
             for s in sets]
    judge = Exact(Known(dict(enumerate(asked))), Known(dict((i, {"answer": s["prediction"]}) for i, s in enumerate(sets))))
    judge.exact = []
    judge.evaluate()
    found.append({"scores": judge.exact, "figures": dict(judge.accuracy["perAnswerType"], overall=judge.accuracy["overall"])})
json.dump(found, said)
"""
Batch = tuple[list[str], list[Example]]
Found = tuple[list[float] | None, dict[str, float]]  # of each question, where told, and figures over all


def vqa(folder: Path, python: str) -> Callable[[list[Batch]], list[Found]]:
    """VQA's script, in its own Python."""

    def run(batches: list[Batch]) -> list[Found]:
        sets = [
            [{"prediction": p, "answers": e.answers, "type": e.kinds["answer_type"]} for p, e in zip(*batch, strict=True)]
            for batch in batches
        ]
        command = [python, "-c", PYTHON2, str(folder / "PythonEvaluationTools")]
        done = subprocess.run(command, input=json.dumps(sets).encode(), capture_output=True, check=True)
        return [(found["scores"], found["figures"]) for found in json.loads(done.stdout)]

    return run


def mmf(folder: Path) -> Callable[[list[Batch]], list[Found]]:
    """TextVQA's evaluator, which takes ten answers."""
    judge = loaded(folder / "mmf" / "utils" / "m4c_evaluators.py", "m4c_evaluators").TextVQAAccuracyEvaluator()

    def run(batches: list[Batch]) -> list[Found]:
        each = [[judge.eval_pred_list([{"pred_answer": p, "gt_answers": e.answers}]) for p, e in zip(*b, strict=True)] for b in batches]
        return [(scores, {}) for scores in each]

    return run


def gqa(script: Path) -> Callable[[list[Batch]], list[Found]]:
    """GQA's script on files as its site ships them."""

    def run(batches: list[Batch]) -> list[Found]:
        return [(None, figures(predictions, examples)) for predictions, examples in batches]

    def figures(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        questions = {
            e.id: {"isBalanced": "balanced" not in e.kinds, "answer": e.answer, "question": e.question, "semantic": [],
                   "types": {name: e.kinds[name] for name in ("structural", "semantic", "detailed")}, "entailed": e.extras["entailed"],
                   "groups": {"global": next(iter(e.extras.get("group", ())), None)}}
            for e in examples
        }  # fmt: skip
        files = {
            "questions": questions,
            "choices": {e.id: {"valid": e.extras["valid"], "plausible": e.extras["plausible"]} for e in examples},
            "predictions": [{"questionId": e.id, "prediction": p} for p, e in zip(predictions, examples, strict=True)],
        }
        with tempfile.TemporaryDirectory() as folder:
            options = ["--consistency"]
            for name, content in files.items():
                (Path(folder) / f"{name}.json").write_text(json.dumps(content))
                options += [f"--{name}", f"{folder}/{name}.json"]
            done = subprocess.run([sys.executable, str(script.resolve()), *options], cwd=folder, capture_output=True, text=True, check=True)
        return dict(printed(done.stdout))

    return run


def printed(text: str) -> Iterator[tuple[str, float]]:
    """Figures of GQA's script by the names that ours have."""
    title = ""
    for line in text.splitlines():
        if found := re.fullmatch(r"Accuracy / (.+):", line):
            title = found[1]
        elif found := re.match(r"( *)([\w ]+): (-?[\d.]+)(%| \(lower)", line):
            name = found[2] if found[1] else found[2].lower()
            if not found[1] or title in ("structural type", "semantic type"):
                yield "overall" if name == "accuracy" else name, float(found[3])


def lmms_eval(metric: str, script: SimpleNamespace) -> Callable[[list[Batch]], list[Found]]:
    """A task of lmms-eval; answers reach it without white space at their ends."""

    def score(answer: str, e: Example) -> float:
        if metric == "gqa":
            options = {"ignore_case": True, "ignore_punctuation": True}
            return float(script.exact_match(predictions=[answer], references=[e.answer], **options)["exact_match"])
        if metric == "vqav2":
            people: list[Any] = [{"answer": text, "answer_id": number} for number, text in enumerate(e.answers, start=1)]
            return script.vqav2.vqav2_process_results({"question_id": 0, "answers": people}, [answer])["exact_match"]
        return script.textvqa.textvqa_process_results({"question_id": 0, "answers": list(e.answers)}, [answer])["exact_match"]

    return lambda batches: [([score(p.strip(), e) for p, e in zip(*batch, strict=True)], {}) for batch in batches]


def lmms_scripts() -> SimpleNamespace | None:
    """The tasks' own functions, where the package is installed."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        return None
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ("lmms_eval", "lmms_eval.tasks", UTILS):
        sys.modules[name] = ModuleType(name)
    files = ModuleType(f"{UTILS}.file_utils")  # writes submissions, which nothing here does
    files.__dict__["generate_submission_file"] = None
    sys.modules[f"{UTILS}.file_utils"] = sys.modules[UTILS].__dict__["file_utils"] = files
    loaded(root / "tasks" / "_task_utils" / "vqa_eval_metric.py", f"{UTILS}.vqa_eval_metric")
    tasks = {name: loaded(root / "tasks" / name / "utils.py", f"lmms_eval.tasks.{name}.utils") for name in ("vqav2", "textvqa")}
    tree = ast.parse((root / "api" / "metrics.py").read_text(encoding="utf-8"))
    (own,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "exact_match_hf_evaluate")
    names: dict[str, Any] = {"np": np, "re": re, "string": string}
    exec(compile(ast.Module([own], []), "metrics.py", "exec"), names)  # without the file around it, which imports the package
    return SimpleNamespace(**tasks, exact_match=names["exact_match_hf_evaluate"])


def loaded(path: Path, name: str) -> Any:
    """One file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def other_prompts(rng: random.Random, script: SimpleNamespace) -> int:
    """How many of three prompts of a generated question are not lmms-eval's."""
    question, words = phrase(rng), [phrase(rng) for _ in range(rng.choice((0, 0, 1, 5)))]
    example = Example(Path("image.jpg"), question, "", extras={"ocr_tokens": tuple(words)})
    doc, suffix = {"question": question, "ocr_tokens": words}, {"pre_prompt": "", "post_prompt": VQAV2.prompt.suffix}
    expected = [
        script.vqav2.vqav2_doc_to_text(doc, suffix),
        *(script.textvqa.textvqa_doc_to_text(doc, suffix | {"ocr": ocr}) for ocr in (False, True)),
    ]
    ours = [prompt.text(example) for prompt in (VQAV2.prompt, TEXTVQA.prompt, replace(TEXTVQA.prompt, ocr=True))]
    return sum(one != other for one, other in zip(ours, expected, strict=True))


def ten_answers(predictions: list[str], examples: list[Example]) -> Batch:
    """The sets that mmf's evaluator takes."""
    kept = [number for number, example in enumerate(examples) if len(example.answers) == 10]
    return [predictions[number] for number in kept], [examples[number] for number in kept]


def compare(metric: str, script: str, judge: Callable[[list[Batch]], list[Found]], sets: int) -> dict[str, Any]:
    """A row: our metric beside ``judge`` on generated batches."""
    wrong: list[int] = []
    row: dict[str, Any] = {"metric": metric, "script": script, "sets": 0, "figures": 0, "different_figures": 0}
    for start in range(0, sets // BATCH, TOGETHER):
        batches = [generated(number) for number in range(start, min(start + TOGETHER, sets // BATCH))]
        if metric == "textvqa/official":
            batches = [ten_answers(*batch) for batch in batches]
        if metric == "gqa/official":  # one run of its script for all
            batches = [([p for b in batches for p in b[0]], [e for b in batches for e in b[1]])]
        for (predictions, examples), (scores, figures) in zip(batches, judge(batches), strict=True):
            ours = score_answers(predictions, examples, metric)
            if scores is not None:
                pairs = zip(examples, scores, ours.per_example, strict=True)
                wrong += [int(example.id or 0) for example, theirs, mine in pairs if theirs != mine]
            groups = {value: group.percent for kinds in ours.breakdown.values() for value, group in kinds.items()}
            own = groups | dict(ours.further) | {"overall": ours.overall}
            row["sets"] += len(examples)
            row["figures"] += len(figures)
            row["different_figures"] += sum(own.get(name) != value for name, value in figures.items())
    log(f"{row}, {len(wrong)} scored differently")
    return row | {"scored": metric != "gqa/official", "disagreements": len(wrong), "first_disagreements": wrong[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vqa", type=Path, help="clone of GT-Vision-Lab/VQA")
    parser.add_argument("--python2", default="python2.7", help="runs VQA's script")
    parser.add_argument("--mmf", type=Path, help="clone of facebookresearch/mmf")
    parser.add_argument("--gqa", type=Path, help="GQA's eval.py")
    parser.add_argument("--sets", type=int, default=100_000)
    args = parser.parse_args()
    judges: dict[str, tuple[str, Callable[[list[Batch]], list[Found]]]] = {}
    if args.vqa is not None:
        judges["vqav2/official"] = "vqaEval.py, Python 2.7", vqa(args.vqa, args.python2)
    if args.mmf is not None:
        judges["textvqa/official"] = "mmf, m4c_evaluators.py", mmf(args.mmf)
    if args.gqa is not None:
        judges["gqa/official"] = "eval.py", gqa(args.gqa)
    script, meta = lmms_scripts(), {}
    if script is not None:
        release = f"lmms-eval {version('lmms-eval')}"
        judges |= {f"{metric}/lmms-eval": (release, lmms_eval(metric, script)) for metric in ("vqav2", "textvqa", "gqa")}
        rng = random.Random(SEED)
        meta = {"prompts": 3 * args.sets, "other_prompts": sum(other_prompts(rng, script) for _ in range(args.sets))}
    if not judges:
        parser.error("name at least one script, or install lmms-eval")
    rows = [compare(metric, name, judge, args.sets) for metric, (name, judge) in judges.items()]
    write("reference_scripts", rows, seeds=[SEED], **meta)


if __name__ == "__main__":
    main()
