"""What the benchmark scripts share: result files with their circumstances, and where questions come from."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import infoprune
from infoprune.data import Example, load_examples, subset

RESULTS = Path(__file__).parent / "results"
STARTED = time.time()


def log(message: str) -> None:
    """One line to standard error, with the seconds since the script started."""
    print(f"[{time.time() - STARTED:7.1f} s] {message}", file=sys.stderr, flush=True)


def command() -> str:
    """What was typed, to be typed again."""
    return shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])


def write(name: str, rows: list[dict[str, Any]], **meta: Any) -> None:
    """Write ``results/NAME.json``, aside first and then in place."""
    circumstances = {
        "commit": commit(),
        "date": date.today().isoformat(),
        "hardware": processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "infoprune": infoprune.__version__,
        },
        "command": command(),
        "seconds": round(time.time() - STARTED, 1),
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    aside = target.with_suffix(".partial")
    aside.write_text(json.dumps({"meta": circumstances | meta, "rows": rows}, indent=1) + "\n")
    aside.rename(target)


def whole_images(split: str, num_questions: int | None, skip: int = 0) -> list[Example]:
    """The questions of the first images of a split, so that questions on one image share its tokens.

    Args:
        split: ``train`` or ``test``.
        num_questions: At least this many, rounded up to whole images; ``None``: all.
        skip: Images to leave out first, so that samples can be disjoint.
    """
    examples = load_examples(f"easy-vqa:{split}")
    images = list(dict.fromkeys(e.image for e in examples))[skip:]
    chosen: list[Example] = []
    by_image: dict[Path, list[Example]] = {}
    for example in examples:
        by_image.setdefault(example.image, []).append(example)
    for image in images:
        if num_questions is not None and len(chosen) >= num_questions:
            break
        chosen += by_image[image]
    return chosen


def many_images(split: str, num_questions: int, seed: int = 0) -> list[Example]:
    """Random questions of a split, three on an image: questions on one image err together, so a small sample needs many images."""
    return subset(load_examples(f"easy-vqa:{split}"), num_questions, seed=seed, per_image=3)


def throughput(dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """FLOP/s of a large matrix product."""
    a = torch.randn(size, size).to(dtype)
    torch.mm(a, a)
    samples = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(a, a)
        samples.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(samples)


def commit() -> str:
    """The commit of the code that runs, ``-dirty`` if the library was changed since."""
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "src") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout.strip()


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
