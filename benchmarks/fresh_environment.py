"""A new environment with PyTorch, Transformers and Pillow alone loads a compressed checkpoint, with its code, and answers a question.

    python benchmarks/fresh_environment.py FOLDER

The same question is put to the checkpoint here, where infoprune is installed; both must answer alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
import transformers

import infoprune
from common import log, write
from infoprune.evaluation.generation import generate_answers

ASK = """
import importlib.util, json, sys
assert importlib.util.find_spec("infoprune") is None, "infoprune is installed here"
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, prompt = sys.argv[1:]
try:
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("loaded without its code")
except ValueError as error:
    refused = type(error).__name__
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=[prompt], images=[[Image.open(image).convert("RGB")]], return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1]:]
answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
print("found " + json.dumps({"model": type(model).__name__, "answer": answer, "refused": refused}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    example = infoprune.load_examples("easy-vqa:test")[0]
    vlm = infoprune.load(args.folder)
    here = generate_answers(vlm, [example])[0]
    with tempfile.TemporaryDirectory() as folder:
        log("making an environment with PyTorch, Transformers and Pillow")
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        wanted = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={transformers.__version__}", "pillow"]
        subprocess.run([python, "-m", "pip", "install", "-q", wanted[0]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
        packages = subprocess.run(
            [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
        ).stdout.split()
        log("asking")
        command = [python, "-c", ASK, str(args.folder.resolve()), str(example.image), vlm.encoder.prompt(example.question)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout
        lines = [line.removeprefix("found ") for line in output.splitlines() if line.startswith("found ")]  # libraries print, too
        if len(lines) != 1:
            sys.exit(f"The new environment printed no answer but: {output}")
        found = json.loads(lines[0])
    log(f"there: {found['answer']!r} by {found['model']}; here: {here!r}; reference: {example.answer!r}")
    if found["answer"] != here:
        sys.exit("The answers differ.")
    row = {"question": example.question, "reference": example.answer, "here": here, **found, "packages": packages}
    write("fresh_environment", [row])


if __name__ == "__main__":
    main()
