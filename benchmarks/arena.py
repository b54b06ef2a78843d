"""The arena: our default, its variants and the peers at equal FLOPs, on the demo model.

    python benchmarks/arena.py [--scopes heads ffn model] [--shares S ...] [--seeds N ...] [--methods NAME ...] [--questions N] [--no-times]
        [--recover STEPS] [--examples N]

A method is a set of the library's own options (``infoprune.peers``). In each scope a budget is a share of that scope's dense FLOPs: of the
attention blocks, of the FFNs, or of the whole model; heads and FFNs of both towers are cut. All methods of a seed share one calibration
sample of the training split. Each model answers test questions and a second data set that no choice was made on (``shifted.py``); times are
interleaved with the dense model's, for the first seed. ``--recover``: all models then train for so many steps before they answer
(``recovering.py``), in rows of their own.
Rows are written as they come; a stopped run goes on where it was, and a row that failed is a row with the error in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import infoprune
from common import RESULTS, command, commit, log, many_images, processor, write
from infoprune.calibration_batches import CalibrationBatches
from infoprune.data import Example
from infoprune.decide import decide
from infoprune.evaluation import latency, quality
from infoprune.evaluation.cost import attention_flops, ffn_flops, num_parameters, predicted_flops
from infoprune.options import CompressionOptions, Needs
from infoprune.peers import PEERS
from infoprune.site_costs import FlopCosts
from infoprune.site_statistics import Statistics
from infoprune.solve import SolvedSite, solve_sites
from infoprune.steps import apply_decisions, calibrated, calibration_examples, measure
from recovering import recovered
from shifted import TEST, Shift, shifted

WORK = Path(__file__).parent / "work"
SHARES = (0.75, 0.6, 0.5, 0.4, 0.31, 0.2)
SEEDS = (0, 1, 2)
QUESTIONS = 400
EXAMPLES = CompressionOptions(flops=0.5).examples  # the default
TOGETHER = 6  # models scored in one pass beside the dense one
REPEATS = 12
FLAGS = ("branches", "magnitudes", "factors", "neurons", "layers", "sensitivities", "saliencies")
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "heads": {
        "infoprune": {"ffn": "none"},
        "infoprune:no repair": {"ffn": "none", "repair": False},
        "infoprune:no compensation": {"ffn": "none", "repair": False, "compensate": "none"},
        "infoprune:no task term": {"ffn": "none", "ffn_metric": "identity", "weighting": "uniform"},
    },
    "ffn": {
        "infoprune": {"heads": "none"},
        "infoprune:no repair": {"heads": "none", "repair": False},
        "infoprune:no task term": {"heads": "none", "ffn_metric": "identity", "weighting": "uniform"},
        "infoprune:uniform shares": {"heads": "none", "allocation": "uniform"},
        "infoprune:low-rank": {"heads": "none", "ffn": "low-rank"},
        "infoprune:low-rank, separate gate": {"heads": "none", "structure": "separate"},
        "infoprune:low-rank, no shrinkage": {"heads": "none", "shrinkage": 0.0},
    },
    "model": {
        "infoprune": {},
        "infoprune:no repair": {"repair": False},
        "infoprune:no task term": {"ffn_metric": "identity", "weighting": "uniform"},
        "infoprune:low-rank": {"ffn": "low-rank"},
        "infoprune:low-rank, no shrinkage": {"shrinkage": 0.0},
    },
}


@dataclass(frozen=True)
class Entry:
    """One model of the arena."""

    scope: str
    method: str
    share: float
    seed: int
    options: CompressionOptions

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What tells it from the others."""
        return self.scope, self.method, self.share, self.seed


def entries(
    scopes: Iterable[str], shares: Iterable[float], seeds: Iterable[int], methods: list[str] | None, shares_of: dict[str, float],
    examples: int,
) -> list[Entry]:  # fmt: skip
    """All models, in an order that lets those with the same calibration follow each other.

    ``shares_of`` is each scope's part of the dense FLOPs, ``examples`` the number of calibration questions.
    """
    found = []
    for seed in seeds:
        for scope in scopes:
            peers = {name: peer.options for name, peer in PEERS.items() if peer.scope == scope}
            for method, fields in (OURS[scope] | peers).items():
                if methods is None or method in methods:
                    for share in shares:
                        budget = 1 - (1 - share) * shares_of[scope]
                        options = CompressionOptions(**(fields | {"flops": budget, "seed": seed, "examples": examples}))
                        found.append(Entry(scope, method, share, seed, options))
    return found


def shared(needs: Needs) -> Needs:
    """What methods whose statistics can be shared have in common."""
    return Needs(needs.weighting, needs.temperature, needs.top_k, needs.seed, needs.gradients)


