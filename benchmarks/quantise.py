"""int8 after compression, by torchao: accuracy, KL against the dense model, and size of the saved checkpoint.

    python benchmarks/quantise.py [--share S] [--questions N]

The compressed model is made anew, saved, loaded with a quantisation, saved again, and the reloaded one is scored.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torchao  # pyright: ignore[reportMissingImports]
from torchao.quantization import (  # pyright: ignore[reportMissingImports]
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)
from transformers import AutoModelForImageTextToText, TorchAoConfig

import infoprune
from common import log, whole_images, write
from infoprune.evaluation import quality

KINDS = {"int8, weights only": Int8WeightOnlyConfig, "int8, weights and activations": Int8DynamicActivationInt8WeightConfig}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.5, help="of the FLOPs that compression keeps")
    parser.add_argument("--questions", type=int, default=2000, help="test questions, rounded up to whole images")
    args = parser.parse_args()
    dense = infoprune.load("demo", notify=log)
    examples = whole_images("test", args.questions)
    result = infoprune.compress(dense, "easy-vqa:train", flops=args.share, ffn="low-rank")
    log("compressed")
    with tempfile.TemporaryDirectory() as scratch:
        folder = infoprune.save(result.vlm, Path(scratch) / "small", probe=result.probe)
        small = infoprune.load(folder)
        models, folders = {"float32": small}, {"float32": folder}
        for number, (name, kind) in enumerate(KINDS.items()):
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, quantization_config=TorchAoConfig(quant_type=kind())
            )
            folders[name] = Path(scratch) / f"int8-{number}"
            model.save_pretrained(folders[name])
            models[name] = replace(small, model=AutoModelForImageTextToText.from_pretrained(folders[name]).eval())
            log(f"{name}: saved and loaded again")
        reference, *scores = quality.score([dense, *models.values()], examples)
        rows = []
        for (name, path), scored in zip(folders.items(), scores, strict=True):
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            rows.append({"name": name, "budget": args.share, "bytes_on_disk": size, **quality.comparison(reference, scored, examples)})
            log(f"{name}: {scored.accuracy:.2f}% of {reference.accuracy:.2f}%, KL {scored.kl_nats:.4f}, {size / 1e6:.0f} MB")
    write("quantise", rows, seeds=[0], data="easy-vqa:test", num_questions=len(examples), torchao=torchao.__version__)


if __name__ == "__main__":
    main()
