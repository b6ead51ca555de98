"""Adapters are found in a fixed order and checked while they are loaded; what is published names no folder of ours."""

import dataclasses
import json
import os
import random
import shutil

import httpx
import huggingface_hub
import pandas as pd
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from smoke_adapters import SMOKE, make_adapter

from medqa_lib.evaluation.generation import generate_answers
from medqa_lib.model import load_base_model, load_merged, load_tokenizer
from medqa_lib.prompts import format_example, format_prompt
from medqa_lib.publish import hub
from medqa_lib.standin import model_path

TOKEN = "hf_" + "secretsecret"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapters") / "exp_004")


@pytest.fixture
def changed(adapter, tmp_path):
    """Copy of the adapter whose settings or weights the test changes."""

    def change(weights=None, **settings):
        folder = shutil.copytree(adapter, tmp_path / "copy")
        old = json.loads((folder / hub.CONFIG).read_text())
        (folder / hub.CONFIG).write_text(json.dumps(old | settings))
        if weights:
            save_file(weights(load_file(folder / hub.WEIGHTS)), folder / hub.WEIGHTS)
        return folder

    return change


@pytest.fixture
def published(adapter, tmp_path):
    parity = pd.DataFrame([{"path": "merged", "passed": True}, {"path": "demo", "passed": True}])
    return hub.save_local(adapter, tmp_path / "published", "# Card", parity, hub.public_name(SMOKE))


# --- find ------------------------------------------------------------------------------------------------------------


def test_find_adapters_takes_a_folder_with_one(adapter):
    assert hub.find_adapters(adapter) == {"exp_004": adapter}


def test_find_adapters_names_those_in_subfolders_and_skips_checkpoints(adapter, tmp_path):
    for name in ("adapters/exp_001", "adapters/exp_002.v1", "adapters/exp_001/checkpoint-50"):
        shutil.copytree(adapter, tmp_path / name)
    assert hub.find_adapters(tmp_path) == {
        "exp_001": tmp_path / "adapters/exp_001",
        "exp_002_v1": tmp_path / "adapters/exp_002.v1",
    }


def test_find_adapters_orders_by_rule_whatever_the_dates(adapter, tmp_path):
    names = ["exp_002", "other", "exp_005", "exp_001", "exp_004", "exp_003"]
    for name in names:
        shutil.copytree(adapter, tmp_path / name)
    expected = ["exp_005", "exp_004", "exp_001", "exp_002", "exp_003", "other"]
    files = sorted(tmp_path.rglob("*.*"))
    for seed in range(3):
        dates = random.Random(seed).sample(range(len(files)), len(files)) if seed else [7] * len(files)
        for file, date in zip(files, dates, strict=True):
            os.utime(file, (date, date))
        assert list(hub.find_adapters(tmp_path)) == expected