def together(wanted: Sequence[Entry]) -> dict[Needs, Needs]:
    """By what they have in common, all that the methods which share statistics need."""
    found: dict[Needs, Needs] = {}
    for entry in wanted:
        key, needs = shared(entry.options.needs), entry.options.needs
        known = found.get(key, key)
        flags = {name: getattr(known, name) or getattr(needs, name) for name in FLAGS}
        found[key] = replace(known, **flags)
    return found


def worst_image(scored: quality.Quality, examples: Sequence[Example]) -> float:
    """The share of the summed KL that answers about one image have, of that where it is largest."""
    assert scored.kl is not None and scored.token_question is not None
    by_image: dict[Path, float] = {}
    for question, kl in zip(scored.token_question.tolist(), scored.kl.tolist(), strict=True):
        image = examples[question].image
        by_image[image] = by_image.get(image, 0.0) + kl
    return max(by_image.values()) / max(sum(by_image.values()), 1e-300)


class Calibrations:
    """Statistics of the dense model; one at a time is kept."""

    def __init__(self, dense: infoprune.VLM, wanted: Sequence[Entry]) -> None:
        self.dense, self.needs = dense, together(wanted)
        self.key: tuple[Needs, int, float] | None = None
        self.found: tuple[Statistics, CalibrationBatches, float] | None = None

    def of(self, options: CompressionOptions) -> tuple[Statistics, CalibrationBatches, float]:
        """Statistics, the batches they are of, and the seconds that they took."""
        key = shared(options.needs), options.examples, options.rare
        if self.found is None or key != self.key:
            start = time.perf_counter()
            examples = calibration_examples(self.dense, "easy-vqa:train", options)
            self.key, self.found = key, (*calibrated(self.dense, examples, self.needs[key[0]]), time.perf_counter() - start)
            log(f"calibrated in {self.found[2]:.0f} s: {self.needs[key[0]]}")
        return self.found


