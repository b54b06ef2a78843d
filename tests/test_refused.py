"""Every model for images and text that Transformers knows is either supported or refused by name."""

from __future__ import annotations

import sys

import pytest
from PIL import Image
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, GPT2Config, VisionEncoderDecoderConfig, ViTConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import infoprune
from infoprune.cli import main
from infoprune.errors import UnsupportedModelError
from infoprune.families import FAMILIES, REFUSED

# The one configuration that has no default.
PAIR = {"vision-encoder-decoder": lambda: VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2Config())}


def refused(model_type, folder):
    """A checkpoint of which only the configuration can be read."""
    PAIR.get(model_type, CONFIG_MAPPING[model_type])().save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    return folder


def test_every_family_is_supported_or_refused_by_name():
    assert not FAMILIES.keys() & REFUSED.keys()
    assert sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - FAMILIES.keys() - REFUSED.keys()) == []


@pytest.mark.parametrize("model_type", [name for name in REFUSED if name in CONFIG_MAPPING])
def test_refusal_gives_the_reason_before_weights_are_read(model_type, tmp_path):
    with pytest.raises(UnsupportedModelError) as told:
        infoprune.load(refused(model_type, tmp_path / "model"))
    assert f"The model family '{model_type}' is not supported: {REFUSED[model_type]}." in str(told.value)
    assert "\n" not in str(told.value)


def test_command_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    monkeypatch.setattr(sys, "argv", ["infoprune", "ask", str(refused("clip", tmp_path / "model")), str(image), "what?"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: The model family 'clip' is not supported: it is a dual encoder")
