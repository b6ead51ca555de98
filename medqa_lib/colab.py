"""The Colab edge: the Hub token and Drive. Without them a notebook goes on and says what it lacks."""

import os
import sys
from pathlib import Path

from medqa_lib.config import DRIVE, make_home, read_settings

TOKEN = "HF_TOKEN"


def in_colab() -> bool:
    """Whether this process runs in a Colab runtime, in the notebook itself or in its terminal."""
    return "COLAB_RELEASE_TAG" in os.environ


def show_bold(text: str) -> None:
    """Print the text, in bold type where the output is a notebook."""
    ipython = sys.modules.get("IPython")
    if not ipython or ipython.get_ipython() is None:
        return print(text)
    ipython.display.display(ipython.display.Markdown(f"**{text}**"))


def hf_login() -> str:
    """Put the Hugging Face token into HF_TOKEN, where every library looks; never print or store it.

    A token that the Hub refuses (expired, revoked) is put aside: it would block public models, too.

    Returns:
        "Colab secret", "environment", "saved login" (of `hf auth login`) or "none".
    """
    from huggingface_hub import constants

    token, problem = _read_secret() if in_colab() else ("", "")
    source = "Colab secret" if token else "environment"
    token = token or os.environ.get(TOKEN, "").strip()
    if not token and Path(constants.HF_TOKEN_PATH).exists():
        source, token = "saved login", Path(constants.HF_TOKEN_PATH).read_text().strip()
    if token and (user := _ask_who_owns(token)):
        os.environ[TOKEN] = token
        print(f"Hugging Face token: {source}{user}")
        return source
    os.environ.pop(TOKEN, None)
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True  # else the libraries look again, and Colab asks again
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # the same for processes to come
    if token:
        show_bold(f"The Hub refused the token ({source}): it has expired or was revoked. Make a new one at "
                  "huggingface.co/settings/tokens. This run goes on without a token.")
    how = "add the secret HF_TOKEN (key symbol on the left)" if in_colab() else "set the variable HF_TOKEN"
    print(f"Hugging Face token: none{problem}. Two things need one: the gated copy of AfriMed-QA (its open "
          f"mirror is read instead) and uploads to the Hub. To have them, {how}.")
    return "none"


def _read_secret() -> tuple[str, str]:
    """The secret ("" if there is none) and why. The exception's text is left out: it may hold the secret."""
    try:
        from google.colab import userdata

        return (userdata.get(TOKEN) or "").strip(), ""
    except Exception as error:  # not found, access not granted, time-out, or no notebook to ask in
        return "", f" ({type(error).__name__} from Colab's secrets)"


def _ask_who_owns(token: str) -> str:
    """What to print after a token that the Hub accepts; "" if it refuses the token."""
    from huggingface_hub import HfApi

    try:
        return f", user {HfApi().whoami(token)['name']}"
    except Exception as error:  # no network, or the Hub's refusal
        refused = getattr(getattr(error, "response", None), "status_code", 0) == 401
        return "" if refused else " (not checked: the Hub did not answer)"


def mount_drive() -> Path:
    """The project folder; in Colab it is `medqa` on Drive, so that results outlast the runtime.

    Safe to call again. A MEDQA_HOME that is already set wins. Call it before other imports: libraries read
    where the Hub's cache is (on Drive, if the user has chosen so) when they are imported.
    """
    if in_colab() and "MEDQA_HOME" not in os.environ:
        problem = "" if (DRIVE / "MyDrive").is_dir() else _mount()
        if problem:
            show_bold(f"Google Drive is not mounted ({problem}). Results stay on this runtime and ARE LOST "
                      "WITH IT. To keep them, run this cell again and allow access to Drive.")
        else:
            os.environ["MEDQA_HOME"] = str(DRIVE / "MyDrive" / "medqa")
    folder = make_home()
    if read_settings()["hub_cache_on_drive"]:
        os.environ.setdefault("HF_HUB_CACHE", str(folder / "hub"))
    return folder


def _mount() -> str:
    """Mount Drive; returns why it was not mounted, "" if it was."""
    try:
        from google.colab import drive

        drive.mount(str(DRIVE))
    except Exception as error:  # access declined, domain policy, time-out, or no notebook to ask in
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "" if (DRIVE / "MyDrive").is_dir() else "no MyDrive in it"
