"""Certificates: coverage by simulation, and how far the demo model can be compressed with one.

    python benchmarks/certificate.py --parts coverage
    python benchmarks/certificate.py --parts demo [--images 2500] [--test-questions 9673]

*coverage*: 2,000 draws of scores with a known true drop, of right and wrong answers and of scores in steps of .3; how often each bound is
below it, and how often the whole procedure along a path certifies a plan that loses more than it may. *demo*: plans along one path are cut
and scored on images of the training split that calibration does not see; the cheapest plan certified at 0.5, 1 and 2 points, and then its
drop on the test split, which decides nothing.
Every plan's answers are kept in ``benchmarks/work``, so that a stopped run goes on where it was; ``--fresh`` starts again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

import infoprune
from common import RESULTS, commit, log, whole_images, write
from infoprune import CompressionOptions
from infoprune.certification.certificate import PathStep, plan_digest, rank_correlation
from infoprune.certification.data import CertificationSplit, check_enough, split_data
from infoprune.certification.path import PlannedPath, Scored, judge, kl_questions, plan_path, score_plan
from infoprune.evaluation.certify import (
    ByImage,
    betting_evidence,
    bootstrap_upper,
    empirical_bernstein_upper,
    fixed_sequence,
    p_value,
)
from infoprune.evaluation.cost import Flops
from infoprune.evaluation.quality import Quality, paired_drop, score
from infoprune.progress import Clock, Progress

WORK = Path(__file__).parent / "work" / "certificate"
CONFIDENCE, DRAWS, BOOTSTRAP = 0.95, 2000, 400
LIMITS = (0.5, 1.0, 2.0)  # points

# --- coverage ----------------------------------------------------------------------------------------------------------------------

# images, questions per image (a range: drawn evenly, once), share of questions lost, share won, share of images whose questions go together
SETTINGS = (
    (152, (1, 1), 0.02, 0.00, 0.0),
    (1000, (1, 1), 0.005, 0.00, 0.0),
    (1000, (1, 1), 0.055, 0.05, 0.0),
    (602, (10, 10), 0.005, 0.00, 1.0),
    (1000, (10, 10), 0.007, 0.002, 0.1),
    (300, (5, 5), 0.03, 0.02, 0.3),
    (150, (3, 3), 0.01, 0.00, 1.0),
    (400, (1, 12), 0.02, 0.01, 0.5),
    (500, (1, 30), 0.01, 0.005, 0.2),
)
PATHS = {
    "the first plan is just too bad": (0.0052, 0.006, 0.008, 0.01),
    "from good to bad": (0.0, 0.001, 0.002, 0.0035, 0.0052, 0.008, 0.012, 0.02),
    "not in order": (0.001, 0.003, 0.0052, 0.002, 0.006, 0.001, 0.0051),
}
PATH_IMAGES = (602, 1500)  # the fewest that can certify half a point, and more


# The same, where an answer that changes loses or gains .3, .6 or .9, as scores that weigh several people's answers do
SOFT_SETTINGS = ((1000, (1, 1), 0.03, 0.02, 0.0), (602, (10, 10), 0.01, 0.002, 1.0), (400, (1, 12), 0.03, 0.01, 0.5))
STEPS = (0.3, 0.6, 0.9)


def outcomes(rng: np.random.Generator, sizes: np.ndarray, lost: float, won: float, together: float) -> np.ndarray:
    """(images,) sums of differences; expected mean over questions exactly ``lost`` - ``won``."""
    own_lost = rng.binomial(sizes, lost)
    own = own_lost - rng.binomial(sizes - own_lost, won / (1 - lost))
    u = rng.random(len(sizes))
    whole = np.where(u < lost, sizes, np.where(u < lost + won, -sizes, 0))
    return np.where(rng.random(len(sizes)) < together, whole, own).astype(float)


def soft_outcomes(rng: np.random.Generator, sizes: np.ndarray, lost: float, won: float, together: float) -> np.ndarray:
    """As :func:`outcomes`, with changes of :data:`STEPS`, each as likely; expected mean mean(STEPS) times ``lost`` - ``won``."""
    own_lost = rng.binomial(sizes, lost)
    even = np.full(len(STEPS), 1 / len(STEPS))
    own = (rng.multinomial(own_lost, even) - rng.multinomial(rng.binomial(sizes - own_lost, won / (1 - lost)), even)) @ np.array(STEPS)
    u = rng.random(len(sizes))
    whole = np.where(u < lost, sizes, np.where(u < lost + won, -sizes, 0)) * rng.choice(STEPS, len(sizes))
    return np.where(rng.random(len(sizes)) < together, whole, own)


def rate(method: str, violations: int, draws: int, **fields: Any) -> dict[str, Any]:
    """A row: the share of draws that were violated, and the binomial standard error of a true share of 5%."""
    return {"method": method, "bound": method, "draws": draws, "violation_rate": violations / draws,
            "standard_error": math.sqrt((1 - CONFIDENCE) * CONFIDENCE / draws), **fields}  # fmt: skip


def bound_rows(setting: tuple, draws: int, seed: int, *, soft: bool = False) -> list[dict[str, Any]]:
    images, (fewest, most), lost, won, together = setting
    rng = np.random.default_rng(seed)
    sizes = rng.integers(fewest, most + 1, images)
    draw_sums, true = (soft_outcomes, float(np.mean(STEPS)) * (lost - won)) if soft else (outcomes, lost - won)
    below = dict.fromkeys(("betting", "betting, with a target", "empirical-bernstein", "bootstrap"), 0)
    for draw in range(draws):
        data = ByImage(draw_sums(rng, sizes, lost, won, together), sizes.astype(float))
        needed = -math.log(1 - CONFIDENCE)
        below["betting"] += betting_evidence(data, true, CONFIDENCE) >= needed
        below["betting, with a target"] += betting_evidence(data, true, CONFIDENCE, target=true) >= needed
        below["empirical-bernstein"] += empirical_bernstein_upper(data, CONFIDENCE) < true
        below["bootstrap"] += bootstrap_upper(data, CONFIDENCE, seed=draw, draws=BOOTSTRAP) < true
    told = {
        "images": images,
        "questions_per_image": [fewest, most],
        "true_drop": 100 * true,
        "changed": 100 * (lost + won),
        "together": together,
        "soft": soft,
    }
    return [rate(name, int(count), draws, **told) for name, count in below.items()]


def path_rows(draws: int, seed: int, images: int, per_image: int = 10, max_drop: float = 0.005) -> list[dict[str, Any]]:
    """The procedure along paths of plans: an answer that one plan loses, a plan of larger drop loses too."""
    rows = []
    for number, (name, drops) in enumerate(PATHS.items()):
        for together in (0.0, 1.0):
            rng = np.random.default_rng([seed, images, number, int(together)])
            sizes = np.full(images, float(per_image))
            violated, certified = 0, []
            for _ in range(draws):
                u = np.repeat(rng.random(images)[:, None], per_image, 1) if together else rng.random((images, per_image))
                p_values = []
                for drop in drops:
                    p_values.append(p_value(ByImage((u < drop).sum(1).astype(float), sizes), max_drop, CONFIDENCE))
                    if p_values[-1] > 1 - CONFIDENCE:
                        break
                count = fixed_sequence(p_values, CONFIDENCE)
                certified.append(count)
                violated += any(drop > max_drop for drop in drops[:count])
            rows.append(rate("fixed-sequence", violated, draws, path=name, true_drop=[100 * d for d in drops], max_drop=100 * max_drop,
                             images=images, questions_per_image=[per_image, per_image], together=together,
                             mean_certified=float(np.mean(certified))))  # fmt: skip
    return rows


def coverage(draws: int) -> list[dict[str, Any]]:
    rows = []
    for number, setting in enumerate(SETTINGS + SOFT_SETTINGS):
        soft = number >= len(SETTINGS)
        rows += bound_rows(setting, draws, seed=number, soft=soft)
        log(f"{setting}{', soft' if soft else ''}: " + ", ".join(f"{row['bound']} {100 * row['violation_rate']:.2f}%" for row in rows[-4:]))
    for images in PATH_IMAGES:
        rows += path_rows(draws, 100, images)
    for row in rows[-2 * len(PATHS) * len(PATH_IMAGES) :]:
        log(f"{row['path']}, {row['images']} images, together {row['together']:g}: {100 * row['violation_rate']:.2f}%")
    return [{"part": "coverage"} | row for row in rows]


# --- demo --------------------------------------------------------------------------------------------------------------------------


class Logged(Progress):
    """Notes to standard error."""

    def note(self, message: str) -> None:  # noqa: D102
        log(message)


class Kept:
    """Answers by model, each in a file of its own, with what they depend on."""

    def __init__(self, told: dict[str, Any], fresh: bool) -> None:
        self.told = json.loads(json.dumps(told))
        if fresh:
            for file in WORK.glob("*.json"):
                file.unlink()
        WORK.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> dict[str, Any] | None:
        """What was kept under the same settings."""
        file = WORK / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else None
        return found["value"] if found and found["told"] == self.told else None

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Keep it, aside first and then in place."""
        aside = WORK / f"{name}.partial"
        aside.write_text(json.dumps({"told": self.told, "value": value}))
        aside.rename(WORK / f"{name}.json")


