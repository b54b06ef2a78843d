"""Everything about one model, or a compressed one against its dense original, as one dictionary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from infoprune.data import Example
from infoprune.data.images import home_expanded, identities
from infoprune.errors import InfoPruneError
from infoprune.evaluation import latency, quality
from infoprune.evaluation.certify import check_confidence
from infoprune.evaluation.cost import Flops, num_parameters, prompt_inputs, typical_example
from infoprune.evaluation.cost import count_flops as _count_flops
from infoprune.evaluation.differences import differences
from infoprune.evaluation.metrics import Scores, score_answers
from infoprune.model import VLM, precision_name, weight_files
from infoprune.progress import SILENT, Progress
from infoprune.resolve import family_of


def evaluate(
    vlm: VLM,
    examples: Sequence[Example],
    *,
    against: VLM | None = None,
    answers: Sequence[Sequence[str]] | None = None,
    metric: str = "exact",
    timing: bool = True,
    repeats: int = 15,
    confidence: float = 0.95,
    record: Path | None = None,
    images_per_batch: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Accuracy, cost and time of ``vlm``, side by side with ``against`` (its dense original) if given.

    Args:
        vlm: The model to judge.
        examples: Held-out questions.
        against: The reference of the KL, the paired difference and the speed-ups.
        answers: Generated answers of each model, dense first, to judge instead of scoring the reference answers.
        metric: What judges generated answers, see :mod:`infoprune.evaluation.metrics`. Questions that it does not count (GQA's outside the
            balanced set) are in no accuracy and no comparison.
        timing: Also measure latency.
        repeats: Timed rounds.
        confidence: Of the one-sided bounds on the drop.
        record: File that keeps what scoring finds, for an interrupted run to go on from (:func:`infoprune.evaluation.quality.score`).
        images_per_batch: Images whose questions are scored together: lower it if memory runs out. ``None``: eight.
        progress: Shows the steps.

    Returns:
        ``models``: a record per model (dense first); ``dtype``: their precision; ``prompt``: that of the first question; ``answers``:
        whether these were scored or generated; ``metric``: what judged them; ``comparison``: drop, KL, ratios and speed-ups, bounds, tests
        and changed questions (:func:`infoprune.evaluation.differences.differences`), with ``against`` only.
    """
    check_confidence(confidence)
    if against is not None:
        check_comparable(vlm, against)
    models = [vlm] if against is None else [against, vlm]
    family = family_of(vlm.model)
    example, answer_tokens = typical_example(vlm.encoder, examples)
    inputs = {name: value.to(vlm.device) for name, value in prompt_inputs(vlm.encoder, example).items()}
    flops = [count_flops(m, inputs, answer_tokens) for m in models]  # before hours of scoring: what fails here shall fail now
    scored, judged = _judged(
        models, examples, answers, metric, partial(quality.score, record=record, images_per_batch=images_per_batch, progress=progress)
    )
    counted = judged[0].counted if judged else np.ones(len(examples), dtype=bool)
    scored, places = [found.only(counted) for found in scored], np.flatnonzero(counted).tolist()
    compared = [examples[place] for place in places]
    times = latency.measure(models, family, inputs, answer_tokens=answer_tokens, repeats=repeats, progress=progress) if timing else []
    records = []
    for index, model in enumerate(models):
        facts: dict[str, Any] = {
            "model": model.model_id,
            "accuracy": scored[index].accuracy,
            "accuracy_ci95": list(scored[index].accuracy_ci95),
            "num_questions": len(compared),
            "params": num_parameters(model.model),
            "flops": flops[index].as_dict(),
            "bytes_on_disk": bytes_on_disk(model),
        }
        facts |= {"milliseconds": times[index]} if timing else {}
        records.append(facts | ({"metric": judged[index].as_dict()} if judged else {}))
    result: dict[str, Any] = {
        "models": records,
        "dtype": precision_name(vlm.model.dtype),
        "prompt": vlm.encoder.prompt_of(examples[0]),
        "answers": "scored" if answers is None else "generated",
        "metric": judged[0].metric if judged else "exact",
        "peak_rss_gb": peak_memory_gb(vlm.device),
    }
    if against is not None:
        units = identities([example.image for example in compared])  # copies of an image are no independent evidence
        result["comparison"] = quality.comparison(scored[0], scored[1], compared, images=units) | {
            "flops_ratio": flops[1].total / flops[0].total,
            "params_ratio": records[1]["params"] / records[0]["params"],
            **(latency.speedups(times[0], times[1]) if timing else {}),
            **differences(scored[0], scored[1], compared, vlm.encoder, confidence=confidence, images=units),
        }
        for item in result["comparison"]["changed"]:
            item["index"] = places[item["index"]]
    return result


def check_comparable(vlm: VLM, against: VLM) -> None:
    """Two models get the same token ids and pixels, so that they must read prompts and images alike.

    Raises:
        InfoPruneError: Family, vocabulary, prompt, end of answers, or what their processors make of an image differ; says which.
    """
    families = [family_of(m.model).model_type for m in (against, vlm)]
    vocabularies = [m.processor.tokenizer.get_vocab() for m in (against, vlm)]
    prompts = [m.encoder.prompt("{question}") for m in (against, vlm)]
    image = Image.effect_noise((200, 120), 80).convert("RGB")
    read = [m.encoder.inputs([m.encoder.prompt("Where?")], [image]) for m in (against, vlm)]
    same = read[0].keys() == read[1].keys() and all(torch.equal(read[0][name], read[1][name]) for name in read[0])
    told = {
        "family": families, "vocabulary": vocabularies, "prompt": prompts, "the end of answers": [m.encoder.end for m in (against, vlm)],
        "what they make of an image": [True, same],
    }  # fmt: skip
    if differs := [name for name, (first, second) in told.items() if first != second]:
        raise InfoPruneError(
            f"'{vlm.model_id}' can't be compared with '{against.model_id}' token by token: they differ in {' and '.join(differs)}. Compare "
            "a compressed model with its original, or evaluate each by itself."
        )


def _judged(
    models: Sequence[VLM],
    examples: Sequence[Example],
    answers: Sequence[Sequence[str]] | None,
    metric: str,
    score: Callable[[Sequence[VLM], Sequence[Example]], list[quality.Quality]],
) -> tuple[list[quality.Quality], list[Scores]]:
    """How good each model's answers are, and what the metric says of generated ones; KL needs scoring whatever a model answered."""
    if answers is None:
        return score(models, examples), []
    judged = [score_answers(texts, examples, metric) for texts in answers]
    scored = score(models, examples) if len(models) > 1 else [quality.Quality(np.zeros(0))]
    found = [replace(q, scores=j.per_example, answers=tuple(texts)) for q, j, texts in zip(scored, judged, answers, strict=True)]
    return found, judged


def count_flops(vlm: VLM, inputs: dict[str, torch.Tensor], answer_tokens: int) -> Flops:
    """FLOPs of a dense or compressed model's parts, counted."""
    return _count_flops(vlm.model, family_of(vlm.model), inputs, answer_tokens)


def bytes_on_disk(vlm: VLM) -> int | None:
    """Size of the checkpoint's weights, where it is a local folder."""
    if vlm.model_id == "demo":
        from infoprune.demo.assemble import ensure_demo

        folder = ensure_demo()
    else:
        folder = home_expanded(vlm.model_id)
    sizes = [(folder / name).stat().st_size for name in weight_files(folder) if (folder / name).is_file()] if folder.is_dir() else []
    return sum(sizes) or None


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory of this process: device memory on CUDA, resident memory otherwise; ``None`` where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
