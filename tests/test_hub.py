"""Adapters are found, checked before they are loaded, and published only with a token and a passed parity gate."""

import dataclasses
import json
import shutil
import traceback

import huggingface_hub
import pandas as pd
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from smoke_adapters import SMOKE, make_adapter

from medqa_lib.model import load_base_model, load_tokenizer
from medqa_lib.prompts import format_example, format_prompt
from medqa_lib.publish import hub
from medqa_lib.standin import model_path

TOKEN = "hf_" + "secretsecret"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapters") / "exp_004")


@pytest.fixture(scope="module")
def base():
    return load_base_model(SMOKE)


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
    return hub.save_local(adapter, tmp_path / "published", "# Card", parity, model_path(SMOKE))


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


def test_find_adapters_reads_the_runs_of_this_profile(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    assert hub.find_adapters(None, SMOKE) == {}
    for name in ("exp_003", "search_cosine_1e-3"):  # the second is a trial of the search
        shutil.copytree(adapter, tmp_path / "adapters" / "smoke-llama" / name)
    assert list(hub.find_adapters(None, SMOKE)) == ["exp_003"]


def test_find_adapters_refuses_a_pickle(adapter, tmp_path):
    (tmp_path / hub.CONFIG).write_text((adapter / hub.CONFIG).read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        hub.find_adapters(tmp_path)


def test_find_adapters_falls_back_to_a_space_of_that_name(adapter, monkeypatch):
    asked = []

    def snapshot_download(name, repo_type, allow_patterns):
        asked.append((name, repo_type))
        if repo_type == "model":
            raise _hub_error(RepositoryNotFoundError, "404")
        return str(adapter.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert list(hub.find_adapters("someone/some-demo")) == ["exp_004"]
    assert list(hub.find_adapters("https://huggingface.co/spaces/someone/some-demo")) == ["exp_004"]
    assert asked == [
        ("someone/some-demo", "model"),
        ("someone/some-demo", "space"),
        ("someone/some-demo", "space"),
    ]


@pytest.mark.parametrize("error", [OSError("no route to host"), RepositoryNotFoundError])
def test_find_adapters_says_what_is_wrong_with_a_name(error, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise error if isinstance(error, OSError) else _hub_error(error, "404")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="'no/such'.*(name|network)"):
        hub.find_adapters("no/such")


def _hub_error(kind, text):
    import httpx

    return kind(text, response=httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co")))


# --- check and load --------------------------------------------------------------------------------------------------


def test_load_adapters_takes_what_was_trained_on_this_model_weight_for_weight(adapter):
    loaded = hub.load_adapters(load_base_model(SMOKE), {"exp": adapter}).state_dict()
    found = {name.replace(".exp.", "."): value for name, value in loaded.items() if ".lora_" in name}
    written = load_file(adapter / hub.WEIGHTS)
    assert found.keys() == written.keys() and all(torch.equal(found[name], written[name]) for name in written)


def test_check_adapter_refuses_another_base_model(changed, base):
    with pytest.raises(ValueError, match="trained on 'TinyLlama/TinyLlama-1.1B-Chat-v1.0'.*smoke-llama"):
        hub.check_adapter(changed(base_model_name_or_path="TinyLlama/TinyLlama-1.1B-Chat-v1.0"), base)


def test_check_adapter_refuses_another_revision(changed, base, monkeypatch):
    monkeypatch.setattr(base.config, "_commit_hash", "b" * 40, raising=False)
    with pytest.raises(ValueError, match="revision aaaa.*revision bbbb"):
        hub.check_adapter(changed(revision="a" * 40), base)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"r": 4}, "shape .8, 64., expected .4, 64."),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "o_proj.*has shape none"),
        ({"target_modules": ["q_proj"]}, "expected none"),
        ({"peft_type": "LOHA"}, "type LOHA, expected LORA"),
    ],
)
def test_check_adapter_refuses_settings_that_the_weights_contradict(changed, base, settings, text):
    with pytest.raises(ValueError, match=text):
        hub.check_adapter(changed(**settings), base)


def test_check_adapter_refuses_weights_of_a_layer_that_is_missing(changed, base):
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn"):
        hub.check_adapter(
            changed(
                weights=lambda found: {name: value for name, value in found.items() if "layers.1" not in name}
            ),
            base,
        )


