"""Adapters for the two-layer smoke model, made in a moment: tests only."""

from pathlib import Path

import torch

from medqa_lib.config import PROFILES, LoraSettings
from medqa_lib.model import add_lora, load_base_model, load_tokenizer

SMOKE = PROFILES["smoke"]


def make_adapter(folder: Path, seed: int = 1, settings: LoraSettings | None = None) -> Path:
    """An adapter as training leaves it, with random weights that are large enough to change every answer."""
    model = add_lora(load_base_model(SMOKE), settings or LoraSettings(), seed)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    load_tokenizer(SMOKE).save_pretrained(folder)
    return folder
