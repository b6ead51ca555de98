"""Adapters from and to the Hugging Face Hub: find, check, load, describe in a model card, publish.

What is published is a folder that `save_local` writes without a token; `push` uploads that folder and nothing else, and only
after the parity gate of `export` has passed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from medqa_lib.config import MODELS, Profile, current_profile, home_dir
from medqa_lib.prompts import TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, PARITY = "adapter_config.json", "adapter_model.safetensors", "parity.csv"
PUBLISHED = (CONFIG, WEIGHTS, PARITY, "README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
             "chat_template.jinja")

# What others know a model by that this project does not take from the Hub.
PUBLIC_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "smoke-llama": "smoke-llama-1"}


def public_name(profile: Profile | None = None) -> str:
    """The Hub name of this profile's base model."""
    model = (profile or current_profile()).model
    return PUBLIC_NAMES.get(model) or MODELS.get(model, model)


def find_adapters(source: str | Path | None = None, profile: Profile | None = None) -> dict[str, Path]:
    """Adapters by name, the newest first.

    Args:
        source: a folder, a Hub repository "owner/name" or the address of one; a model repository, or a Space. The adapter lies in
            it, or several lie in its subfolders. None: those that this profile's runs have left under `home_dir()`.
    Returns:
        Name -> folder; empty only if source is None and there has been no run.
    Raises:
        ValueError: there is no adapter in what source names.
    """
    if source is None:
        root = home_dir() / "adapters" / (profile or current_profile()).model_slug
    else:
        root = Path(source).expanduser() if Path(source).expanduser().exists() else _download_adapters(str(source))
    folders = [file.parent for file in root.rglob(CONFIG) if (file.parent / WEIGHTS).exists()]
    folders = [folder for folder in folders if "checkpoint-" not in folder.relative_to(root).as_posix()]
    if source is None:
        folders = [folder for folder in folders if not folder.name.startswith("search_")]  # trials of `search`
    if source is not None and not folders:
        raise ValueError(f"There is no adapter in {source}, nor in its subfolders: expected {CONFIG} and {WEIGHTS}. A pickle "
                         "(adapter_model.bin) is not loaded, since it can run code.")
    folders.sort(key=lambda folder: (-(folder / WEIGHTS).stat().st_mtime, folder.name))
    if folders == [root]:
        return {_adapter_name(str(source).rstrip("/").rpartition("/")[2] if source else root.name): root}
    return {_adapter_name(folder.relative_to(root).as_posix().removeprefix("adapters/")): folder for folder in folders}


def _adapter_name(name: str) -> str:
    return name.replace("/", "-").replace(".", "_")  # PEFT keeps adapters in a ModuleDict, which refuses dots


def _download_adapters(repository: str) -> Path:
    """Only settings and safetensors of a model repository or, if there is none of that name, of a Space."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    name = repository.removeprefix("https://huggingface.co/").strip("/")
    kinds = ("space",) if name.startswith("spaces/") else ("model", "space")
    for kind in kinds:
        try:
            return Path(snapshot_download(name.removeprefix("spaces/"), repo_type=kind, allow_patterns=[f"*{CONFIG}", f"*{WEIGHTS}"]))
        except RepositoryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{repository!r} is no folder here, and the Hub did not give it: {reason} Check name and network.") from None
    raise ValueError(f"{repository!r} is neither a folder here nor a {' or '.join(kinds)} on the Hub that this token may read. "
                     "Check the name; a private one needs a login (notebook 01).")


def check_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Refuse an adapter that was not trained on this model, or whose weights are not what its settings say.

    PEFT itself only warns, and then answers with untrained weights.

    Raises:
        ValueError: base model, revision or LoRA settings do not fit; the message has what the adapter says and what was expected.
    """
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    base, found = settings.get("base_model_name_or_path") or "", model.config._name_or_path
    if not _same_model(base, found):
        raise ValueError(f"Adapter {folder.name} was trained on {base!r}, but the base model here is {found!r}. Set MEDQA_MODEL to the "
                         "model it was trained on, or choose another adapter.")
    revision, commit = settings.get("revision"), getattr(model.config, "_commit_hash", None)
    if revision and commit and revision not in (commit, "main"):
        raise ValueError(f"Adapter {folder.name} was trained on revision {revision} of {base}, but revision {commit} is loaded here.")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"Adapter {folder.name} is of type {settings.get('peft_type')}, expected LORA.")
    problems = _compare_weights(folder, settings, model)
    if problems:
        raise ValueError(f"The weights of adapter {folder.name} do not fit its settings or the base model: {'; '.join(problems[:3])}. "
                         "The files are damaged or mixed up; fetch or train it again.")


