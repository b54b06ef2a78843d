"""The plugin for lmms-eval, in lmms-eval's own terms; ``benchmarks/through_lmms_eval.py`` runs the whole of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from infoprune.errors import InfoPruneError
from infoprune.evaluation.generation import generate_answers
from infoprune.evaluation.quality import score

lmms_eval = pytest.importorskip("lmms_eval.api.instance", reason="lmms-eval is not here: pip install 'infoprune[lmms-eval]'")
from infoprune.integrations.lmms_eval import InfoPrune, cut, generation_options  # noqa: E402


@pytest.fixture
def lm(checkpoint, questions):
    """A tiny model that answers about the questions' images; document 0 of the task ``many`` has two, of ``none`` no image."""
    found = InfoPrune(str(checkpoint), batch_size="4", max_batch_size=None, device="cpu")
    pictures = [Image.open(e.image) for e in questions]
    found.task_dict["one"] = {"test": [[picture] for picture in pictures]}
    found.task_dict["many"] = {"test": [pictures[:2], pictures[1:2]]}
    found.task_dict["none"] = {"test": [[], None]}
    found.task_dict["video"] = {"test": [["film.mp4"]]}
    return found


def request(kind, task, number, text, given):
    arguments = (text, given, lambda document: document, number, task, "test")
    return lmms_eval.Instance(request_type=kind, arguments=arguments, idx=0, metadata={"task": task, "doc_id": number, "repeats": 1})


def test_is_found_by_its_entry_point():
    from lmms_eval.models import get_model

    assert get_model("infoprune") is InfoPrune


def test_answers_are_those_of_infoprune(lm, questions):
    settings = {"max_new_tokens": 5, "temperature": 0, "until": ["\n\n"]}
    found = lm.generate_until([request("generate_until", "one", n, e.question, settings) for n, e in enumerate(questions)])
    assert found == generate_answers(lm.vlm, questions, max_new_tokens=5)
    assert len(set(found)) > 1


@torch.no_grad()
def test_continuations_are_scored_as_by_infoprune(lm, questions):
    said = generate_answers(lm.vlm, questions[:1], max_new_tokens=1)[0]
    asked = [*questions, dataclasses.replace(questions[0], answer=said)]
    found = lm.loglikelihood([request("loglikelihood", "one", n % len(questions), e.question, f" {e.answer}") for n, e in enumerate(asked)])
    (own,) = score([lm.vlm], asked)
    assert [greedy for _, greedy in found] == own.correct.tolist()
    encoded = lm.vlm.encoder.encode(questions[3], questions[3].load_image())
    inputs = lm.vlm.encoder.inputs([lm.vlm.encoder.prompt(questions[3].question)], [questions[3].load_image()])
    ids = torch.cat([inputs["input_ids"], torch.tensor([encoded.answer])], 1)
    logits = lm.vlm.model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, len(encoded.prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.answer))
    assert found[3][0] == pytest.approx(float(loss), rel=1e-4)


def test_numbers_of_images_may_differ(lm):
    settings = {"max_new_tokens": 3}
    asked = [("many", 0), ("none", 0), ("many", 1), ("none", 1)]
    together = lm.generate_until([request("generate_until", task, n, "what shape ?", settings) for task, n in asked])
    apart = [lm.generate_until([request("generate_until", task, n, "what shape ?", settings)])[0] for task, n in asked]
    assert together == apart and together[1] == together[3] and together[0] != together[2]
    scored = lm.loglikelihood([request("loglikelihood", task, n, "what shape ?", "circle") for task, n in asked])
    assert scored[1] == scored[3] and scored[0] != scored[2]


def test_what_cannot_be_read_is_said(lm, monkeypatch):
    with pytest.raises(InfoPruneError, match="Document 0 of the task 'video' has a str beside or instead of images"):
        lm.generate_until([request("generate_until", "video", 0, "what?", {})])
    with pytest.raises(InfoPruneError, match="several rounds"):
        lm.generate_until_multi_round([])

    def refuse(*_, **__):
        raise ValueError("one image at most")

    monkeypatch.setattr(lm.vlm.encoder, "inputs", refuse)
    with pytest.raises(InfoPruneError, match=r"llava processor of .* can't take 2 images in one question \(document 0 .*one image at most"):
        lm.generate_until([request("generate_until", "many", 0, "what?", {})])


@pytest.mark.parametrize(("wrong", "message"), [({"batch_size": "auto"}, "batch size"), ({"dtype": "int3"}, "Unknown dtype 'int3'")])
def test_unusable_settings(wrong, message):
    with pytest.raises(InfoPruneError, match=message):
        InfoPrune("nowhere", **wrong)


def test_settings_of_tasks():
    greedy = generation_options(
        {"temperature": 0, "top_p": 0.9, "do_sample": True, "until": "\n", "num_beams": 2, "image_aspect_ratio": "pad"}
    )
    assert greedy == ({"max_new_tokens": 1024, "num_beams": 2, "do_sample": False}, ("\n",))
    warm = generation_options({"temperature": 0.7, "max_new_tokens": 8, "until": ["a", "b"]})
    assert warm == ({"max_new_tokens": 8, "temperature": 0.7, "do_sample": True}, ("a", "b"))
    assert generation_options({"max_new_tokens": None})[0]["max_new_tokens"] == 1024
    assert cut("\n\n red.\n\nblue", ("\n\n", "")) == "red."
    assert cut("a stop b halt c", ("halt", "stop")) == "a"
