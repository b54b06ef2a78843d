"""What the spread of token energy tells about images: how many tokens carry massive activations, in the dense demo model.

    python benchmarks/rare.py [--images N]

A token counts as massive where its energy is at least a tenth of the largest of all images, in the layer behind which that is largest. The
rows are images with as many massive tokens, and how many of them are among as many images of the least spread (``infoprune.rare``).
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import torch

import infoprune
from common import log, many_images, write
from infoprune.packing import answer_logits, batches
from infoprune.rare import energy_spread

MASSIVE = 0.1


@torch.no_grad()
def energies(vlm: infoprune.VLM, examples: list[infoprune.Example]) -> torch.Tensor:
    """(images, layers, tokens) of the language model, behind each layer; zero on padding."""
    assert vlm.architecture is not None
    layers = [site.path.rpartition(".")[0] for site in vlm.architecture.attention if site.tower == "text"]
    held: list[torch.Tensor] = []
    rows = []
    with ExitStack() as stack:
        for path in layers:
            hook = vlm.model.get_submodule(path).register_forward_hook(
                lambda m, a, o: held.append((o[0] if isinstance(o, tuple) else o).square().sum(-1))
            )
            stack.callback(hook.remove)
        for batch, _ in batches(vlm.encoder, examples, images_per_batch=16, share_prefix=False):
            held.clear()
            answer_logits(vlm.model, batch)
            rows += list((torch.stack(held, 1) * batch.valid[:, None]).unbind())
    width = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    vlm = infoprune.load("demo", notify=log)
    examples = list({example.image: example for example in many_images("train", 3 * args.images)}.values())[: args.images]
    spread = torch.tensor(energy_spread(vlm, examples))
    found = energies(vlm, examples)
    layer = int(found.amax((0, 2)).argmax())
    massive = (found[:, layer] > MASSIVE * found[:, layer].max()).sum(1)
    order, rows = spread.argsort(), []
    for most in (1, 2, 3, 5):
        few = massive <= most
        least = few[order[: int(few.sum())]]
        rows.append({"most": most, "images": int(few.sum()), "among_least_spread": int(least.sum())})
        log(f"at most {most} massive tokens: {rows[-1]}")
    write("rare", rows, seeds=[0], data="easy-vqa:train", num_images=len(examples), layer=layer, median_massive=int(massive.median()))


if __name__ == "__main__":
    main()
