"""The demo as a folder for Hugging Face Spaces."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path

from medqa_lib.config import MODELS, Profile, current_profile
from medqa_lib.publish.hub import copy_adapter, public_name

SPACE_README = """\
---
title: medqa
emoji: 🩺
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: cc-by-nc-sa-4.0
---

Base and tuned answers of {model} to medical questions, side by side. Research demo, **not medical advice**; the adapters are
non-commercial (CC BY-NC-SA 4.0), since AfriMed-QA is. `python app.py` starts it anywhere.
"""
SPACE_APP = '''\
"""Starts the demo with the adapters in this folder."""

import os

os.environ.setdefault("MEDQA_MODEL", "{model}")

from medqa_lib.publish.demo import main  # noqa: E402

main(["--adapter", "adapters"])
'''
SPACE_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "gguf", "gradio")


def write_space(folder: Path, adapters: dict[str, Path], profile: Profile | None = None) -> Path:
    """A folder that runs as a Hugging Face Space, or in any environment with its requirements: `python app.py`.

    It holds these adapters and no others, a copy of this package, and the versions that are installed here.

    Raises:
        ValueError: the base model is a folder of this machine, or the folder's adapters were not put there by an earlier call.
    """
    profile = profile or current_profile()
    if profile.model not in MODELS and Path(profile.model).expanduser().exists():
        raise ValueError(f"The base model {profile.model} is a folder of this machine, which a Space does not have: set MEDQA_MODEL to the "
                         "model's name on the Hub, and write the Space again.")
    shown, app, first_line = folder / "adapters", folder / "app.py", SPACE_APP.partition("\n")[0]
    if shown.exists() and not (app.exists() and app.read_text().startswith(first_line)):
        raise ValueError(f"{shown} is there already and is no Space's: it would be replaced. Choose another folder.")
    package = Path(__file__).parents[1]
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "sample"), dirs_exist_ok=True)
    app.write_text(SPACE_APP.format(model=profile.model))
    new = folder / "adapters.new"
    shutil.rmtree(new, ignore_errors=True)
    for name, source in adapters.items():
        copy_adapter(source, new / name, public_name(profile))
    shutil.rmtree(shown, ignore_errors=True)  # an earlier call's: what it holds would be published
    if adapters:
        new.rename(shown)
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in SPACE_PACKAGES}
    (folder / "requirements.txt").write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    python = ".".join(platform.python_version_tuple()[:2])
    (folder / "README.md").write_text(SPACE_README.format(gradio=versions["gradio"], python=python, model=profile.model), encoding="utf-8")
    return folder
