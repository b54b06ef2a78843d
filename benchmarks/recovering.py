"""One recovery for the models of all methods, ours and others': the same data, steps and rate."""

from __future__ import annotations

from dataclasses import replace

import infoprune
from infoprune.data import load_examples
from infoprune.progress import SILENT
from infoprune.training.loop import Processes
from infoprune.training.options import TrainingOptions
from infoprune.training.run import TrainingRun, split


def recovered(small: infoprune.VLM, dense: infoprune.VLM, steps: int, seed: int) -> infoprune.VLM:
    """A copy after full recovery on easy-VQA's training split, best on its validation split.

    Both towers train, whatever was cut in them, so that models of equal cost get equal training.
    """
    options = TrainingOptions(recovery="full", recovery_steps=steps, evaluate_every=max(steps // 2, 1), validation="easy-vqa:validation")
    training, validation = split(dense.encoder, load_examples("easy-vqa:train"), options, seed, SILENT)
    student = replace(small.copy(), plan=None)
    TrainingRun(options, training, validation, seed, Processes(), SILENT).recover(student, dense)
    return replace(student, plan=small.plan)