def test_same_model_compares_hub_names_whole_and_local_copies_by_folder():
    assert hub._same_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "/data/models/tinyllama-1.1b-chat-v1.0/")
    assert not hub._same_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "other/TinyLlama-1.1B-Chat-v1.0")
    assert not hub._same_model("", "TinyLlama/TinyLlama-1.1B-Chat-v1.0")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smoke-llama", "smoke-llama-1"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("me/other", "me/other"),
    ],
)
def test_public_name_is_one_that_others_can_load(model, name):
    assert hub.public_name(dataclasses.replace(SMOKE, model=model)) == name


def test_load_adapters_takes_one_that_names_the_base_as_the_hub_does(published):
    settings = json.loads((published / hub.CONFIG).read_text()) | {
        "base_model_name_or_path": hub.public_name(SMOKE)
    }
    (published / hub.CONFIG).write_text(json.dumps(settings))
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


# --- publish ---------------------------------------------------------------------------------------------------------


def test_save_local_names_the_base_model_for_everybody(adapter, tmp_path):
    folder = hub.save_local(
        adapter, tmp_path / "out", "# Card", pd.DataFrame([{"passed": True}]), "owner/Base-Model"
    )
    assert json.loads((folder / hub.CONFIG).read_text())["base_model_name_or_path"] == "owner/Base-Model"
    assert (folder / hub.WEIGHTS).read_bytes() == (adapter / hub.WEIGHTS).read_bytes()
    assert set(hub.plan_upload(folder)["file"]) >= {
        "README.md",
        "parity.csv",
        "tokenizer.json",
        hub.CONFIG,
        hub.WEIGHTS,
    }


def test_chat_template_gives_the_training_prompt():
    tokenizer = load_tokenizer(SMOKE)
    tokenizer.chat_template = hub.chat_template(tokenizer)
    chat = [{"role": "user", "content": 'What\'s "gout"?'}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == format_prompt('What\'s "gout"?')
    chat += [{"role": "assistant", "content": "A disease."}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False)
        == format_example('What\'s "gout"?', "A disease.") + tokenizer.eos_token
    )


def test_push_needs_a_token_and_shows_the_files_first(published, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no Hub token"):
        hub.push(published, "someone/medqa")
    assert hub.WEIGHTS in capsys.readouterr().out


def test_push_uploads_the_shown_files_and_no_other(published, monkeypatch):
    calls = _fake_api(monkeypatch)
    (published / "notes.txt").write_text("private")
    assert hub.push(published, "someone/medqa") == "https://huggingface.co/someone/medqa"
    assert calls["create_repo"] == {"private": True, "exist_ok": True}
    assert calls["upload_folder"]["allow_patterns"] == list(hub.plan_upload(published)["file"])
    assert "notes.txt" not in calls["upload_folder"]["allow_patterns"]


def test_push_stops_when_parity_has_not_passed(published, monkeypatch):
    calls = _fake_api(monkeypatch)
    pd.DataFrame([{"path": "merged", "passed": True}, {"path": "demo", "passed": False}]).to_csv(
        published / hub.PARITY, index=False
    )
    with pytest.raises(ValueError, match="parity gate has not passed"):
        hub.push(published, "someone/medqa")
    (published / hub.PARITY).unlink()
    with pytest.raises(ValueError, match="lacks parity.csv"):
        hub.push(published, "someone/medqa")
    assert calls == {}


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("", "holds no comparison"),
        ("path,passed\n", "holds no comparison"),
        ("path,n\nmerged,10\n", "holds no comparison"),
        ("path,passed\nmerged,\n", "has not passed"),
        ("path,passed\nmerged,True\ndemo,\n", "has not passed"),
    ],
)
def test_push_stops_when_parity_says_nothing(published, monkeypatch, table, text):
    calls = _fake_api(monkeypatch)
    (published / hub.PARITY).write_text(table)
    with pytest.raises(ValueError, match=text):
        hub.push(published, "someone/medqa")
    assert calls == {}


def test_push_never_shows_the_token(published, monkeypatch, capsys):
    _fake_api(monkeypatch, failure=RuntimeError(f"403 for Authorization: Bearer {TOKEN}"))
    with pytest.raises(RuntimeError, match="did not take someone/medqa.*403") as caught:
        hub.push(published, "someone/medqa")
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
    assert "403" in shown and TOKEN not in shown


def _fake_api(monkeypatch, failure=None) -> dict:
    calls = {}

    class Api:
        def __init__(self, token):
            assert token == TOKEN

        def create_repo(self, repository, **options):
            calls["create_repo"] = options

        def upload_folder(self, **options):
            if failure:
                raise failure
            calls["upload_folder"] = options

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls
