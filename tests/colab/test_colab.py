"""The Colab edge with a made-up `google.colab`: tokens stay secret, nothing raises, everything can be called twice."""

import http.server
import json
import os
import sys
import threading
import types
from pathlib import Path

import huggingface_hub.constants
import lint_notebooks
import pytest
from IPython.core.interactiveshell import InteractiveShell

from medqa_lib import colab, config

CANARY = "hf" + "_canary" * 5


@pytest.fixture(autouse=True)
def outside_colab(monkeypatch, tmp_path, hub):
    for name in ("COLAB_RELEASE_TAG", "HF_TOKEN", "MEDQA_HOME", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "")  # so that the test's own changes are undone, too
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)


@pytest.fixture
def hub(monkeypatch):
    """A Hub that knows one token; `hub.status` is what it answers to any other one."""
    state = types.SimpleNamespace(status=401, asked=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked += 1
            known = self.headers.get("authorization") == f"Bearer {CANARY}"
            body = json.dumps({"name": "jane"} if known else {"error": "Invalid credentials"}).encode()
            self.send_response(200 if known else state.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()


@pytest.fixture
def fake_colab(monkeypatch):
    """`google.colab` as a runtime has it; `mounts` and `reads` count, `secrets` is what the user stored."""
    state = types.SimpleNamespace(secrets={}, mounts=0, reads=0, error=None)

    def get(name):
        state.reads += 1
        if state.error:
            raise state.error
        return state.secrets[name]

    def mount(folder):
        state.mounts += 1
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


def test_hf_login_takes_the_colab_secret_first(fake_colab, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    fake_colab.secrets["HF_TOKEN"] = f" {CANARY}\n"
    assert colab.hf_login() == "Colab secret"
    assert os.environ["HF_TOKEN"] == CANARY
    shown = "".join(capfd.readouterr())
    assert "jane" in shown and "canary" not in shown


@pytest.mark.parametrize("error", [KeyError("HF_TOKEN"), TimeoutError(CANARY), AttributeError(CANARY)])
def test_without_a_secret_the_environment_counts_and_colab_is_asked_once(error, fake_colab, monkeypatch, capfd):
    fake_colab.error = error
    assert colab.hf_login() == "none"
    assert huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN, "the libraries do not ask Colab again"
    assert fake_colab.reads == 1
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert colab.hf_login() == "environment"
    assert "canary" not in "".join(capfd.readouterr())


def test_outside_colab_nobody_asks_colab(fake_colab, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    fake_colab.secrets["HF_TOKEN"] = CANARY
    assert (colab.hf_login(), fake_colab.reads) == ("none", 0)
    assert "HF_TOKEN" not in os.environ


def test_a_saved_login_is_found(tmp_path, capfd):
    (tmp_path / "token").write_text(CANARY)
    assert colab.hf_login() == "saved login"
    assert "canary" not in "".join(capfd.readouterr())


def test_a_token_that_the_hub_refuses_is_put_aside(monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert colab.hf_login() == "none"
    assert "HF_TOKEN" not in os.environ, "the Hub refuses public models with it, too"
    shown = capfd.readouterr().out
    assert "refused" in shown and "expired" in shown and "hf_expired" not in shown


def test_a_hub_that_is_busy_refuses_no_token(hub, monkeypatch):
    hub.status = 503
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert colab.hf_login() == "environment"
    assert os.environ["HF_TOKEN"] == "hf_other"


def test_mount_drive_moves_home_to_drive_and_mounts_once(fake_colab, tmp_path):
    expected = tmp_path / "drive" / "MyDrive" / "medqa"
    assert colab.mount_drive() == expected == config.home_dir()
    assert expected.is_dir()
    del os.environ["MEDQA_HOME"]  # as in the next notebook's kernel on the same runtime
    assert colab.mount_drive() == expected
    assert fake_colab.mounts == 1


def test_a_home_that_the_user_set_stays(fake_colab, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "mine"))
    assert colab.mount_drive() == tmp_path / "mine"
    assert fake_colab.mounts == 0


def test_without_drive_the_reason_and_the_loss_are_said(fake_colab, capsys):
    fake_colab.error = ValueError("mount failed: timeout during initial read of root folder")
    assert colab.mount_drive().is_dir()
    assert "MEDQA_HOME" not in os.environ
    shown = capsys.readouterr().out
    assert "timeout during initial read" in shown and "LOST" in shown


def test_outside_colab_nothing_is_mounted(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "runs"))
    assert colab.mount_drive() == tmp_path / "runs"
    assert capsys.readouterr().out == ""


def test_the_hubs_cache_follows_the_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "runs"))
    config.write_settings(hub_cache_on_drive=True)
    colab.mount_drive()
    assert os.environ["HF_HUB_CACHE"] == str(tmp_path / "runs" / "hub")


# --- the bootstrap cell, run by IPython itself with git and pip replaced -----------------------------------------------


@pytest.fixture
def run_cell(monkeypatch, tmp_path):
    """Runs the bootstrap cell with /content in a temporary folder; returns (error or None, commands)."""
    content = tmp_path / "content"
    content.mkdir()

    def run(in_colab=True, repository="jane/medqa", clone=None, pip_status=0):
        commands, shell = [], InteractiveShell()

        def system(command):
            command = shell.var_expand(command, depth=1)
            commands.append(command)
            if "git clone" in command and clone:
                clone(content / "medqa")
            if "unzip" in command:
                make_project(content / "medqa-main")
            shell.user_ns["_exit_code"] = pip_status if " pip " in command else 0

        shell.system = system
        if in_colab:
            monkeypatch.setenv("COLAB_RELEASE_TAG", "test")
        monkeypatch.setattr(sys, "path", list(sys.path))
        source = lint_notebooks.bootstrap_source().replace('"/content"', repr(str(content)))
        source = source.replace(lint_notebooks.current_repository(), repository)
        return shell.run_cell(source).error_in_exec, commands

    run.content = content
    return run


def make_project(folder):
    (folder / "medqa_lib").mkdir(parents=True)
    (folder / "medqa_lib" / "prompts.py").touch()
    (folder / "notebooks").mkdir()


def test_bootstrap_does_nothing_outside_colab(run_cell):
    assert run_cell(in_colab=False) == (None, [])


def test_bootstrap_clones_once_and_installs(run_cell):
    error, commands = run_cell(clone=make_project)
    assert error is None
    assert ["jane/medqa" in commands[0], "requirements.txt" in commands[1], len(commands)] == [True, True, 2]
    assert Path.cwd() == run_cell.content / "medqa" / "notebooks"
    error, commands = run_cell(clone=make_project)
    assert error is None and len(commands) == 1, "the second run installs only"


def test_bootstrap_says_what_to_do_while_there_is_no_address(run_cell):
    error, commands = run_cell(repository="YOUR_GITHUB_NAME/medqa")
    assert "OWNER/NAME" in str(error) and commands == []


def test_bootstrap_installs_nothing_of_another_project(run_cell):
    error, commands = run_cell(clone=lambda folder: (folder / "app").mkdir(parents=True))
    assert "jane/medqa" in str(error)
    assert not any(" pip " in command for command in commands)


def test_bootstrap_takes_a_zip_that_was_uploaded(run_cell):
    (run_cell.content / "medqa-main.zip").touch()
    error, commands = run_cell(repository="YOUR_GITHUB_NAME/medqa")
    assert error is None and "unzip" in commands[0]
    assert Path.cwd() == run_cell.content / "medqa-main" / "notebooks"


def test_bootstrap_stops_where_pip_fails(run_cell):
    error, _ = run_cell(clone=make_project, pip_status=1)
    assert isinstance(error, RuntimeError)
