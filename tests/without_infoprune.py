"""A process without infoprune: for every line on standard input, loads that checkpoint and compares its logits. Started by a fixture."""

import json
import sys

sys.modules["infoprune"] = None  # type: ignore  # as if it were not installed

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForImageTextToText  # noqa: E402


@torch.no_grad()
def check(folder: str, expected: str) -> None:
    try:
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        pass
    else:
        raise AssertionError("loaded without code")
    known = torch.load(expected)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert torch.equal(model(**known["inputs"]).logits, known["logits"]), "other logits"
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert type(base).__name__.startswith("InfoPrune"), type(base)


for line in sys.stdin:
    try:
        check(*json.loads(line))
        print("ok", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
