"""The search behind exp_005, on the group split's whole validation part: rates, layers, then one change at a time.

    python tests/bench/search_recipe.py OUT.csv [--part I/N]

A trial is exp_004 with some fields changed, 400 steps; its figure is the merged model's validation loss with correct labels.
Finished trials in OUT.csv are skipped. `--part 0/4` takes every fourth trial, so that processes can share a GPU (a file each).
"""

import argparse
import dataclasses
import tempfile
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from medqa_lib.config import ALL_LINEAR, current_profile, get_experiment
from medqa_lib.data import hash_splits, prepare_splits
from medqa_lib.evaluation import likelihood
from medqa_lib.evaluation.results import run_identity
from medqa_lib.evaluation.run import encode_validation
from medqa_lib.model import load_merged, load_tokenizer
from medqa_lib.training.run import train_adapter
from medqa_lib.training.session import CheckpointSession

BEST = {"learning_rate": 4e-3, "lr_scheduler_type": "cosine", "target_modules": ALL_LINEAR}


def trials() -> dict[str, dict]:
    """Name -> changes to exp_004: 12 of round 1 (rates and layers), 8 of round 2 (one change to round 1's best)."""
    found = {"exp_004_recipe": {}, "linear_2e-4": {"target_modules": ALL_LINEAR}}
    for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
        for prefix, layers in (("", {"target_modules": ALL_LINEAR}), ("qkv_", {})):
            name = f"{prefix}cosine_{rate:.0e}".replace("e-0", "e-")
            found[name] = {"learning_rate": rate, "lr_scheduler_type": "cosine", **layers}
    changes = {
        "dropout_0": {"lora_dropout": 0.0},
        "truncation_cut": {"truncation": "cut"},
        "truncation_drop": {"truncation": "drop"},
        "warmup_0.1": {"warmup_ratio": 0.1},
        "weight_decay_0.01": {"weight_decay": 0.01},
        "r16": {"r": 16, "lora_alpha": 32},
        "seed_43": {"seed": 43},
        "seed_44": {"seed": 44},
    }
    return found | {f"cosine_4e-3+{name}": BEST | change for name, change in changes.items()}


def run_trial(name: str, changes: dict, splits, profile) -> dict:
    """Train, merge, and measure the validation loss."""
    recipe = get_experiment("exp_004")
    lora = {key: value for key, value in changes.items() if hasattr(recipe.lora, key)}
    rest = {key: value for key, value in changes.items() if key not in lora}
    experiment = dataclasses.replace(recipe, name=name, lora=dataclasses.replace(recipe.lora, **lora), **rest)
    experiment = profile.scale(experiment)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        identity = run_identity(experiment, profile, hash_splits(splits))
        with CheckpointSession(folder, folder, identity) as session:
            numbers = train_adapter(experiment, splits, profile, session, folder / "adapter")[1]
        model = load_merged(folder / "adapter", profile)
    validation = encode_validation(load_tokenizer(profile), splits["validation"], profile)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    said = "; ".join(f"{key} {value if isinstance(value, str | float | int) else 'all linear'}" for key, value in changes.items())
    return {
        "round": 2 if "+" in name else 1,
        "name": name,
        "validation_loss": likelihood.completion_loss(model, validation),
        "changes": said,
        "trainable_share": numbers["trainable_share"],
        "train_time_s": round(numbers["train_time_s"], 1),
        "n_validation": len(validation),
        "gpu": gpu,
        "date": date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", default="0/1")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    profile, splits = current_profile(), prepare_splits()
    for name, changes in list(trials().items())[part::parts]:
        if name not in {row["name"] for row in rows}:
            rows.append(run_trial(name, changes, splits, profile))
            pd.DataFrame(rows).to_csv(options.out, index=False)
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
