"""Median times of several pieces of work that take turns, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

ENOUGH = 5
Work = Callable[[], Callable[[], Any]]  # prepares, untimed, and returns what is timed


def median_seconds(
    works: Sequence[Work],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    limit: float = math.inf,
    after_round: Callable[[], None] = lambda: None,
) -> list[float]:
    """Median seconds of each of ``works`` over ``repeats`` rounds, after ``warmup`` rounds that do not count.

    In every round each runs once. Between two runs of one all others' weights pass through the caches, as a layer of a model finds them.
    After ``limit`` seconds :data:`ENOUGH` rounds do.
    """
    begin, clock = time.perf_counter(), clock_of(device)
    sync = synchronizer(device)
    samples: list[list[float]] = [[] for _ in works]
    for number in range(warmup + repeats):
        if number >= warmup + ENOUGH and time.perf_counter() - begin > limit:
            break
        for work, found in zip(works, samples, strict=True):
            call = work()
            sync()
            start = clock()
            call()
            sync()
            if number >= warmup:
                found.append(clock() - start)
        after_round()
    return [statistics.median(found) for found in samples]


def clock_of(device: torch.device) -> Callable[[], float]:
    """What tells the seconds: on a CPU the time for which the calling thread had it, else the wall clock.

    What other programs take of a processor meanwhile is not the model's; long work suffers from it and short work hardly. Windows
    counts the time of threads too coarsely.
    """
    return time.thread_time if device.type == "cpu" and sys.platform != "win32" else time.perf_counter


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until ``device`` has done all that it was given."""
    if device.type == "cuda":
        return partial(torch.cuda.synchronize, device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None
