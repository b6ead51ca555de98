"""Adapters from and to the Hugging Face Hub: find, load, save as a folder to upload."""

import json
import shutil
import warnings
from pathlib import Path

import pandas as pd

from medqa_lib.config import MODELS, Profile, current_profile, home_dir
from medqa_lib.model import load_tokenizer
from medqa_lib.prompts import TEMPLATE
from medqa_lib.reasons import hub_reason, try_again

CONFIG, WEIGHTS, PARITY = "adapter_config.json", "adapter_model.safetensors", "parity.csv"
PUBLISHED = [CONFIG, WEIGHTS, PARITY, "README.md", "tokenizer.json", "tokenizer_config.json", "*.jinja",
             ".eval_results/*.yaml"]
STUDY = Path(__file__).parents[2] / "assets" / "adapters"
PREFERRED = ("exp_005", "exp_004")  # exp_001 to 003 learned labels that are shifted twice, to show the bug
# What others know a model by that this project does not take from the Hub.
PUBLIC_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "smoke-llama": "smoke-llama-1"}


def public_name(profile: Profile | None = None) -> str:
    """The Hub name of this profile's base model; of a folder on this machine the last part alone."""
    model = (profile or current_profile()).model
    folder = Path(model).expanduser()
    return PUBLIC_NAMES.get(model) or MODELS.get(model) or (folder.name if folder.is_dir() else model)


def find_adapters(source: str | Path | None = None, profile: Profile | None = None) -> dict[str, Path]:
    """Adapters by name: exp_005 first, then exp_004, then the others in alphabetical order.

    Args:
        source: a folder with adapters, also in subfolders, or a Hub repository (model or Space) by name or
            address. None: the adapters of this profile's runs under `home_dir()`, without any those of
            the published study.
    Returns:
        Name -> folder; empty only if source is None and there is nothing for this base model.
    Raises:
        ValueError: there is no adapter in what source names.
    """
    slug = (profile or current_profile()).model_slug
    root = Path(source or home_dir() / "adapters" / slug).expanduser()
    if source is None and not any(root.rglob(CONFIG)):
        root = STUDY / slug
    if source is not None and not root.exists():
        root = _download_adapters(str(source))
    found = {}
    for file in root.rglob(CONFIG):
        path = file.parent.relative_to(root).as_posix()
        if (file.parent / WEIGHTS).exists() and "checkpoint-" not in path:
            name = path.removeprefix("adapters/") if path != "." else Path(str(source)).name or "adapter"
            found[name.replace("/", "-").replace(".", "_")] = file.parent  # PEFT takes no dots in a name
    if source is not None and not found:
        raise ValueError(f"There is no adapter in {source}: expected {CONFIG} and {WEIGHTS}. A pickle "
                         "(adapter_model.bin) is not loaded, since it can run code.")
    first = [name for name in PREFERRED if name in found]
    return {name: found[name] for name in (*first, *sorted(found.keys() - first))}


