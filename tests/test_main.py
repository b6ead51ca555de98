"""`python -m medqa_lib` as a person starts it: notebooks run in order, what stops them is named, Ctrl-C ends all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from medqa_lib import __main__ as headless
from medqa_lib.reasons import user_errors

ROOT = Path(__file__).parents[1]


@pytest.fixture
def write_notebooks(tmp_path, monkeypatch):
    """Puts notebooks of the given cells into a folder that the runner takes for its own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(headless, "NOTEBOOKS", folder)
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEDQA_PROFILE", "smoke")

    def write(**notebooks):
        for name, cells in notebooks.items():
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
            nbformat.write(notebook, folder / f"{name[1:]}.ipynb")
        return folder

    return write


def read_outputs(path):
    return [output.get("text", "") for cell in nbformat.read(path, 4).cells for output in cell.outputs]


def test_notebooks_run_in_order_and_copies_show_no_path_of_this_machine(write_notebooks, tmp_path, capsys):
    folder = write_notebooks(_01_b=["print(open('made').read())", "print('os' in globals())"],
                             _00_a=["open('made', 'w').write('by 00')", "import os; print(os.environ['MEDQA_HOME'])"])
    assert headless.main([]) == 0
    copies = tmp_path / "home" / "notebooks"
    assert read_outputs(copies / "01_b.ipynb") == ["by 00\n", "False\n"], "another notebook's names are gone"
    assert [cell.execution_count for cell in nbformat.read(copies / "01_b.ipynb", 4).cells] == [1, 2]
    assert read_outputs(copies / "00_a.ipynb")[-1] == "runs\n"
    assert nbformat.read(folder / "00_a.ipynb", 4).cells[1].outputs == [], "the originals stay as they are"
    shown = capsys.readouterr().out
    assert shown.index("00_a") < shown.index("01_b")


def test_in_place_writes_over_the_notebooks(write_notebooks):
    folder = write_notebooks(_00_a=["print(6 * 7)"])
    assert headless.main(["--in-place", "0"]) == 0
    assert read_outputs(folder / "00_a.ipynb") == ["42\n"]


def test_a_cell_that_fails_is_named_and_stops_the_rest(write_notebooks, tmp_path, capsys):
    write_notebooks(_00_a=["x = 1", "raise KeyError('gone')", "print('never')"], _01_b=["print('never')"])
    assert headless.main([]) == 1
    error = capsys.readouterr().err
    assert "00_a.ipynb, cell 2 of 3" in error and "KeyError" in error
    assert not (tmp_path / "home" / "notebooks" / "01_b.ipynb").exists()


def test_a_kernel_that_dies_is_named(write_notebooks, capsys):
    write_notebooks(_00_a=["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert headless.main([]) == 1
    assert "00_a.ipynb, cell 1 of 1" in capsys.readouterr().err


def test_unknown_numbers_and_profiles_end_with_status_2(write_notebooks, monkeypatch, capsys):
    write_notebooks(_00_a=["x = 1"])
    for arguments, profile in ((["77"], "smoke"), ([], "huge")):
        monkeypatch.setenv("MEDQA_PROFILE", profile)
        with pytest.raises(SystemExit) as stop, user_errors():
            headless.main(arguments)
        assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "77" in error and "huge" in error


def test_list_marks_the_default_notebooks(monkeypatch, capsys):
    monkeypatch.setenv("MEDQA_PROFILE", "cpu")
    assert headless.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:4] for line in lines if line.startswith("*")] == list(headless.CPU_LIST)
    assert [line[2:] for line in lines] == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_ctrl_c_ends_kernel_and_runner(write_notebooks, tmp_path):
    folder = write_notebooks(_00_a=[f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n"
                                    "__import__('time').sleep(60)"])
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    script += f"from medqa_lib import __main__ as m; m.NOTEBOOKS = m.Path({str(folder)!r}); m.sys.exit(m.main([]))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    kernel = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"kernel {kernel} still runs")


@pytest.mark.slow
def test_notebooks_side_by_side_give_the_same_results_as_in_turn(tmp_path):
    """Both need the untuned model's run: the second waits for it."""
    found = {}
    for name, options in (("turn", []), ("side", ["--gpus", "2"])):
        home = tmp_path / name
        command = [sys.executable, "-m", "medqa_lib", *options, "12", "14"]
        variables = os.environ | {"MEDQA_PROFILE": "smoke", "MEDQA_HOME": str(home), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        files = sorted((home / "results").rglob("scores.csv"))
        found[name] = {file.parent.name: file.read_bytes() for file in files}
    assert found["turn"] == found["side"] and set(found["turn"]) == {"base", "exp_002", "exp_004"}
