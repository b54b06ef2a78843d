from __future__ import annotations

import dataclasses

import pytest

from infoprune.cli.recipe import read_recipe
from infoprune.errors import InfoPruneError
from infoprune.options import BUDGETS, CompressionOptions
from infoprune.training.options import TrainingOptions

KINDS = (CompressionOptions, TrainingOptions)
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]

# Every option as a recipe gives it, and what becomes of it; a new option fails below until it is here.
VALUES = {
    "flops": ("0.5", 0.5),
    "speedup": ("2", 2.0),
    "ks": ("1e-1", 0.1),
    "max_drop": ("1", 1.0),
    "confidence": ("9e-1", 0.9),
    "certify": ("vqav2", "vqav2"),
    "certify_images": ("500", 500),
    "certify_per_image": ("3", 3),
    "certify_metric": ("exact", "exact"),
    "shares": ("[1, 0.5, 2e-1]", (1.0, 0.5, 0.2)),
    "heads": ("erank-ks", "erank-ks"),
    "ffn": ("width", "width"),
    "neurons": ("taylor", "taylor"),
    "layers": ("block-influence", "block-influence"),
    "towers": ("[text]", ("text",)),
    "compensate": ("mean", "mean"),
    "alpha": ("1", 1.0),
    "ffn_metric": ("identity", "identity"),
    "centred": ("no", False),
    "structure": ("separate", "separate"),
    "whitening": ("diagonal", "diagonal"),
    "shrinkage": ("0", 0.0),
    "allocation": ("uniform", "uniform"),
    "weighting": ("uniform", "uniform"),
    "temperature": ("2", 2.0),
    "top_k": ("50", 50),
    "examples": ("12", 12),
    "rare": ("0.1", 0.1),
    "repair": ("false", False),
    "rank_multiple": ("64", 64),
    "floor": ("2.5e-1", 0.25),
    "seed": ("7", 7),
    "skip_bad": ("true", True),
    "recovery": ("lora", "lora"),
    "gate_steps": ("10", 10),
    "gate_rate": ("1e-1", 0.1),
    "gate_images_per_step": ("2", 2),
    "gate_prior": ("6", 6.0),
    "gate_cost": ("time", "time"),
    "attention_share": ("0.4", 0.4),
    "gate_ffn": ("true", True),
    "gate_lora": ("4", 4),
    "cross_entropy_weight": ("0", 0.0),
    "distillation_weight": ("5e-1", 0.5),
    "distillation_temperature": ("1", 1.0),
    "hidden_weight": ("1e+1", 10.0),
    "rate_weight": ("1E-3", 0.001),
    "ks_weight": ("0.2", 0.2),
    "refresh": ("5", 5),
    "multiplier_rate": ("0.1", 0.1),
    "recovery_steps": ("50", 50),
    "recovery_rate": ("1e-3", 0.001),
    "gate_lora_rate": ("2e-4", 0.0002),
    "lora_rank": ("8", 8),
    "images_per_step": ("4", 4),
    "questions_per_image": ("2", 2),
    "validation": ("easy-vqa:test", "easy-vqa:test"),
    "validation_questions": ("100", 100),
    "evaluate_every": ("10", 10),
    "patience": ("3", 3),
    "checkpoint_every": ("1", 1),
    "precision": ("bf16", "bf16"),
    "shard": ("true", True),
    "trackers": ("[tensorboard, wandb]", ("tensorboard", "wandb")),
}


@pytest.fixture
def recipe(tmp_path):
    def written(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return written


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: getattr(value, "name", None) or value.__name__)
def test_every_option_comes_from_a_recipe(recipe, kind, field):
    text, expected = VALUES[field.name]
    found = read_recipe(recipe(f"{field.name}: {text}\n"))[field.name]
    assert (found, type(found)) == (expected, type(expected))
    beside = {"max_drop": 1.0} if field.name.startswith("certify") else {"flops": 0.5}
    beside = beside if kind is CompressionOptions and field.name not in BUDGETS else {}
    assert getattr(kind(**beside, **{field.name: found}), field.name) == expected != field.default


def test_an_option_may_be_left_open(recipe):
    assert read_recipe(recipe("attention_share: null\ntop_k:\n")) == {"attention_share": None, "top_k": None}
    with pytest.raises(InfoPruneError, match="gate_rate=None"):
        read_recipe(recipe("gate_rate: null\n"))


@pytest.mark.parametrize("text", ["output: 2026-13-45", "flops: 0.5\nflops: 0.3", "data: " + "[" * 3000])
def test_what_yaml_can_not_read_is_told(recipe, text):
    with pytest.raises(InfoPruneError, match=r"^Cannot read the recipe"):
        read_recipe(recipe(text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("attention_share: half", "attention_share='half', which is not a number"),
        ("attention_share: true", "attention_share=True, which is not a number"),
        ("recovery_rate: [1e-3]", r"recovery_rate=\['1e-3'\], which is not a number"),
        ("gate_rate: .nan", "gate_rate=nan, which is not a number"),
        ("speedup: inf", "speedup='inf', which is not a number"),
        ("gate_steps: 1.5", "gate_steps=1.5, which is not a whole number"),
        ("seed: true", "seed=True, which is not a whole number"),
        ("top_k: 1e2", "top_k='1e2', which is not a whole number"),
        ("shard: 1", "shard=1, which is not true or false"),
        ("repair: 'no'", "repair='no', which is not true or false"),
        ("validation: 3", "validation=3, which is not a string"),
        ("certify: [a, b]", r"certify=\['a', 'b'\], which is not a string"),
        ("model: 3", "model=3, which is not a string"),
        ("ffn: rank", "ffn='rank', which is not one of low-rank, width, none"),
        ("structure: [joint]", r"structure=\['joint'\], which is not one of joint, separate, best"),
        ("trackers: wandb", "trackers='wandb', which is not a list, each entry a string"),
        ("shares: [0.9, mild]", r"shares=\[0.9, 'mild'\], which is not a list, each entry a number"),
        ("towers: [vision, audio]", r"towers=\['vision', 'audio'\], which is not a list, each entry one of vision, text"),
    ],
)
def test_a_value_of_another_type_is_refused(recipe, text, told):
    path = recipe(f"{text}\n")
    with pytest.raises(InfoPruneError, match=f"^The recipe {path} gives {told}\\.$"):
        read_recipe(path)
