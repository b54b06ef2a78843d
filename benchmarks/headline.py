"""Trained heads and recovery on the demo model: how many fewer FLOPs, how much faster, at what loss on the whole test split.

    python benchmarks/headline.py [--parts curve arms] [--shares S ...] [--seeds N ...]
        [--arm-shares S ...] [--arms NAME ...] [--questions N]

``curve``: training-free heads, fewer neurons and full recovery at 2x, 3.2x, 5x and 8x fewer FLOPs, with more steps where more was
cut; trained heads (attention keeps the share of its measured time that the model keeps of its FLOPs) under the same FFNs and recovery
at 3.2x. The rows also answer questions beyond the task (``shifted.BROAD``). ``arms``: trained, training-free and random heads under the
same FFN treatment and the same short recovery, three seeds, at 3.2x and 8x; these rows also tell how the models did before recovery.
The validation split decides which weights are kept; the test split is used for the rows alone. Every model is kept under
``benchmarks/work`` (not committed), so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import infoprune
from common import RESULTS, command, commit, log, processor, whole_images, write
from infoprune.cli.console import BarProgress
from infoprune.evaluation import latency, quality
from infoprune.evaluation.cost import prompt_inputs
from infoprune.evaluation.runner import bytes_on_disk
from infoprune.training.run import CUT
from shifted import BROAD, shifted

WORK = Path(__file__).parent / "work"
SHARES = (1 / 3.2, 0.2, 0.125, 0.5)
ARM_SHARES = (1 / 3.2, 0.125)
SEEDS = (0, 1, 2)
FILES = {"curve": "headline", "arms": "arms"}  # result files
ARMS = {"trained": "trained", "training-free": "information-loss", "random": "random"}
RECOVERY = {"recovery": "full"}
STEPS = {0.5: 80, 1 / 3.2: 200, 0.2: 250, 0.125: 450}  # of recovery, by the share of FLOPs that stays
GATES_AT = 1 / 3.2
BEYOND = 2000  # questions on altered images, in 20 ways to ask
SHORT = {"gate_steps": 60, "recovery_steps": 60, "evaluate_every": 30}
TOGETHER = 6  # models, of arms before and after recovery, scored in one pass beside the dense one


@dataclass(frozen=True)
class Run:
    """One compressed model."""

    part: str
    name: str
    share: float
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return WORK / f"{self.part}-{self.name}-{self.share:.3f}-{self.seed}".replace(" ", "_")

    @property
    def state(self) -> Path:
        """State of its training, with the model as it was cut."""
        return self.folder.with_name(f"{self.folder.name}.state")


def runs(
    parts: list[str], shares: Sequence[float] = SHARES, seeds: Sequence[int] = SEEDS, arm_shares: Sequence[float] = ARM_SHARES,
    arms: Sequence[str] = tuple(ARMS),
) -> list[Run]:  # fmt: skip
    found = []
    if "curve" in parts:
        found += [run for share in shares for run in points(share)]
    if "arms" in parts:
        found += [
            Run("arms", name, share, seed, SHORT | {"heads": heads, "recovery": "full"})
            for share in arm_shares
            for seed in seeds
            for name, heads in ARMS.items()
            if name in arms
        ]
    return found


def points(share: float) -> list[Run]:
    """The curve's models at a share."""
    recovery = RECOVERY | {"recovery_steps": STEPS[min(STEPS, key=lambda known: abs(known - share))]}
    found = [Run("curve", "training-free", share, options=recovery | {"ffn": "width"})]
    if share == GATES_AT:
        gates = {"heads": "trained", "ffn": "width", "gate_cost": "time", "attention_share": round(share, 3)}
        found.append(Run("curve", "trained", share, options=recovery | gates))
    return found


def make(run: Run, dense: infoprune.VLM) -> None:
    """Compress and save, unless it is there already."""
    if run.folder.is_dir():
        return
    log(f"{run.folder.name}: compressing")
    result = infoprune.compress(
        dense, "easy-vqa:train", flops=run.share, seed=run.seed, validation="easy-vqa:validation", work=run.state, progress=BarProgress(),
        **run.options,
    )  # fmt: skip
    infoprune.save(result.vlm, run.folder, probe=result.probe, extra=result.as_dict())
    (run.folder / "commit").write_text(commit())


