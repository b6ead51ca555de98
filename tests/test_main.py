"""`python -m medqa_lib` on small notebooks made here, in real kernels."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from medqa_lib import __main__ as headless
from medqa_lib.config import PROFILES
from medqa_lib.evaluation import results


@pytest.fixture
def make_notebook(monkeypatch, tmp_path):
    folder = tmp_path / "checkout" / "notebooks"
    folder.mkdir(parents=True)
    monkeypatch.setattr(headless, "NOTEBOOKS", folder)
    for name in headless.PATH_VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("MEDQA_PROFILE", "smoke")
    monkeypatch.chdir(tmp_path)

    def make(name, *sources):
        old_run = [new_output("stream", text="from an older run")]
        cells = [
            new_markdown_cell("# Title"),
            *[new_code_cell(source, outputs=old_run, execution_count=9) for source in sources],
        ]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
        return folder / f"{name}.ipynb"

    return make


def read_outputs(path):
    """What each code cell printed, or the name of its error."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [[output.get("text") or output.get("ename") for output in cell.outputs] for cell in cells]


def test_main_runs_the_named_notebooks_with_folders_that_hold_in_their_kernels(
    make_notebook, tmp_path, monkeypatch, capsys
):
    original = make_notebook(
        "11_first",
        "import os\nprint(os.getcwd())",
        "print(os.environ['MEDQA_PROFILE'], os.environ['MEDQA_DATA_DIR'], os.environ['MEDQA_HOME'])",
    )
    make_notebook("12_second", "raise RuntimeError('must not run')")
    before = original.read_bytes()
    monkeypatch.setenv("MEDQA_DATA_DIR", "data")
    monkeypatch.setenv("MEDQA_HOME", "home")
    assert headless.main(["11"]) == 0
    copy = tmp_path / "home" / "notebooks" / "11_first.ipynb"
    place = str(tmp_path).replace(headless.tempfile.gettempdir(), "TMP")
    assert read_outputs(copy) == [["./notebooks\n"], [f"smoke {place}/data runs\n"]]
    assert original.read_bytes() == before
    assert "[1/1] 11_first: " in capsys.readouterr().out


def test_main_stops_at_a_failing_cell_and_names_it(make_notebook, tmp_path, capsys):
    make_notebook("00_good", "x = 1")
    make_notebook("11_bad", "print('before')", "raise ValueError('the rate is 0')", "print('after')")
    make_notebook("12_never", "x = 1")
    assert headless.main([]) == 1
    assert "11_bad.ipynb, cell 3 of 4: ValueError: the rate is 0" in capsys.readouterr().err
    folder = tmp_path / "MEDQA_HOME" / "notebooks"
    assert read_outputs(folder / "11_bad.ipynb") == [["before\n"], ["ValueError"], []]
    assert sorted(path.name for path in folder.iterdir()) == ["00_good.ipynb", "11_bad.ipynb"]