def answered(quality: Quality) -> list[float]:
    return quality.scores.astype(float).tolist()


def scored_plan(vlm, path: PlannedPath, index: int, split: CertificationSplit, test, kept: Kept) -> dict[str, Any]:
    """One plan's answers on both data; the test split is scored here because the cut model is at hand, and looked at afterwards."""
    name, digest = f"plan-{path.shares[index]:g}", plan_digest(path.plans[index])
    found = kept.get(name)
    if found is None or found["plan"] != digest:
        start = time.time()
        cut = path.cut(index)
        seconds = time.time() - start
        log(f"{path.shares[index]:g}: cut in {seconds:.0f} s")
        scored = score_plan(path, cut, index, split)
        log(f"{path.shares[index]:g}: scored {len(split.certification)} certification questions")
        found = {"plan": digest, "scores": scored.scores.tolist(), "kl_nats": scored.kl_nats,
                 "flops": scored.flops.as_dict(), "params": scored.parameters, "seconds_to_cut": seconds,
                 "test": answered(score([cut], test)[0])}  # fmt: skip
        kept.put(name, found)
    return found


def demo(args: argparse.Namespace) -> list[dict[str, Any]]:
    vlm = infoprune.load("demo", notify=log)
    options = CompressionOptions(max_drop=args.limits[-1], certify_images=args.images, shares=tuple(args.shares), examples=args.examples)
    split = split_data(vlm, "easy-vqa:train", options, Logged())
    test = whole_images("test", args.test_questions)
    for limit in args.limits:
        check_enough(split.sizes, CompressionOptions(max_drop=limit), Logged())
    told = {"images": args.images, "test": len(test), "examples": args.examples, "questions": len(split.certification)}
    kept = Kept(told | {"library": infoprune.__version__, "kept": "scores"}, args.fresh)
    dense = kept.get("dense")
    if dense is None:
        dense = {"scores": answered(score([vlm], split.certification)[0]), "test": answered(score([vlm], test)[0])}
        kept.put("dense", dense)
        log("scored the dense model")
    path = plan_path(vlm, split.calibration, "easy-vqa:train", options, Clock(), Logged())
    right, right_test = (np.array(dense[key], dtype=float) for key in ("scores", "test"))
    rows: list[dict[str, Any]] = []
    steps: list[PathStep] = []
    p_values: dict[float, list[float]] = {limit: [] for limit in args.limits}
    for index, share in enumerate(path.shares):
        found = scored_plan(vlm, path, index, split, test, kept)
        flops = Flops(**{name: value for name, value in found["flops"].items() if name != "total"})
        scored = Scored(np.array(found["scores"], dtype=float), found["kl_nats"], flops, found["params"])
        judged = {limit: judge(right, scored, split, limit, CONFIDENCE) for limit in args.limits}
        for limit, measured in judged.items():
            p_values[limit].append(measured.p_value)
        last = judged[args.limits[-1]]
        predicted = path.decisions[index].predicted_loss
        steps.append(PathStep(share=share, plan=found["plan"], predicted_loss_nats=predicted, measured=last))
        test_answers = Quality(np.array(found["test"], dtype=float))
        test_drop, test_interval = paired_drop(Quality(right_test), test_answers, test)
        rows.append({
            "part": "path", "method": "infoprune", "scope": "model", "recovered": False, "seed": 0, "budget": share,
            "flops_ratio": flops.total / path.dense_flops.total, "params": found["params"],
            "num_questions": len(split.certification), "num_images": len(split.sizes), "accuracy": last.accuracy,
            "dense_accuracy": 100 * float(right.mean()), "drop_points": last.drop_points, "drop_ci95": list(last.drop_ci95),
            "bounds": {f"{limit:g}": measured.drop_bounds for limit, measured in judged.items()},
            "p_values": {f"{limit:g}": measured.p_value for limit, measured in judged.items()},
            "predicted_loss_nats": predicted, "kl_nats": last.kl_nats, "kl_questions": kl_questions(split),
            "test_accuracy": test_answers.accuracy, "test_drop_points": test_drop, "test_drop_ci95": list(test_interval),
            "test_questions": len(test),
        })  # fmt: skip
        verdicts = ", ".join(f"{limit:g}: {'passed' if m.certified else 'failed'}" for limit, m in judged.items())
        log(f"{share:g}: drop {last.drop_points:.2f}, bound {last.drop_bounds['betting']:.2f}, test drop {test_drop:.2f}; {verdicts}")
        if not last.certified:
            break
    dense_test = 100 * float(right_test.mean())
    for limit in args.limits:
        count = fixed_sequence(p_values[limit], CONFIDENCE)
        chosen = rows[count - 1] if count else None
        kept_keys = ("budget", "flops_ratio", "drop_points", "drop_ci95", "test_drop_points", "test_drop_ci95", "kl_nats")
        rows.append({
            "part": "certified", "method": "infoprune", "max_drop_points": limit, "confidence": CONFIDENCE, "certified": chosen is not None,
            "dense_test_accuracy": dense_test, **({key: chosen[key] for key in kept_keys} if chosen else {}),
            **({"bound_points": chosen["bounds"][f"{limit:g}"]["betting"]} if chosen else {}),
        })  # fmt: skip
    rows.append({"part": "prediction", "method": "infoprune", "plans": len(steps), "rank_correlation": rank_correlation(tuple(steps))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["coverage", "demo"], choices=["coverage", "demo"])
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the simulation")
    parser.add_argument("--images", type=int, default=2500, help="of the training split, to certify on")
    parser.add_argument("--test-questions", type=int, default=None, help="of the test split (default: all 9,673)")
    parser.add_argument("--examples", type=int, default=768, help="calibration questions")
    parser.add_argument("--shares", type=float, nargs="+", default=list(CompressionOptions(max_drop=1).shares))
    parser.add_argument("--limits", type=float, nargs="+", default=list(LIMITS), help="points, rising")
    parser.add_argument("--name", default="certificate", help="of the result file")
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    target = RESULTS / f"{args.name}.json"
    rows = json.loads(target.read_text())["rows"] if target.exists() else []
    for part in args.parts:
        made = coverage(args.draws) if part == "coverage" else demo(args)
        made = [row | {"commit": commit()} for row in made]  # parts are of different runs
        parts = {row["part"] for row in made}
        rows = [row for row in rows if row["part"] not in parts] + made
        write(args.name, rows, seeds=[0], confidence=CONFIDENCE)


if __name__ == "__main__":
    main()
