from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from huggingface_hub import HfApi, constants
from transformers import AutoProcessor

from infoprune.model import VLM
from local_hub import local_hub
from tiny_current import CURRENT
from tiny_models import TINY, Tiny, build, examples

ALL = [*TINY, *CURRENT]

# The same cases in every run, so that a change is judged by what it changed; `pytest --hypothesis-profile default` draws new ones.
hypothesis.settings.register_profile("same-cases", derandomize=True)
hypothesis.settings.load_profile("same-cases")


def pytest_addoption(parser):
    parser.addoption("--capabilities", type=Path, help="write what the tests marked with a capability found, by family, as JSON")


def pytest_configure(config):
    config.addinivalue_line("markers", "capability(*names): what a family can do if the test passes; {tower} is filled in")
    if path := config.getoption("--capabilities"):
        config.pluginmanager.register(Capabilities(path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("capability")
    if marker and (report.when == "call" or report.failed):
        tiny, tower = item.callspec.params["vlm"], item.callspec.params.get("tower")
        for name in marker.args:
            report.user_properties.append(("capability", [tiny.name, describe(tiny), name.format(tower=tower), report.outcome]))
    return report


class Capabilities:
    """Gathers what the tests marked with a capability found, also from several processes."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}

    def pytest_runtest_logreport(self, report):
        for key, value in report.user_properties:
            if key == "capability":
                name, record, capability, outcome = value
                self.found.setdefault(name, record | {"capabilities": {}})["capabilities"][capability] = outcome

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def describe(tiny):
    """Family and towers of a tiny model."""
    config: Any = tiny.config()
    towers = {"vision": config.vision_config.model_type, "text": config.get_text_config().model_type}
    return {"family": config.model_type, **towers, "own_processor": not tiny.offline}


@pytest.fixture(params=ALL, ids=[tiny.name for tiny in ALL])
def vlm(request, monkeypatch) -> VLM:
    """Every declared family in turn."""
    return built(request.param, monkeypatch)


def built(tiny: Tiny, monkeypatch) -> VLM:
    """A tiny model that can be saved and loaded."""
    found = build(tiny)
    if tiny.offline:  # only the processor's way back from disk is replaced, as its video part needs torchvision
        monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: found.processor)
    return found


@pytest.fixture(scope="module")
def hub():
    """A hub on this machine, empty at first."""
    with local_hub() as found:
        yield found


@pytest.fixture(scope="module")
def hub_environment(hub, tmp_path_factory):
    """Environment of processes that know no other hub."""
    folder = tmp_path_factory.mktemp("hub")
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "anyone"}
    return os.environ | own | {"HF_HUB_CACHE": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")}


@pytest.fixture(scope="module")
def upload(hub):
    """Call with a folder and a repository: uploads the folder as ``hf upload`` does."""
    before = constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = True, False
    api = HfApi(endpoint=hub.endpoint, token="anyone")

    def upload(folder, repo):
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
        return repo

    yield upload
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = before


@pytest.fixture(scope="module")
def without_infoprune(hub_environment):
    """Call with a checkpoint (a folder, or a repository of ``hub``) and a file of inputs and logits.

    One process without infoprune loads and compares, and answers in one line.
    """
    script = Path(__file__).with_name("without_infoprune.py")
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=hub_environment
    ) as process:
        assert process.stdin and process.stdout

        def check(*paths):
            process.stdin.write(json.dumps([str(path) for path in paths]) + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield check
        process.stdin.close()


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