def _download_adapters(address: str) -> Path:
    """Settings and safetensors of a model repository or, if there is none of that name, of a Space."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    name = address.removeprefix("https://huggingface.co/").strip("/")
    options = {"repo_id": name.removeprefix("spaces/"), "allow_patterns": [f"*{CONFIG}", f"*{WEIGHTS}"]}
    for kind in ("space",) if name.startswith("spaces/") else ("model", "space"):
        try:
            return Path(try_again(lambda kind=kind: snapshot_download(repo_type=kind, **options), name))
        except Exception as error:  # whatever the libraries below raise
            reason = hub_reason(error)
            if not isinstance(error, RepositoryNotFoundError):
                break
    raise ValueError(f"{address!r} is not a folder here, and {reason}. Check the name; a private "
                     "repository needs a login (notebook 01).")


def load_adapters(model, adapters: dict[str, Path]):
    """Load all adapters beside each other; the first is active. Without any, the model comes back as it is.

    PEFT itself only warns of missing weights, and then answers with untrained ones.

    Raises:
        ValueError: an adapter is of another base model, or its weights are not what its settings say.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    for name, folder in adapters.items():
        config, here = PeftConfig.from_pretrained(str(folder)), model.config._name_or_path
        base = config.base_model_name_or_path or ""
        known = {Path(name).name.lower() for name in (here, public_name())}
        if Path(base).name.lower() not in known:
            raise ValueError(f"Adapter {name} was trained on {base!r}; the base model here is {here!r}. Set "
                             "MEDQA_MODEL to the model it was trained on, or choose another adapter.")
        _require_plain_lora(name, folder, config)
        if not isinstance(model, PeftModel):
            model = PeftModel(model, config, adapter_name=name)
        try:
            with warnings.catch_warnings(action="ignore"):  # without a network PEFT asks the Hub in vain
                result = model.load_adapter(str(folder), adapter_name=name)
                weights = get_peft_model_state_dict(model, adapter_name=name)
            problems = [*result.missing_keys, *result.unexpected_keys]
            problems += [key for key, value in weights.items() if not value.isfinite().all()]
        except RuntimeError as error:  # a shape that the rank or the layer contradicts
            problems = str(error).splitlines()[1:] or [str(error)]
        if problems:
            raise ValueError(f"{len(problems)} weights of adapter {name} are not finite, or do not fit its "
                             f"settings or the base model: {problems[0].strip()}. Fetch or train it again.")
    return model


def _require_plain_lora(name: str, folder: Path, config) -> None:
    """Refuse an adapter that would change the base model under all adapters, and the untuned answers."""
    from safetensors import safe_open

    if config.peft_type != "LORA":
        raise ValueError(f"Adapter {name} is of type {config.peft_type}; expected LORA.")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(f"Adapter {name} starts from {config.init_lora_weights!r}, which rewrites the base "
                         "model. Save it as plain LoRA: path_initial_model_for_weight_conversion of PEFT.")
    parts = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
             *(config.modules_to_save or ())}
    with safe_open(folder / WEIGHTS, "pt") as file:
        other = [key for key in file.keys() if parts.isdisjoint(key.split("."))]  # noqa: SIM118
    if other:
        raise ValueError(f"Adapter {name} holds {other[0]}, which is no LoRA matrix.")


def chat_template(tokenizer) -> str:
    """`prompts.TEMPLATE` as the Jinja template that chat front ends, llama.cpp and Ollama read."""
    before, after = TEMPLATE.split("{question}")
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{ bos_token }}" if adds_bos else "") + (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% else %}}{{{{ {before!r} + message['content'] + {after!r} }}}}{{% endif %}}"
        "{% endfor %}")


def copy_adapter(source: Path, folder: Path, base_model: str) -> None:
    """Weights and settings of an adapter; `base_model` replaces the path that training may have noted."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / WEIGHTS, folder / WEIGHTS)
    settings = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_model
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_local(adapter_dir: Path, folder: Path, card: str, parity: pd.DataFrame, base_model: str) -> Path:
    """The folder to upload: adapter, tokenizer with our chat template, card, parity table.

    Results on data sets of the Hub go into `.eval_results` too, from which the Hub fills its leader boards.
    """
    from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
    from transformers import AutoTokenizer

    copy_adapter(adapter_dir, folder, base_model)
    has_own = (adapter_dir / "tokenizer.json").exists()  # the study's adapters in assets have none
    tokenizer = AutoTokenizer.from_pretrained(adapter_dir) if has_own else load_tokenizer()
    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    parity.to_csv(folder / PARITY, index=False)
    entries = [EvalResultEntry(result.dataset_type, "mcq", result.metric_value, notes=result.dataset_name)
               for result in ModelCard(card).data.eval_results or [] if "/" in result.dataset_type]
    if entries:
        (folder / ".eval_results").mkdir(exist_ok=True)
        text = json.dumps(eval_result_entries_to_yaml(entries), indent=1)  # JSON is YAML
        (folder / ".eval_results" / "afrimedqa.yaml").write_text(text, encoding="utf-8")
    return folder
