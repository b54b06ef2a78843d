"""Speed-ups that are asked for, the ones that the table of this machine's costs predicts, and the ones that are measured.

    python benchmarks/speedup.py [--targets X ...] [--repeats N]

Every target starts with an empty cache of cost tables, so that a prediction rests on one measurement of the machine. The models are then
timed once more beside the dense one, all in turn: what ``compress`` told of each rests on a few repeats right after its cut.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import infoprune
from common import log, whole_images, write
from infoprune.data import load_examples
from infoprune.evaluation import latency
from infoprune.steps import measure

TARGETS = (1.2, 1.4, 1.6, 1.8, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    assert dense.architecture is not None
    examples = load_examples("easy-vqa:train")
    rows: list[dict[str, Any]] = []
    models = [dense]
    for target in args.targets:
        start = time.perf_counter()
        with empty_cache():
            found = infoprune.compress(dense, examples, speedup=target)
        assert found.speed is not None
        rows.append({"method": "infoprune", "budget": target, "flops_ratio": found.flops_ratio, "params": found.parameters,
                     **found.speed.as_dict(), "seconds": time.perf_counter() - start})  # fmt: skip
        models.append(found.vlm)
        log(f"{target:g}: " + ", ".join(f"predicted {a.predicted:.2f}, measured {a.measured:.2f}" for a in found.speed.attempts))
    probe, _, workload = measure(dense, whole_images("train", 64))
    times = latency.measure(models, dense.architecture.family, probe, answer_tokens=workload.answer_tokens, repeats=args.repeats)
    for row, timed in zip(rows, times[1:], strict=True):
        row |= latency.speedups(times[0], timed) | {"milliseconds": timed, "milliseconds_dense": times[0]}
        log(f"{row['asked']:g}: measured again {row['speedup_end_to_end']:.2f}")
    write("speedup", rows, seeds=[0], data="easy-vqa:train", num_questions=1)


@contextmanager
def empty_cache() -> Iterator[None]:
    """A cache folder of its own while this is open."""
    known = os.environ.get("INFOPRUNE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INFOPRUNE_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["INFOPRUNE_CACHE"]
            if known is not None:
                os.environ["INFOPRUNE_CACHE"] = known


if __name__ == "__main__":
    main()
