"""Images whose tokens have the least spread of energy: those that a random calibration sample shows too seldom.

In trained language models a few tokens of a prompt carry massive activations, thousands of times the others' energy, and attention rests
on them (Sun et al. 2024, arXiv 2402.17762; Xiao et al. 2024, arXiv 2309.17453). On most images many tokens do, on some images one: where
an error takes that one away, all answers about the image are lost. It forms by a threshold, so that no local measure of relevance sees
it coming, and a refit only keeps what its sample shows. What tells such images is the spread of token energies over a prompt,

    s = mean over layers of the standard deviation over tokens t of log ||h_t||^2,

with h the residual stream of the dense language model behind each layer: small where few tokens stand out. It needs no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from infoprune.data.example import Example, subset
from infoprune.errors import CalibrationError
from infoprune.model import VLM
from infoprune.packing import answer_logits, batches
from infoprune.progress import SILENT, Progress

CANDIDATES = 4  # questions looked at for each one that is taken
ROWS = 4


@torch.no_grad()
def energy_spread(vlm: VLM, examples: Sequence[Example], progress: Progress = SILENT) -> list[float]:
    """The spread s of each example's prompt, as above; without units.

    Args:
        vlm: The dense model; run once over ``examples``, and unchanged.
        examples: One on each image is enough.
        progress: Shows the step.

    Raises:
        CalibrationError: The model gives values that are not finite; names the layer.
    """
    assert vlm.architecture is not None
    layers = [site.path.rpartition(".")[0] for site in vlm.architecture.attention if site.tower == "text"]
    found, energies = [0.0] * len(examples), {}
    with ExitStack() as stack, progress.task("looking for rare images", len(examples)) as advance:

        def watch(path: str) -> None:
            def hold(module: Any, args: Any, output: Any) -> None:
                energies[path] = (output[0] if isinstance(output, tuple) else output).float().square().sum(-1)

            stack.callback(vlm.model.get_submodule(path).register_forward_hook(hold).remove)

        for path in layers:
            watch(path)
        training = vlm.model.training
        stack.callback(vlm.model.train, training)
        vlm.model.eval()
        for batch, indices in batches(vlm.encoder, examples, images_per_batch=ROWS, share_prefix=False):
            batch = batch.to(vlm.device)
            answer_logits(vlm.model, batch)
            for row, index in enumerate(indices):
                asked = int(batch.columns[batch.rows == row].min()) + 1  # tokens of the prompt, the last of which predicts the answer
                prompt = batch.valid[row, :asked].nonzero().flatten()
                found[index] = _spread({path: values.view(batch.valid.shape)[row, prompt] for path, values in energies.items()})
            advance(len(indices))
    return found


def _spread(energies: dict[str, torch.Tensor]) -> float:
    """Mean over layers of the standard deviation of log energies, (tokens,) each."""
    total = 0.0
    for path, values in energies.items():
        spread = float(values.clamp_min(torch.finfo(torch.float32).tiny).log().std(correction=0))
        if not spread < float("inf"):
            raise CalibrationError(f"The model gives NaN or infinity behind '{path}'. Check the checkpoint's weights there and the images.")
        total += spread
    return total / max(len(energies), 1)


def candidates(pool: Sequence[Example], count: int, rare: float, *, seed: int, per_image: int) -> list[Example]:
    """What :func:`sample_with_rare` chooses from. Images of it that were not chosen are rare less often than those of ``pool``."""
    return subset(pool, count if rare == 0 else CANDIDATES * count, seed=seed, per_image=per_image)


def sample_with_rare(
    vlm: VLM, pool: Sequence[Example], count: int, rare: float, *, seed: int, per_image: int, progress: Progress = SILENT
) -> list[Example]:
    """A calibration sample: random images, and beside them one question on each of those with the least spread among others.

    What matters of these is what their tokens are like, not what is asked about them.

    Args:
        vlm: The dense model.
        pool: What to draw from.
        count: Questions to take; all, if there are no more.
        rare: Share of them that are about images with little spread, out of :data:`CANDIDATES` times ``count`` questions' images.
        seed: Of the draw.
        per_image: Questions on one random image, see :func:`infoprune.data.subset`.
        progress: Shows the step.

    Returns:
        In the order of ``pool``.
    """
    plain = subset(pool, count, seed=seed, per_image=per_image)
    if rare == 0 or len(plain) == len(pool):
        return plain
    chosen = subset(pool, count - round(rare * count), seed=seed, per_image=per_image)
    known = {example.image for example in chosen}
    others: dict[Path, Example] = {}
    for example in candidates(pool, count, rare, seed=seed, per_image=per_image):
        if example.image not in known:
            others.setdefault(example.image, example)
    asked = list(others.values())
    spread = energy_spread(vlm, asked, progress) if asked else []
    chosen += [asked[index] for index in sorted(range(len(asked)), key=spread.__getitem__)][: count - len(chosen)]
    taken = {id(example) for example in chosen}
    chosen += [example for example in plain if id(example) not in taken][: count - len(chosen)]  # few images with many questions
    place = {id(example): index for index, example in enumerate(pool)}
    return sorted(chosen, key=lambda example: place[id(example)])