class Arena:
    """The dense model, what it is asked, and the rows of a result file so far.

    Args:
        dense: The model.
        questions: How many of each kind.
        shift: The second data set; the first are questions of the same split as they are.
        file: Name of the result file.
        steps: Of recovery; 0: models answer as they were cut.
    """

    def __init__(self, dense: infoprune.VLM, questions: int, shift: Shift, file: str, steps: int = 0) -> None:
        self.dense, self.split, self.file, self.steps = dense, shift.split, file, steps
        WORK.mkdir(exist_ok=True)
        self.examples = many_images(shift.split, questions)
        self.others = shifted(shift, WORK / "shifted", questions)
        self.probe, self.dense_flops, self.workload = measure(dense, self.examples)
        self.solved: tuple[Any, list[SolvedSite]] | None = None
        path = RESULTS / f"{file}.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def shares_of(self) -> dict[str, float]:
        """Each scope's part of the dense model's FLOPs."""
        assert self.dense.architecture is not None
        attention = sum(attention_flops(s, s.num_units, self.workload) for s in self.dense.architecture.attention)
        ffn = sum(ffn_flops(s, None, self.workload) for s in self.dense.architecture.ffn)
        total = self.dense_flops.total
        return {"heads": attention / total, "ffn": ffn / total, "model": 1.0}

    def known(self, entry: Entry) -> list[dict[str, Any]]:
        """Its rows, those calibrated on another number of questions among them."""
        told = (*entry.key, self.steps, len(self.examples))
        fields = ("scope", "method", "budget", "seed", "steps", "num_questions")
        return [row for row in self.rows if tuple(row[field] for field in fields) == told]

    def lacks(self, entry: Entry) -> bool:
        """Whether there is no row for it yet that was calibrated on as many questions."""
        return not any(row["examples"] == entry.options.examples for row in self.known(entry))

    def add(self, entry: Entry, found: dict[str, Any]) -> None:
        """Its row, in the place of one that was calibrated on another number of questions."""
        told = {"method": entry.method, "scope": entry.scope, "budget": entry.share, "seed": entry.seed, "examples": entry.options.examples}
        told |= {"recovered": bool(self.steps), "steps": self.steps}
        told |= {"hardware": processor(), "commit": commit(), "command": command()}
        outdated = [id(row) for row in self.known(entry)]
        self.rows = [row for row in self.rows if id(row) not in outdated] + [told | found]

    def cut(self, entry: Entry, calibrations: Calibrations) -> tuple[infoprune.VLM, dict[str, Any]]:
        """The model and what making it took."""
        options, architecture = entry.options, self.dense.architecture
        assert architecture is not None
        statistics, inputs, calibrating = calibrations.of(options)
        start = time.perf_counter()
        same = replace(options, flops=1.0)  # solving sites does not depend on the budget
        if self.solved is None or self.solved[0] != same:
            self.solved = same, solve_sites(self.dense.model, architecture, statistics, options)
        decisions = decide(self.solved[1], FlopCosts(self.workload), self.dense_flops.total, options)
        deciding = time.perf_counter() - start
        small = apply_decisions(self.dense, decisions, options, statistics, inputs)
        seconds = {"calibrate": calibrating, "decide": deciding, "cut": time.perf_counter() - start - deciding}
        if self.steps:
            start = time.perf_counter()
            small = recovered(small, self.dense, self.steps, entry.seed)
            seconds["recover"] = time.perf_counter() - start
            log(f"{entry.key} recovered in {seconds['recover']:.0f} s")
        return small, {"seconds": seconds, "predicted_loss_nats": decisions.predicted_loss}

    def run(self, wanted: list[Entry], *, timed_seed: int | None) -> None:
        """Make, score and time what is lacking; those that share a calibration follow each other."""
        wanted = [entry for entry in wanted if self.lacks(entry)]
        wanted.sort(key=lambda entry: (entry.seed, entry.options.examples, entry.options.rare, repr(shared(entry.options.needs))))
        models: dict[tuple[str, CompressionOptions], list[Entry]] = {}  # the default is one of its own variants, which is made once
        for entry in wanted:
            models.setdefault((entry.scope, entry.options), []).append(entry)
        log(f"{len(models)} models, {len(wanted)} rows")
        calibrations = Calibrations(self.dense, wanted)
        pending: list[tuple[list[Entry], infoprune.VLM, dict[str, Any]]] = []
        for same in models.values():
            try:
                small, facts = self.cut(same[0], calibrations)
                pending.append((same, small, facts))
            except infoprune.InfoPruneError as error:
                for entry in same:
                    self.add(entry, {"num_questions": len(self.examples), "error": str(error)})
                log(f"{same[0].key}: {error}")
            if len(pending) == TOGETHER:
                self.score(pending, timed_seed)
                pending = []
        if pending:
            self.score(pending, timed_seed)
        self.save()

    def score(self, made: list[tuple[list[Entry], infoprune.VLM, dict[str, Any]]], timed_seed: int | None) -> None:
        """Add the rows of a few models."""
        models = [self.dense, *(small for _, small, _ in made)]
        known, other = quality.score(models, self.examples), quality.score(models, self.others)
        timed = [index for index, (same, _, _) in enumerate(made) if same[0].seed == timed_seed]
        times = self.time([made[index][1] for index in timed])
        for index, (same, small, facts) in enumerate(made):
            row: dict[str, Any] = quality.comparison(known[0], known[index + 1], self.examples) | facts
            row["worst_image"] = worst_image(known[index + 1], self.examples)
            row["shifted"] = quality.comparison(other[0], other[index + 1], self.others)
            row |= {"flops_ratio": self.flops_ratio(small), "params": num_parameters(small.model)}
            row["bytes"] = sum(p.numel() * p.element_size() for p in small.model.parameters())  # as saved: tied weights once
            if index in timed:
                row |= latency.speedups(times[0], times[1 + timed.index(index)])
            for entry in same:
                self.add(entry, row)
            scope, _, share, seed = same[0].key
            log(f"{scope} {share} {' = '.join(entry.method for entry in same)} seed {seed}: {row['accuracy']:.2f}%, "
                f"KL {row['kl_nats']:.4f}; shifted {row['shifted']['accuracy']:.2f}%, KL {row['shifted']['kl_nats']:.4f}")  # fmt: skip
        self.save()

    def time(self, models: list[infoprune.VLM]) -> list[dict[str, dict[str, float]]]:
        """Latency of the dense model and of ``models``."""
        if not models:
            return []
        assert self.dense.architecture is not None
        return latency.measure(
            [self.dense, *models], self.dense.architecture.family, self.probe, answer_tokens=self.workload.answer_tokens, repeats=REPEATS
        )

    def flops_ratio(self, small: infoprune.VLM) -> float:
        """Of the whole model."""
        assert self.dense.architecture is not None
        return predicted_flops(self.dense.architecture, small.plan, self.workload, self.dense_flops.total) / self.dense_flops.total

    def save(self) -> None:
        """Write the result file."""
        seeds = sorted({row["seed"] for row in self.rows})
        counts = {"num_questions": len(self.examples), "num_shifted": len(self.others)}
        write(self.file, self.rows, seeds=seeds, data=f"easy-vqa:{self.split}", **counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scopes", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", nargs="+", default=None, help="default: all of the scope")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help=f"calibration questions (default: {EXAMPLES})")
    parser.add_argument("--no-times", action="store_true", help="where the machine is busy with other things")
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS", help="of full recovery, the same for all (default: none)")
    args = parser.parse_args()
    arena = Arena(infoprune.load("demo", notify=log), args.questions, TEST, "arena", args.recover)
    wanted = entries(args.scopes, args.shares, args.seeds, args.methods, arena.shares_of(), args.examples)
    arena.run(wanted, timed_seed=None if args.no_times else args.seeds[0])


if __name__ == "__main__":
    main()
