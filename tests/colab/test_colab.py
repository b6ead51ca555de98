"""The Colab edge with a made-up `google.colab`: tokens stay secret, nothing raises, everything can be called twice."""

import os
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub.constants
import lint_notebooks
import pytest

from medqa_lib import colab
from medqa_lib.training.checkpoints import checkpoint_folders

CANARY = "hf" + "_canary" * 5


@pytest.fixture(autouse=True)
def outside_colab(monkeypatch, tmp_path):
    for name in ("COLAB_RELEASE_TAG", "HF_TOKEN", "MEDQA_HOME", "MEDQA_SCRATCH"):
        monkeypatch.setenv(name, "")  # so that the test's own changes are undone, too
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def fake_colab(monkeypatch):
    """`google.colab` as a runtime has it; `calls` counts the mounts, `secrets` is what the user stored."""

    class SecretNotFoundError(Exception):
        pass

    state = types.SimpleNamespace(secrets={}, calls=0, error=None)

    def get(name):
        if state.error:
            raise state.error
        if name not in state.secrets:
            raise SecretNotFoundError(f"Secret {name} does not exist.")
        return state.secrets[name]

    def mount(folder):
        state.calls += 1
        if state.error:
            raise state.error
        (Path(folder) / "MyDrive").mkdir(parents=True)

    modules = {"google": types.ModuleType("google"), "google.colab": types.ModuleType("google.colab")}
    modules["google.colab"].userdata = types.SimpleNamespace(get=get)
    modules["google.colab"].drive = types.SimpleNamespace(mount=mount)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external_test")
    return state


def test_in_colab_is_false_on_another_machine():
    assert colab.in_colab() is False


def test_hf_login_takes_the_colab_secret_first(fake_colab, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    fake_colab.secrets["HF_TOKEN"] = f" {CANARY}\n"
    assert colab.hf_login() == "Colab secret"
    assert os.environ["HF_TOKEN"] == CANARY
    shown = capfd.readouterr()
    assert "Colab secret" in shown.out
    assert "canary" not in shown.out + shown.err


def test_hf_login_falls_back_to_the_environment(fake_colab, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert colab.hf_login() == "environment"
    shown = capfd.readouterr()
    assert "environment" in shown.out
    assert "canary" not in shown.out + shown.err


def test_hf_login_outside_colab_never_asks_colab(fake_colab, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    fake_colab.secrets["HF_TOKEN"] = CANARY
    assert colab.hf_login() == "none"
    assert "HF_TOKEN" not in os.environ


@pytest.mark.parametrize("error", [TimeoutError(CANARY), AttributeError(CANARY)])
def test_hf_login_says_what_is_missing_and_never_raises(error, fake_colab, capfd):
    fake_colab.error = error
    assert colab.hf_login() == "none"
    shown = capfd.readouterr()
    assert type(error).__name__ in shown.out
    assert "AfriMed-QA" in shown.out
    assert "canary" not in shown.out + shown.err


def test_hf_login_counts_a_blank_token_as_none(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "  ")
    assert colab.hf_login() == "none"


def test_hf_login_finds_a_saved_login_and_leaves_it_where_it_is(tmp_path, capfd):
    (tmp_path / "token").write_text(CANARY)
    assert colab.hf_login() == "saved login"
    assert "HF_TOKEN" not in os.environ
    shown = capfd.readouterr()
    assert "saved login" in shown.out
    assert "canary" not in shown.out + shown.err


def test_hf_login_counts_a_login_that_cannot_be_renewed_as_none(monkeypatch, capfd):
    def get_token():
        raise OSError(CANARY)

    monkeypatch.setattr(huggingface_hub, "get_token", get_token)
    assert colab.hf_login() == "none"
    assert "canary" not in "".join(capfd.readouterr())


def test_mount_drive_moves_home_to_drive_and_mounts_once(fake_colab, tmp_path):
    expected = tmp_path / "drive" / "MyDrive" / "medqa"
    assert colab.mount_drive() == expected
    assert expected.is_dir()
    assert os.environ["MEDQA_HOME"] == str(expected)
    local, lasting = checkpoint_folders(expected, "run")
    assert local == colab.SCRATCH / "checkpoints" / "run" and lasting == expected / "checkpoints" / "run", (
        "saved locally, copied to Drive"
    )
    del os.environ["MEDQA_HOME"]  # as in the next notebook's kernel on the same runtime
    assert colab.mount_drive() == colab.project_dir() == expected
    assert fake_colab.calls == 1


def test_mount_drive_keeps_a_home_that_the_user_set(fake_colab, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "mine"))
    assert colab.mount_drive() == tmp_path / "mine"
    assert fake_colab.calls == 0


def test_mount_drive_goes_on_without_drive_and_says_so(fake_colab, capsys):
    fake_colab.error = ValueError("mount failed")
    folder = colab.mount_drive()
    assert folder.is_dir()
    assert "MEDQA_HOME" not in os.environ
    assert "lost" in capsys.readouterr().out


def test_mount_drive_outside_colab_is_the_project_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "runs"))
    assert colab.mount_drive() == tmp_path / "runs"
    assert capsys.readouterr().out == ""


def run_bootstrap(monkeypatch, cloned):
    """Execute the notebooks' second cell with made-up commands and folders. Returns the commands and the folder it ends in."""
    commands, folders = [], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(os.path, "isdir", lambda path: cloned)
    monkeypatch.setattr(os, "chdir", folders.append)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(lint_notebooks.bootstrap_source(), {})
    return commands, folders


def test_bootstrap_does_nothing_outside_colab(monkeypatch):
    assert run_bootstrap(monkeypatch, cloned=False) == ([], [])


@pytest.mark.parametrize("cloned", [False, True])
def test_bootstrap_clones_once_and_installs_without_upgrades(cloned, fake_colab, monkeypatch):
    commands, folders = run_bootstrap(monkeypatch, cloned)
    assert [command[:2] for command in commands[:-1]] == ([] if cloned else [["git", "clone"]])
    assert commands[-1] == [sys.executable, "-m", "pip", "install", "-q", "-r", "../requirements.txt"]
    assert folders == ["/content/medqa/notebooks"]
