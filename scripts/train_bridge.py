"""Train the demo model's bridge (projector and LoRA on the language linears) on easy-VQA's training split.

    python scripts/train_bridge.py --epochs 2 --autocast --max-steps 500 --out src/infoprune/demo/bridge.safetensors

1. Vision features of all training images are computed once (the vision tower stays frozen).
2. Alignment: the projector alone learns to place image tokens near the word embeddings of the image's colour and shape, both taken
   from training answers. It takes seconds and saves the language model most of the search for a common code.
3. Projector and LoRA learn to answer. An image's questions share its tokens in one packed row (``infoprune.packing``).

Progress is watched on the validation split (one training image in twenty); the test split is never read. The last weights are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from infoprune.data import Example, load_examples
from infoprune.demo.assemble import BRIDGE, LORA_ALPHA, LORA_RANK, build_without_bridge
from infoprune.packing import PackedBatch, pack_encoded
from infoprune.prompts import Encoded, PromptEncoder

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLOURS = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"]
SHAPES = ["circle", "rectangle", "triangle"]


def by_image(examples: list[Example]) -> dict[Path, list[Example]]:
    groups: dict[Path, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.image].append(example)
    return groups


@torch.no_grad()
def vision_features(model: Any, encoder: PromptEncoder, images: list[Path], log) -> dict[Path, torch.Tensor]:
    """Output of the vision tower without its CLS token, (36, 384) for each image."""
    features = {}
    for start in range(0, len(images), 64):
        chunk = images[start : start + 64]
        pixels = encoder.image_inputs([Example(path, "", "").load_image() for path in chunk])["pixel_values"]
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        features.update(zip(chunk, hidden, strict=True))
    log(event="vision features", images=len(images))
    return features


def align(
    projector: nn.Module, features: torch.Tensor, groups: list[list[Example]], embedding: torch.Tensor, tokenizer, steps: int, log
) -> None:
    """Train the projector to classify colour and shape against the language model's own word embeddings.

    Args:
        features: (images, tokens, vision hidden).
        groups: The questions of each image.
        embedding: (vocabulary, hidden) of the language model.
    """

    def labels(words: list[str]) -> torch.Tensor:
        return torch.tensor([next((words.index(e.answer) for e in group if e.answer in words), -100) for group in groups])

    def directions(words: list[str]) -> torch.Tensor:
        table = torch.stack([embedding[tokenizer(" " + word, add_special_tokens=False)["input_ids"]].mean(0) for word in words])
        return nn.functional.normalize(table - embedding.mean(0), dim=1)

    goals = [(labels(words), directions(words)) for words in (COLOURS, SHAPES)]
    size = embedding.norm(dim=1).mean()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.01)
    loss_of = nn.CrossEntropyLoss()
    for step in range(steps):
        index = torch.randint(len(features), (256,))
        tokens = projector(features[index])
        pooled = nn.functional.normalize(tokens.mean(1), dim=1)
        losses = [loss_of(20 * pooled @ words.T, label[index]) for label, words in goals]
        loss = sum(losses) + (tokens.norm(dim=2).mean() / size).log().square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            log(event="align", step=step + 1, colour=losses[0].item(), shape=losses[1].item(), loss=loss.item())


def answer_logits_from_features(model: Any, batch: PackedBatch, features: torch.Tensor, autocast: bool) -> torch.Tensor:
    """As ``packing.answer_logits``, with vision features computed beforehand."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeds = model.model.language_model.get_input_embeddings()(batch.inputs["input_ids"])
        image = model.model.multi_modal_projector(features).to(embeds.dtype)
        embeds = embeds.masked_scatter(batch.image[..., None], image)
        output = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=batch.inputs["attention_mask"],
            position_ids=batch.inputs["position_ids"],
            use_cache=False,
        )
        return model.lm_head(output.last_hidden_state[batch.rows, batch.columns]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images-per-step", type=int, default=8)
    parser.add_argument("--align-steps", type=int, default=200)
    parser.add_argument("--lr-projector", type=float, default=6e-4)
    parser.add_argument("--lr-lora", type=float, default=6e-4)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 matrix products; only worth it where the CPU has them (AMX)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--out", type=Path, default=BRIDGE)
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/bridge-training.jsonl"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    written = args.log.with_suffix(".partial")  # the log that is there stays until this run has ended
    log_file = written.open("w")
    begin = time.time()

    def log(**record) -> None:
        line = json.dumps(
            {"seconds": round(time.time() - begin, 1)} | {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
        )
        log_file.write(line + "\n")
        log_file.flush()
        print(line, flush=True)

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    log(
        event="start",
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        cpu=platform.machine(),
        **settings,
    )

    model: Any
    model, processor = build_without_bridge(lambda message: log(event=message))
    encoder = PromptEncoder(processor, model.config.image_token_id)
    groups = by_image(load_examples("easy-vqa:train"))
    train, held_out = list(groups), by_image(load_examples("easy-vqa:validation"))
    groups |= held_out
    images = list(groups)
    features = vision_features(model, encoder, images, log)

    projector = model.model.multi_modal_projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    align(
        projector,
        torch.stack([features[i] for i in train]),
        [groups[i] for i in train],
        model.get_input_embeddings().weight.detach(),
        processor.tokenizer,
        args.align_steps,
        log,
    )

    peft_config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=LINEARS, bias="none")
    get_peft_model(model.model.language_model, peft_config)  # wraps the linears in place
    lora = {name: p for name, p in model.model.language_model.named_parameters() if "lora_" in name}
    for parameter in lora.values():
        parameter.requires_grad_(True)

    encoded: dict[Path, list[Encoded]] = {}
    for image, examples in groups.items():
        loaded = examples[0].load_image()
        encoded[image] = [encoder.encode(example, loaded) for example in examples]
    log(event="tokenised", questions=sum(map(len, encoded.values())))

    def batch_of(chosen: list[Path]) -> tuple[PackedBatch, torch.Tensor]:
        packed = pack_encoded(encoder, [encoded[i] for i in chosen], {}, always=True)
        return packed, torch.stack([features[i] for i in chosen])

    @torch.no_grad()
    def validate() -> float:
        model.eval()
        right = total = 0
        chosen = sorted(held_out)
        for start in range(0, len(chosen), 16):
            batch, feature = batch_of(chosen[start : start + 16])
            hit = answer_logits_from_features(model, batch, feature, False).argmax(1) == batch.targets
            wrong = torch.zeros(batch.num_questions, dtype=torch.bool).index_put((batch.question[~hit],), torch.tensor(True))
            right, total = right + int((~wrong).sum()), total + batch.num_questions
        model.train()
        return 100 * right / total

    steps = args.epochs * math.ceil(len(train) / args.images_per_step)
    optimizer = torch.optim.AdamW(
        [{"params": list(projector.parameters())}, {"params": list(lora.values())}], lr=args.lr_lora, weight_decay=0.0, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [args.lr_projector, args.lr_lora], total_steps=steps, pct_start=0.1)
    order: list[Path] = []
    running, seen = None, 0
    model.train()
    last = min(steps, args.max_steps or steps)
    for step in range(1, last + 1):
        if len(order) < args.images_per_step:
            order += random.sample(train, len(train))
        chosen, order = order[: args.images_per_step], order[args.images_per_step :]
        batch, feature = batch_of(chosen)
        loss = nn.functional.cross_entropy(answer_logits_from_features(model, batch, feature, args.autocast), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*projector.parameters(), *lora.values()], 1.0)
        optimizer.step()
        schedule.step()
        seen += batch.num_questions
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0:
            log(event="train", step=step, of=steps, questions=seen, loss=running)
        if step % 250 == 0 or step == last:
            log(event="held out", step=step, accuracy=validate())
            save(args.out, projector, lora)
    log(event="done", megabytes=args.out.stat().st_size / 1e6)
    written.replace(args.log)


def save(path: Path, projector: nn.Module, lora: dict[str, torch.Tensor]) -> None:
    """Write the bridge in bfloat16, aside first and then in place."""
    tensors = {f"projector.{name}": value for name, value in projector.state_dict().items()}
    for name, value in lora.items():
        module, side = name.removesuffix(".default.weight").rsplit(".lora_", 1)
        tensors[f"lora.{module}.{side}"] = value
    aside = path.with_suffix(".partial")
    save_file({name: value.detach().to(torch.bfloat16).contiguous() for name, value in tensors.items()}, aside)
    aside.rename(path)


if __name__ == "__main__":
    main()
