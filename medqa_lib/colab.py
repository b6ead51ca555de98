"""The Colab edge: secrets and Drive. Outside Colab `hf_login` says where the token comes from, and `mount_drive` is `project_dir`.

Nothing here raises for want of a token or of Drive: a notebook goes on with less, and the note says what is missing.
"""

from __future__ import annotations

import os
from pathlib import Path

from medqa_lib.config import home_dir

DRIVE = Path("/content/drive")
SCRATCH = Path("/content/medqa_scratch")
TOKEN_NAME = "HF_TOKEN"


def in_colab() -> bool:
    """Whether this process runs in a Colab runtime, in the notebook itself or in its terminal."""
    return "COLAB_RELEASE_TAG" in os.environ


def hf_login() -> str:
    """Put the Hugging Face token into HF_TOKEN, where every library looks, and say where it came from; never print or store it.

    Returns:
        "Colab secret", "environment", "saved login" (of `hf auth login`, which the libraries read themselves) or "none".
    """
    token, problem = _read_colab_secret() if in_colab() else ("", "")
    source = "Colab secret" if token else "environment"
    token = token or os.environ.get(TOKEN_NAME, "").strip()
    if token:
        os.environ[TOKEN_NAME] = token
        print(f"Hugging Face token: {source}")
        return source
    if _has_saved_login():
        print("Hugging Face token: saved login")
        return "saved login"
    where = "add the secret HF_TOKEN (key symbol on the left) and grant access" if in_colab() else "set the environment variable HF_TOKEN"
    print(f"Hugging Face token: none{problem}. All but two things work without it: the gated copy of AfriMed-QA (its open mirror is "
          f"read instead) and uploads to the Hub. To have them, {where}.")
    return "none"


def _read_colab_secret() -> tuple[str, str]:
    """The token ("" if there is none) and why there is none, without the words of the exception: those are not ours to trust."""
    try:
        from google.colab import userdata

        return (userdata.get(TOKEN_NAME) or "").strip(), ""
    except Exception as error:  # not found, access not granted, time-out, or no notebook to ask in
        return "", f" ({type(error).__name__} from Colab's secrets)"


def _has_saved_login() -> bool:
    from huggingface_hub import get_token

    try:
        return bool(get_token())
    except Exception:  # an expired login that could not be renewed is none
        return False


def mount_drive() -> Path:
    """In Colab, mount Drive and let MEDQA_HOME be `medqa` on it, so results outlast the runtime. Safe to call again.

    A MEDQA_HOME that is already set wins.

    Returns:
        The project folder, as `project_dir` does.
    """
    if in_colab() and "MEDQA_HOME" not in os.environ:
        if (DRIVE / "MyDrive").is_dir() or _mount():
            os.environ["MEDQA_HOME"] = str(DRIVE / "MyDrive" / "medqa")
            os.environ.setdefault("MEDQA_SCRATCH", str(SCRATCH))  # the Trainer saves here; checkpoints are then copied to Drive
        else:
            print("Results stay on this runtime and are lost with it. To keep them, run this in a notebook and allow access to Drive.")
    return project_dir()


def _mount() -> bool:
    try:
        from google.colab import drive

        drive.mount(str(DRIVE))
    except Exception as error:  # access declined, time-out, or no notebook to ask in
        print(f"Google Drive was not mounted: {type(error).__name__}.")
    return (DRIVE / "MyDrive").is_dir()


def project_dir() -> Path:
    """The folder for everything that must last: checkpoints, adapters, results, figures. Made if it is not there."""
    folder = home_dir()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
