from __future__ import annotations

import pytest

from infoprune.model import VLM
from tiny_models import TINY, build, examples


@pytest.fixture(params=TINY, ids=[tiny.name for tiny in TINY])
def vlm(request) -> VLM:
    """Every declared family in turn."""
    return build(request.param)


@pytest.fixture
def gqa_vlm() -> VLM:
    """One grouped-query model, for what does not depend on the family."""
    return build(TINY[1])


@pytest.fixture
def questions(tmp_path):
    return examples(tmp_path)


@pytest.fixture
def jsonl(tmp_path, questions):
    import json

    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"image": e.image.name, "question": e.question, "answer": e.answer}) for e in questions))
    return path


@pytest.fixture
def checkpoint(tmp_path, gqa_vlm):
    folder = tmp_path / "dense"
    gqa_vlm.model.save_pretrained(folder)
    gqa_vlm.processor.save_pretrained(folder)
    return folder