def gates_of(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What the picture of the gates needs: layers' names, gates at every refresh and at the end, and the units that stayed."""
    trained = report["training"]["heads"]
    kept = {path: decision["keep_units"] for path, decision in json.loads((folder / "plan.json").read_text())["heads"].items()}
    final = trained["gates"]
    return {
        "units": {path: len(values) for path, values in final.items()},
        "steps": len(trained["history"]),
        "trajectory": [[round(value, 2) for value in values] for values in trained["trajectory"]],
        "final": [round(value, 2) for values in final.values() for value in values],
        "kept": {path: kept.get(path, list(range(len(values)))) for path, values in final.items()},
    }


def row_of(run: Run, model: infoprune.VLM, figures: dict[str, Any]) -> dict[str, Any]:
    """One row of the result file."""
    report = json.loads((run.folder / "report.json").read_text())
    stages = {s: {k: v for k, v in t.items() if k not in ("history", "gates", "trajectory")} for s, t in report["training"].items()}
    return {
        "method": "infoprune" if run.part == "curve" else f"infoprune:{run.name}", "part": run.part, "name": run.name, "scope": "model",
        "recovered": run.options["recovery"] != "none", "seed": run.seed, "budget": run.share, "flops_ratio": report["flops_ratio"],
        **figures, "params": report["parameters"], "bytes_on_disk": bytes_on_disk(model), "seconds": report["seconds"],
        "flops": report["flops"], "dense_flops": report["dense_flops"], "training": stages,
        **({"gates": gates_of(run.folder, report)} if run.part == "curve" and run.name == "trained" else {}),
        "folder": run.folder.name, "commit": (run.folder / "commit").read_text(), "command": command(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--questions", type=int, default=None, help="test questions (default: all 9,673)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the curve")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the arms")
    parser.add_argument("--arm-shares", type=float, nargs="+", default=ARM_SHARES, help="of the arms")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    dense = infoprune.load("demo", notify=log)
    examples = whole_images("test", args.questions)
    for part in args.parts:
        measure(FILES[part], runs([part], args.shares, args.seeds, args.arm_shares, args.arms), dense, examples)


def measure(file: str, wanted_runs: Sequence[Run], dense: infoprune.VLM, examples: list) -> None:
    """Make, score and time what a result file lacks."""
    path = RESULTS / f"{file}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    wanted = {run.folder.name: run for run in wanted_runs}
    done = {row["folder"] for row in rows if row["num_questions"] == len(examples)}
    rows = [row for row in rows if row["folder"] not in wanted or row["folder"] in done]
    pending = []
    for run in (run for name, run in wanted.items() if name not in done):
        try:
            make(run, dense)
            pending.append(run)
        except infoprune.InfoPruneError as error:  # a row that failed is a row with the error in it
            rows.append({"method": f"infoprune:{run.name}", "budget": run.share, "folder": run.folder.name, "error": str(error),
                         "num_questions": len(examples)})  # fmt: skip
            log(f"{run.folder.name}: {error}")
    facts = {"seeds": sorted({run.seed for run in wanted_runs}), "data": "easy-vqa:test", "num_questions": len(examples)}
    for start in range(0, len(pending), TOGETHER):
        chunk = pending[start : start + TOGETHER]
        log(f"scoring {len(examples)} questions with the dense model and {', '.join(run.folder.name for run in chunk)}")
        models = [infoprune.load(run.folder) for run in chunk]
        before = [infoprune.load(run.state / CUT) for run in chunk if run.part == "arms"]
        reference, *scores = quality.score([dense, *models, *before], examples)
        cut = [{"as_cut": quality.comparison(reference, score, examples)} for score in scores[len(models) :]] or [{}] * len(models)
        for run, model, score, extra in zip(chunk, models, scores, cut, strict=False):
            rows.append(row_of(run, model, quality.comparison(reference, score, examples)) | extra)
            log(f"{run.folder.name}: {score.accuracy:.2f}% of {reference.accuracy:.2f}%, KL {score.kl_nats:.4f}")
        write(file, rows, **facts)
    answer_beyond(rows, dense)
    write(file, rows, **facts)
    time_curve(rows, dense, examples)
    write(file, rows, **facts)


def answer_beyond(rows: list[dict[str, Any]], dense: infoprune.VLM) -> None:
    """The curve's models on altered images and words that neither calibration nor recovery had."""
    lacking = [row for row in rows if row.get("part") == "curve" and row.get("beyond", {}).get("num_questions") != BEYOND]
    chosen = [row for row in lacking if (WORK / row["folder"]).is_dir()]
    if not chosen:
        return
    examples = shifted(BROAD, WORK / "shifted", BEYOND)
    reference, *scores = quality.score([dense, *(infoprune.load(WORK / row["folder"]) for row in chosen)], examples)
    for row, score in zip(chosen, scores, strict=True):
        row["beyond"] = quality.comparison(reference, score, examples) | {"wordings": by_wording(reference, score, examples)}
        log(f"{row['folder']}: {score.accuracy:.2f}% of {reference.accuracy:.2f}% beyond the task, KL {score.kl_nats:.4f}")


def by_wording(reference: quality.Quality, score: quality.Quality, examples: list) -> dict[str, list[float]]:
    """Percent right of the dense and of another model, by how a question is put."""
    asked = np.array([example.kinds["wording"] for example in examples])
    return {way: [found.only(asked == way).accuracy for found in (reference, score)] for way in dict.fromkeys(asked.tolist())}


def time_curve(rows: list[dict[str, Any]], dense: infoprune.VLM, examples: list) -> None:
    """Latency of the curve's models, interleaved with the dense one in one run."""
    chosen = [row for row in rows if row.get("part") == "curve" and (WORK / row["folder"]).is_dir()]
    if not chosen:
        return
    log("timing, all models interleaved")
    models = [dense, *(infoprune.load(WORK / row["folder"]) for row in chosen)]
    assert dense.architecture is not None
    times = latency.measure(models, dense.architecture.family, prompt_inputs(dense.encoder, examples[0]), answer_tokens=2, repeats=40)
    for row, timed in zip(chosen, times[1:], strict=True):
        row |= latency.speedups(times[0], timed) | {"milliseconds": timed, "milliseconds_dense": times[0], "hardware": processor()}
        log(f"{row['folder']}: prefill {row['speedup_prefill']:.2f}x, end to end {row['speedup_end_to_end']:.2f}x")
    assert np.isfinite([row["speedup_prefill"] for row in chosen]).all()


if __name__ == "__main__":
    main()
