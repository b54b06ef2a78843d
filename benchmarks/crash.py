"""``kill -9`` in the middle of ``infoprune evaluate``, generating answers or scoring, at random moments, and the same command again.

    python benchmarks/crash.py [--model demo] [--questions 300] [--times 10]

The moments are drawn evenly from the time in which an undisturbed run answers or scores. Afterwards the file of answers or scores has to be
that run's, byte for byte: ``resumed-identical`` where some were on the disk when the process was killed,
``restarted-identical`` where none were.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import log, write

VERBS = {"evaluate --generate": ("--generate",), "evaluate --against": ("--against", "demo")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="easy-vqa:test")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for verb in VERBS:
        for row in crashes(args, verb):
            rows.append(row)
            log(f"{len(rows)}: {row}")
            write("crash", rows, seeds=[args.seed], data=args.data, num_questions=args.questions, model=args.model)
    if not all(row["outcome"].endswith("identical") for row in rows):
        sys.exit("Some runs did not end as the undisturbed one.")


def crashes(args: argparse.Namespace, verb: str) -> Iterator[dict[str, Any]]:
    """Rows of ``args.times`` runs that were killed."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.jsonl"
        process = start(args, verb, whole)
        began = wait_for_answers(process, whole)
        while not whole.exists() and process.poll() is None:
            time.sleep(0.01)
        seconds = time.monotonic() - began
        finish(process)
        log(f"{verb}: an undisturbed run asks for {seconds:.1f} s")
        generator, made = random.Random(args.seed), 0
        while made < args.times:
            answers = Path(folder) / f"{made}.jsonl"
            row = crash(args, verb, answers, whole.read_bytes(), generator.random(), seconds)
            if row is None:
                log("that run had finished before its moment came; drawing another")
                answers.unlink()
                seconds *= 0.9
                continue
            made += 1
            yield row


def crash(args: argparse.Namespace, verb: str, answers: Path, expected: bytes, share: float, seconds: float) -> dict[str, Any] | None:
    """Kill one run after ``share`` of the time that answering takes, run again, compare; ``None`` where it was faster than the signal."""
    process = start(args, verb, answers)
    began = wait_for_answers(process, answers)
    time.sleep(max(0.0, began + share * seconds - time.monotonic()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    part = part_of(answers)  # whole lines count, the first one is the header
    kept = max(0, part.read_bytes().count(b"\n") - 1) if part.exists() else 0
    row: dict[str, Any] = {"verb": verb, "moment": round(share, 3), "seconds": round(share * seconds, 2), "answers_kept": kept}
    if answers.exists():
        return None
    try:
        finish(start(args, verb, answers))
    except subprocess.SubprocessError as error:
        return row | {"outcome": f"failed: {error}"}
    same = answers.read_bytes() == expected and not list(answers.parent.glob(f"{answers.name}.*"))
    return row | {"outcome": ("resumed-identical" if kept else "restarted-identical") if same else "differs"}


def start(args: argparse.Namespace, verb: str, answers: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "infoprune", "evaluate", args.model, "--data", args.data, "--limit", str(args.questions)]
    command += [*VERBS[verb], "--answers", str(answers), "--repeats", "0"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def part_of(answers: Path) -> Path:
    return answers.with_name(f"{answers.name}.0.part")


def wait_for_answers(process: subprocess.Popen[bytes], answers: Path) -> float:
    """The time at which answering began."""
    while process.poll() is None and not part_of(answers).exists():
        time.sleep(0.01)
    return time.monotonic()


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise subprocess.SubprocessError(errors.decode(errors="replace")[-500:])


if __name__ == "__main__":
    main()