def _same_model(first: str, second: str) -> bool:
    """Hub names must be equal; a local copy is known by its folder's name."""
    first, second = first.rstrip("/").lower(), second.rstrip("/").lower()
    hub_names = all(name.count("/") == 1 and not name.startswith((".", "~", "/")) for name in (first, second))
    return first == second if hub_names else first.rpartition("/")[2] == second.rpartition("/")[2]


def _compare_weights(folder: Path, settings: dict, model: PreTrainedModel) -> list[str]:
    """Names and shapes in the safetensors header against those that rank, targets and the model's layers give."""
    from safetensors import safe_open

    targets, rank = settings["target_modules"], settings["r"]
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and name.rpartition(".")[2] in targets:
            expected[f"base_model.model.{name}.lora_A.weight"] = [rank, module.in_features]
            expected[f"base_model.model.{name}.lora_B.weight"] = [module.out_features, rank]
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {key: list(file.get_slice(key).get_shape()) for key in file.keys() if ".lora_A." in key or ".lora_B." in key}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if found.get(name) != expected.get(name)]
    return [f"{name} has shape {found.get(name, 'none')}, expected {expected.get(name, 'none')}" for name in wrong]


def load_adapters(model: PreTrainedModel, adapters: dict[str, Path]):
    """Check the adapters and load all of them beside each other; the first is active. Without any, the model comes back as it is.

    Raises:
        ValueError: one of them does not fit this model.
    """
    from peft import PeftModel

    for folder in adapters.values():
        check_adapter(folder, model)
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    return model


def chat_template(tokenizer) -> str:
    """`prompts.TEMPLATE` as the Jinja template that chat front ends, llama.cpp and Ollama's converters read."""
    before, after = TEMPLATE.split("{question}")
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{ bos_token }}" if adds_bos else "") + (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}"
        f"{{{{ {before!r} + message['content'] + {after!r} }}}}{{% endif %}}{{% endfor %}}")


def copy_adapter(source: Path, folder: Path, base_model: str) -> None:
    """Weights and settings of an adapter, with their dates; `base_model` is noted as its base, where training may have noted a path."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source / WEIGHTS, folder / WEIGHTS)
    settings = json.loads((source / CONFIG).read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copystat(source / CONFIG, folder / CONFIG)


def save_local(adapter_dir: Path, folder: Path, card: str, parity: pd.DataFrame, base_model: str) -> Path:
    """The folder that `push` uploads: adapter, tokenizer with this project's prompt as its chat template, card and parity table.

    Args:
        adapter_dir: as training left it.
        card: text of `card.write_card`.
        parity: table of `export.check_parity`.
        base_model: `public_name`.
    """
    from transformers import AutoTokenizer

    copy_adapter(adapter_dir, folder, base_model)
    tokenizer = AutoTokenizer.from_pretrained(adapter_dir)
    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    parity.to_csv(folder / PARITY, index=False)
    return folder


def plan_upload(folder: Path) -> pd.DataFrame:
    """What `push` would upload: file and size. Whatever else lies in the folder stays here."""
    files = [folder / name for name in PUBLISHED if (folder / name).exists()]
    return pd.DataFrame({"file": [file.name for file in files], "kB": [round(file.stat().st_size / 1000, 1) for file in files]})


def _read_parity(path: Path) -> pd.DataFrame:
    try:
        parity = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        parity = pd.DataFrame()
    if parity.empty or "passed" not in parity:
        raise ValueError(f"{path} holds no comparison, so nothing was uploaded: write it with export.check_parity and save_local.")
    return parity


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Show what will be uploaded, then upload it. Returns the repository's address.

    Raises:
        ValueError: no token, or the parity gate has not passed; nothing was uploaded.
        RuntimeError: the Hub refused; the message does not contain the token.
    """
    from huggingface_hub import HfApi, get_token

    plan = plan_upload(folder)
    print(f"To {repository} ({'private' if private else 'public'}):\n{plan.to_string(index=False)}")
    missing = {CONFIG, WEIGHTS, PARITY, "README.md"} - set(plan["file"])
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(sorted(missing))}; write it with save_local. Nothing was uploaded.")
    parity = _read_parity(folder / PARITY)
    if not parity["passed"].eq(True).all():  # a missing value is no pass
        raise ValueError(f"The parity gate has not passed, so nothing was uploaded:\n{parity.to_string(index=False)}")
    token = get_token()
    if not token:
        raise ValueError(f"There is no Hub token: log in first (notebook 01). Nothing was uploaded; the folder is {folder}.")
    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=list(plan["file"]), commit_message="Upload adapter")
    except Exception as error:  # whatever it is, its text may quote the request
        message = f"{type(error).__name__}: {error}".replace(token, "[token]")
    else:
        return f"https://huggingface.co/{repository}"
    raise RuntimeError(f"The Hub did not take {repository}: {message}")
