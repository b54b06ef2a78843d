"""A process with infoprune: pushes a checkpoint to a hub by Transformers' own means, and loads repositories. Started by a test.

    python hub_user.py FOLDER PUSHED UPLOADED INPUTS

PUSHED is made here from FOLDER; UPLOADED is there already. Prints what infoprune makes of both.
"""

import json
import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import infoprune

folder, pushed, uploaded, inputs = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(folder).push_to_hub(pushed)
AutoProcessor.from_pretrained(folder).push_to_hub(pushed)
known = torch.load(inputs)
report = {}
for name in (pushed, uploaded):
    vlm = infoprune.load(name)
    with torch.no_grad():
        same = torch.equal(vlm.model(**known["inputs"]).logits, known["logits"])
    report[name] = {
        "same": same,
        "plan": vlm.plan is not None and json.loads(vlm.plan.to_json()),
        "processor": type(vlm.processor).__name__,
        "revision": vlm.revision,
    }
print("report " + json.dumps(report))