def test_find_adapters_reads_the_runs_of_this_profile(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    assert hub.find_adapters(None, SMOKE) == {}
    for model in ("smoke-llama", "another"):
        shutil.copytree(adapter, tmp_path / "adapters" / model / "exp_003")
    assert hub.find_adapters(None, SMOKE) == {"exp_003": tmp_path / "adapters/smoke-llama/exp_003"}


def test_find_adapters_refuses_a_pickle(adapter, tmp_path):
    (tmp_path / hub.CONFIG).write_text((adapter / hub.CONFIG).read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="adapter_model.bin"):
        hub.find_adapters(tmp_path)


def test_find_adapters_falls_back_to_a_space_of_that_name(adapter, monkeypatch):
    asked = []

    def snapshot_download(repo_id, repo_type, allow_patterns):
        asked.append((repo_id, repo_type))
        if repo_type == "model":
            raise hub_error(404, RepositoryNotFoundError)
        return str(adapter.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert list(hub.find_adapters("someone/some-demo")) == ["exp_004"]
    assert list(hub.find_adapters("https://huggingface.co/spaces/someone/some-demo")) == ["exp_004"]
    assert asked == [("someone/some-demo", kind) for kind in ("model", "space", "space")]


@pytest.mark.parametrize(("status", "error"), [(404, RepositoryNotFoundError), (403, HfHubHTTPError)])
def test_find_adapters_says_why_a_name_gives_nothing(status, error, monkeypatch):
    def snapshot_download(**options):
        raise hub_error(status, error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=f"'no/such'.*{status}"):
        hub.find_adapters("no/such")


def hub_error(status, kind=HfHubHTTPError, text="refused"):
    request = httpx.Request("GET", "https://huggingface.co")
    return kind(text, response=httpx.Response(status, request=request))


# --- load ------------------------------------------------------------------------------------------------------------


def test_load_adapters_gives_the_weights_that_were_saved(adapter):
    loaded = hub.load_adapters(load_base_model(SMOKE), {"exp": adapter}).state_dict()
    found = {name.replace(".exp.", "."): value for name, value in loaded.items() if ".lora_" in name}
    written = load_file(adapter / hub.WEIGHTS)
    assert found.keys() == written.keys() and all(torch.equal(found[name], written[name]) for name in written)


def test_load_adapters_gives_a_model_that_answers_as_the_evaluated_one(adapter):
    questions = ["What is gout?", "Is it?"]
    tokenizer, loaded = load_tokenizer(SMOKE), hub.load_adapters(load_base_model(SMOKE), {"exp": adapter})
    merged = generate_answers(load_merged(adapter, SMOKE), tokenizer, questions, 8)
    assert generate_answers(loaded, tokenizer, questions, 8) == merged
    assert generate_answers(load_merged(None, SMOKE), tokenizer, questions, 8) != merged


def without_layer(weights):
    return {name: value for name, value in weights.items() if "layers.1" not in name}


BASE_TENSORS = ("base_model.model.model.norm.weight", "base_model.model.lm_head.weight",  # PEFT would load them
                "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")


def with_nan(weights):
    name = next(iter(weights))
    return weights | {name: torch.full_like(weights[name], float("nan"))}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}, "TinyLlama.*smoke-llama"),
        ({"peft_type": "LOHA", "r": 8}, "LOHA"),
        ({"r": 4}, r"lora_A.*\[8, 64\].*\[4, 64\]"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "o_proj"),
        ({"target_modules": ["q_proj"]}, "[kv]_proj"),
        ({"weights": without_layer}, r"layers\.1\.self_attn"),
        ({"weights": with_nan}, "lora_A"),
        *(({"init_lora_weights": start}, start) for start in ("pissa", "pissa_niter_4", "olora", "corda")),
        *(({"weights": lambda weights, name=name: weights | {name: torch.ones(64)}}, name) for name in BASE_TENSORS),
    ],
)
def test_load_adapters_refuses_what_does_not_fit(changed, change, named):
    with pytest.raises(ValueError, match=f"(?s)copied.*{named}"):
        hub.load_adapters(load_base_model(SMOKE), {"copied": changed(**change)})


def test_load_adapters_takes_one_that_names_the_base_as_the_hub_does(published):
    assert hub.public_name(SMOKE) != model_path(SMOKE)
    assert list(hub.load_adapters(load_base_model(SMOKE), {"exp": published}).peft_config) == ["exp"]


def test_load_adapters_keeps_them_apart(adapter, tmp_path):
    other = make_adapter(tmp_path / "other", seed=2)
    model = hub.load_adapters(load_base_model(SMOKE), {"one": adapter, "two": other}).eval()
    ids = torch.arange(2, 12).view(1, -1)
    logits = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        logits[name] = model(ids, use_cache=False).logits
    assert not torch.allclose(logits["one"], logits["two"], atol=0.1)
    model.set_adapter("one")
    assert torch.equal(model(ids, use_cache=False).logits, logits["one"])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("me/other", "me/other"),
    ],
)
def test_public_name_is_one_that_others_can_load(model, name):
    assert hub.public_name(dataclasses.replace(SMOKE, model=model)) == name


def test_public_name_of_a_folder_does_not_say_where_it_is(tmp_path):
    (tmp_path / "my-llama").mkdir()
    assert hub.public_name(dataclasses.replace(SMOKE, model=str(tmp_path / "my-llama"))) == "my-llama"


# --- publish ---------------------------------------------------------------------------------------------------------


def test_save_local_names_the_base_model_for_everybody(adapter, published):
    settings = (published / hub.CONFIG).read_text()
    assert json.loads(settings)["base_model_name_or_path"] == hub.public_name(SMOKE)
    assert "/" not in hub.public_name(SMOKE) and str(model_path(SMOKE)) not in settings
    assert (published / hub.WEIGHTS).read_bytes() == (adapter / hub.WEIGHTS).read_bytes()
    assert {"README.md", "parity.csv", "tokenizer.json"} <= {file.name for file in published.iterdir()}


def test_chat_template_gives_the_training_prompt():
    tokenizer = load_tokenizer(SMOKE)
    tokenizer.chat_template = hub.chat_template(tokenizer)
    chat = [{"role": "user", "content": 'What\'s "gout"?'}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == format_prompt('What\'s "gout"?')
    chat += [{"role": "assistant", "content": "A disease."}]
    example = format_example('What\'s "gout"?', "A disease.")
    assert tokenizer.apply_chat_template(chat, tokenize=False) == example + tokenizer.eos_token