def test_main_names_the_cell_at_which_a_kernel_died(make_notebook, capsys):
    make_notebook("11_dies", "x = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert headless.main(["11"]) == 1
    assert "11_dies.ipynb, cell 3 of 3: Kernel died. Most often memory ran out" in capsys.readouterr().err


def test_main_in_place_writes_over_the_notebook_without_widgets_and_paths(make_notebook, tmp_path):
    path = make_notebook("11_first", f"print('{tmp_path}/checkout/runs', '{sys.prefix}/lib')")
    notebook = json.loads(path.read_text())
    notebook["metadata"]["widgets"] = {"state": {}}
    path.write_text(json.dumps(notebook))
    assert headless.main(["11", "--in-place"]) == 0
    assert read_outputs(path) == [["./runs .venv/lib\n"]]
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    assert not (tmp_path / "MEDQA_HOME").exists()


@pytest.mark.parametrize(
    ("arguments", "profile", "expected"),
    [
        (["99"], "smoke", "there is no notebook 99; expected numbers out of 11"),
        (["eleven"], "smoke", "there is no notebook eleven"),
        (["11"], "huge", "MEDQA_PROFILE is 'huge'"),
        (["11", "--fast"], "smoke", "unrecognized arguments: --fast"),
    ],
)
def test_main_answers_a_wrong_call_with_one_error(
    arguments, profile, expected, make_notebook, monkeypatch, capsys
):
    make_notebook("11_first", "x = 1")
    monkeypatch.setenv("MEDQA_PROFILE", profile)
    with pytest.raises(SystemExit) as stop:
        headless.main(arguments)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_prepare_environment_makes_a_model_folder_absolute_and_leaves_names_alone(
    make_notebook, monkeypatch, tmp_path
):
    (tmp_path / "my-model").mkdir()
    for model, expected in (("my-model", str(tmp_path / "my-model")), ("smollm2-135m", "smollm2-135m")):
        monkeypatch.setenv("MEDQA_MODEL", model)
        assert headless.prepare_environment().model == expected


@pytest.mark.parametrize("mounted", [True, False])
def test_prepare_environment_in_colab_goes_to_drive_or_says_that_results_are_lost(
    mounted, make_notebook, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external_test")
    monkeypatch.setattr(headless.colab, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(
        headless.colab, "project_dir", lambda: None
    )  # makes the folder, here that of the checkout
    monkeypatch.delenv("MEDQA_HOME")
    monkeypatch.delenv("MEDQA_SCRATCH")
    if mounted:
        (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    headless.prepare_environment()
    on_drive = os.environ["MEDQA_HOME"] == str(tmp_path / "drive" / "MyDrive" / "medqa")
    assert on_drive == mounted == (os.environ.get("MEDQA_SCRATCH") == str(headless.colab.SCRATCH))
    assert ("lost" in capsys.readouterr().out) != mounted


def test_prepare_environment_outside_colab_makes_no_folder(make_notebook, tmp_path):
    headless.prepare_environment()
    assert not (tmp_path / "MEDQA_HOME").exists()


def test_main_says_that_an_installed_copy_has_no_notebooks(make_notebook, capsys):
    with pytest.raises(SystemExit):
        headless.main([])
    assert "run this in a checkout" in capsys.readouterr().err


def test_main_list_marks_what_the_profile_runs(make_notebook, monkeypatch, capsys):
    make_notebook("11_first", "x = 1")
    make_notebook("21_long", "x = 1")
    monkeypatch.setenv("MEDQA_PROFILE", "cpu")
    assert headless.main(["--list"]) == 0
    assert capsys.readouterr().out == "* 11_first\n  21_long\n"


def test_write_notebook_leaves_pictures_alone(make_notebook, tmp_path):
    picture = f"iVBORw{headless.Path.home()}"  # base64 may hold any path by chance
    output = new_output("display_data", {"image/png": picture, "text/plain": str(headless.Path.home() / "x")})
    headless.write_notebook(new_notebook(cells=[new_code_cell("x", outputs=[output])]), tmp_path / "x.ipynb")
    data = json.loads((tmp_path / "x.ipynb").read_text())["cells"][0]["outputs"][0]["data"]
    assert "".join(data["image/png"]).strip() == picture
    assert data["text/plain"] == ["~/x"]


def test_main_hides_paths_in_the_traceback_of_a_failed_notebook(make_notebook, tmp_path):
    module = tmp_path / "checkout" / "broken.py"
    module.write_text("raise ValueError('the rate is 0')")
    make_notebook("11_bad", f"import sys\nsys.path.append({str(module.parent)!r})\nimport broken")
    assert headless.main(["11"]) == 1
    notebook = nbformat.read(tmp_path / "MEDQA_HOME" / "notebooks" / "11_bad.ipynb", as_version=4)
    shown = "\n".join(notebook.cells[1].outputs[0].traceback)
    assert "./broken.py" in shown and str(module.parent) not in shown


def test_hide_paths_spares_the_root_folder(make_notebook, monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert headless.hide_paths("and/or, 1/2") == "and/or, 1/2"


def test_print_results_shows_changes_against_the_base(make_notebook, capsys, tmp_path):
    root = tmp_path / "MEDQA_HOME" / "results" / "smoke-llama"
    for name, loss, bleu in (("base", 2.0, 10.0), ("exp_004", 1.5, 12.5), ("line_chat", None, 12.5)):
        metrics = {"validation_loss": loss, "rouge2": 0.0, "bleu": bleu, "n_test": 4}
        results.save_run(
            root / name, {}, metrics, pd.DataFrame({"question_id": []}), pd.DataFrame({"step": []}), []
        )
    headless.print_results(PROFILES["smoke"])
    shown = capsys.readouterr().out
    assert "Notebook 20 draws" in shown
    base, tuned, line = (
        line.split(maxsplit=1)[1] for line in shown.splitlines() if line.startswith(("base", "exp", "line"))
    )
    assert base.split() == ["2.0000", "0.0000", "10.0000", "4"]
    assert tuned.split() == ["1.5000", "(-25.0%)", "0.0000", "12.5000", "(+25.0%)", "4"]
    assert line.split() == ["-", "0.0000", "12.5000", "(+25.0%)", "4"]
    figure = tmp_path / "MEDQA_FIGURES" / "changes_smoke-llama.png"
    figure.parent.mkdir()
    figure.write_bytes(b"")
    headless.print_results(PROFILES["smoke"])
    assert capsys.readouterr().out.endswith(f"Comparison figure: {figure}\n")


def test_main_ignores_a_further_interrupt_once_it_is_interrupted(make_notebook, monkeypatch, capsys):
    """Python gives SIGINT its deadly default back while it shuts down, unless it is ignored."""

    def run_notebooks(*_):
        raise KeyboardInterrupt

    make_notebook("11_first", "x = 1")
    monkeypatch.setattr(headless, "run_notebooks", run_notebooks)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert headless.main(["11"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Interrupted" in capsys.readouterr().err


def start_main(path):
    """The notebook at `path` run by `python -m medqa_lib` in a process of its own."""
    script = f"from medqa_lib import __main__ as m; m.NOTEBOOKS = m.Path({str(path.parent)!r}); m.sys.exit(m.main([{path.name[:2]!r}]))"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "delay_s"),
    [(signal.SIGINT, 0.4), (signal.SIGINT, 0.9), (signal.SIGTERM, 0.4), (signal.SIGKILL, 0.4)],
)
def test_main_leaves_no_kernel_behind_when_stopped(number, delay_s, make_notebook, tmp_path):
    pid_file = tmp_path / "pid"
    path = make_notebook(
        "11_long", f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)"
    )
    process = start_main(path)
    wait_for(pid_file.exists)
    time.sleep(
        delay_s
    )  # nbclient looks every second whether the kernel lives: 0.9 is where that and the clean-up meet
    process.send_signal(number)
    if number == signal.SIGINT:
        time.sleep(0.02)
        process.send_signal(number)  # people press Ctrl-C twice
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert ("Interrupted" in stderr) == (number == signal.SIGINT)
    assert "Traceback" not in stderr
    wait_for(lambda: not is_running(int(pid_file.read_text())))


@pytest.mark.faults
def test_main_can_be_stopped_while_a_kernel_starts(make_notebook):
    process = start_main(make_notebook("11_long", "import time\ntime.sleep(120)"))
    assert "11_long" in process.stdout.readline()
    wait_for(lambda: psutil.Process(process.pid).children())
    (kernel,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert (
        "Interrupted. The same command goes on from the newest checkpoint."
        in process.communicate(timeout=120)[1]
    )
    assert process.returncode == 130
    wait_for(lambda: not is_running(kernel.pid))


def wait_for(condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
