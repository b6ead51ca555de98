"""The demo as a Hugging Face Space: a folder that runs with `python app.py`."""

import importlib.metadata
import platform
import shutil
from pathlib import Path

from medqa_lib.config import MODELS, Profile, current_profile
from medqa_lib.publish.hub import copy_adapter, public_name

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "gguf", "gradio")


def write_space(folder: Path, adapters: dict[str, Path], profile: Profile | None = None) -> Path:
    """Adapters, this package, an app.py and the versions installed here. A Space that is there is replaced.

    Raises:
        ValueError: the base model is a folder of this machine, or `folder` holds something else than a Space.
    """
    profile = profile or current_profile()
    if profile.model not in MODELS and Path(profile.model).expanduser().exists():
        raise ValueError(f"The base model {profile.model} is a folder of this machine, which a Space does "
                         "not have: set MEDQA_MODEL to the model's name on the Hub.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "app.py").exists():
        raise ValueError(f"{folder} holds something else than a Space. Choose another folder.")
    new, package = folder.with_name(f"{folder.name}.new"), Path(__file__).parents[1]
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(package, new / package.name, ignore=shutil.ignore_patterns("__pycache__", "sample"))
    for name, source in adapters.items():
        copy_adapter(source, new / "adapters" / name, public_name(profile))
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}
    requirements = "".join(f"{name}=={version}\n" for name, version in versions.items())
    (new / "requirements.txt").write_text(requirements)
    words = {"BASE_MODEL": profile.model, "GRADIO_VERSION": versions["gradio"],
             "PYTHON_VERSION": ".".join(platform.python_version_tuple()[:2])}
    for template, file in {"space.md": "README.md", "space_app.py": "app.py"}.items():
        text = (Path(__file__).parent / template).read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(word, value)
        (new / file).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return folder
