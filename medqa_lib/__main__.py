"""`python -m medqa_lib`: run the notebooks from top to bottom without a browser, then print base against experiments.

Finished runs are reused and a training that was cut off goes on from its newest valid checkpoint, so the same command
continues after a crash.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from medqa_lib import colab
from medqa_lib.config import Profile, current_profile, home_dir

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CPU_LIST = ("00", "01", "02", "03", "04", "11", "12", "13", "14", "20")  # what a laptop runs in some ten minutes
BAR = "{n_fmt}/{total_fmt} cells |{bar:25}| {elapsed}{postfix}"
PATH_VARIABLES = ("MEDQA_HOME", "MEDQA_SCRATCH", "MEDQA_DATA_DIR", "MEDQA_FIGURES")


class NotebookFailed(Exception):
    """A notebook stopped; the message names the notebook, the cell and the error."""


class ProgressClient(NotebookClient):
    """Runs a notebook; the bar moves a step a code cell and shows the last line that the cell printed."""

    def __init__(self, notebook: nbformat.NotebookNode, bar: tqdm, **options) -> None:
        super().__init__(notebook, timeout=None, coalesce_streams=True, record_timing=False,
                         extra_arguments=["--log-level=CRITICAL"], **options)  # no warning about local sockets, no trace after Ctrl-C
        self.bar = bar
        self.cell_number = 0
        self.interrupted = False
        self.on_cell_execute = self.start_cell
        self.on_cell_executed = lambda **_: bar.update()

    async def async_start_new_kernel(self, **options) -> None:
        """Start the kernel, and take the signals back from nbclient, whose handlers make them look as if the kernel had died.

        Ctrl-C cancels the task that runs the notebook, so that the one clean-up on its way out ends the kernel.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def interrupt() -> None:
            if not self.interrupted:  # a second Ctrl-C must not cut the clean-up short
                self.interrupted = True
                self.shutdown_kernel = "graceful" if self.cell_number else "immediate"  # one still importing knows no other end
                task.cancel()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        loop.remove_signal_handler(signal.SIGTERM)
        await super().async_start_new_kernel(**options)

    def start_cell(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        self.cell_number = cell_index + 1

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int) -> nbformat.NotebookNode | None:
        lines = msg["content"].get("text", "").replace("\r", "\n").split("\n") if msg["msg_type"] == "stream" else []
        if shown := [line.strip() for line in lines if line.strip()]:
            self.bar.set_postfix_str(shown[-1][:60])
        return super().process_message(msg, cell, cell_index)


def main(arguments: list[str] | None = None) -> int:
    """Run the notebooks that the command line names. Returns the exit status: 0, 1 if one failed, 130 after Ctrl-C."""
    available = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    parser = argparse.ArgumentParser(prog="python -m medqa_lib", description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help="notebooks to run, for example 11 20 (default: the profile's)")
    parser.add_argument("--list", action="store_true", help="show the notebooks and stop; * marks the default ones")
    parser.add_argument("--in-place", action="store_true", help="write the executed notebooks over the ones in notebooks/")
    options = parser.parse_args(arguments)
    if not available:
        parser.error(f"there are no notebooks in {NOTEBOOKS}; run this in a checkout of the repository")
    try:
        profile = prepare_environment()
    except ValueError as error:
        parser.error(str(error))
    default = [number for number in available if profile.name != "cpu" or number in CPU_LIST]
    if options.list:
        print("\n".join(f"{'*' if number in default else ' '} {path.stem}" for number, path in available.items()))
        return 0
    numbers = [number.zfill(2) for number in options.numbers] or default
    if unknown := [number for number in numbers if number not in available]:
        parser.error(f"there is no notebook {', '.join(unknown)}; expected numbers out of {' '.join(available)}")
    paths = [available[number] for number in numbers]
    try:
        run_notebooks(paths, NOTEBOOKS if options.in_place else home_dir() / "notebooks")
    except NotebookFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more Ctrl-C, while Python shuts down, would change the exit status
        print("\nInterrupted. The same command goes on from the newest checkpoint.", file=sys.stderr)
        return 130
    print_results(profile)
    return 0


def prepare_environment() -> Profile:
    """Fix the profile for every kernel, and make the folders absolute: a kernel starts in notebooks/. In Colab they lie on Drive.

    Raises:
        ValueError: MEDQA_PROFILE names no profile.
    """
    profile = current_profile()
    os.environ["MEDQA_PROFILE"] = profile.name
    if colab.in_colab():
        colab.mount_drive()  # now, since the notebooks' own calls leave the home alone that is set below
    os.environ["MEDQA_HOME"] = str(home_dir())
    for name in PATH_VARIABLES:
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())
    if Path(profile.model).is_dir():  # MEDQA_MODEL may be a local folder
        os.environ["MEDQA_MODEL"] = str(Path(profile.model).resolve())
    return current_profile()


def run_notebooks(paths: list[Path], folder: Path) -> None:
    """Execute the notebooks one after the other and write the executed copies to `folder`.

    Raises:
        NotebookFailed: a cell raised or the kernel died; the copy up to there is written too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    cells = sum(cell.cell_type == "code" for notebook in notebooks for cell in notebook.cells)
    with tqdm(total=cells, disable=None, bar_format=BAR) as bar:  # None: no bar where the output is a file, only the lines below
        for i, (path, notebook) in enumerate(zip(paths, notebooks, strict=True), start=1):
            tqdm.write(f"[{i}/{len(paths)}] {path.stem} ...")
            start = time.perf_counter()
            try:
                run_notebook(path, notebook, bar)
            finally:
                write_notebook(notebook, folder / path.name)
            tqdm.write(f"[{i}/{len(paths)}] {path.stem}: {time.perf_counter() - start:.0f} s")


def run_notebook(path: Path, notebook: nbformat.NotebookNode, bar: tqdm) -> None:
    """Execute one notebook in place, in a kernel of its own that starts in the notebook's folder.

    Raises:
        NotebookFailed: a cell raised or the kernel died.
        KeyboardInterrupt: Ctrl-C, once the kernel has ended.
    """
    client = ProgressClient(notebook, bar, resources={"metadata": {"path": str(path.parent)}})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # a copy that stops half-way must not show an older run below that
    try:
        client.execute()
    except CellExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
    except (RuntimeError, asyncio.CancelledError) as error:  # nbclient's DeadKernelError, and jupyter_client's own at the start
        if client.interrupted:
            raise KeyboardInterrupt from None
        problem = f"{error}. Most often memory ran out: close other programs and start again."
    else:
        return
    raise NotebookFailed(f"{path.name}, cell {client.cell_number} of {len(notebook.cells)}: {problem}")


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write an executed notebook without widget state, which GitHub refuses to render, and without this machine's paths."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            texts = output.get("data", output)  # MIME type -> text, or a stream's own fields
            for kind, text in texts.items():
                if isinstance(text, str) and not kind.startswith("image/"):
                    texts[kind] = hide_paths(text)
                elif kind == "traceback":
                    texts[kind] = [hide_paths(frame) for frame in text]
    partial = path.with_suffix(".partial")
    partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(partial, path)


def hide_paths(text: str) -> str:
    """The text with this machine's folders replaced by the names that they have for every reader."""
    folders = {NOTEBOOKS.parent: ".", home_dir(): "runs", Path(sys.prefix): ".venv", Path.home(): "~", Path(tempfile.gettempdir()): "TMP"}
    for folder, name in folders.items():
        if len(folder.parts) > 1:  # some containers have "/" as the home folder
            text = text.replace(str(folder), name)
    return text


def print_results(profile: Profile) -> None:
    """Base against experiments as a table with changes in percent, and where the comparison figure lies."""
    import pandas as pd

    from medqa_lib.evaluation.results import load_runs, summary_table

    runs = load_runs(home_dir() / "results" / profile.model_slug)
    if "base" not in runs:
        return
    table = summary_table(runs)
    shown = table.astype(str)
    for column in table.columns.drop("n_test"):
        for run, value in table[column].items():
            own_base = "base_random" if run.endswith("_random") and "base_random" in table.index else "base"  # the same test questions
            base = table.loc[own_base, column]
            change = f" ({value / base - 1:+.1%})" if base and run != own_base else ""
            shown.loc[run, column] = "-" if pd.isna(value) else f"{value:.4f}{change}"
    print(f"\n{profile.model}, profile {profile.name}; changes are against the base model on the same questions\n{shown.to_string()}")
    figure = Path(os.environ.get("MEDQA_FIGURES") or home_dir() / "figures") / f"changes_{profile.model_slug}.png"
    print(f"\nComparison figure: {figure}" if figure.exists() else "\nNotebook 20 draws the comparison figure.")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each notebook as it ends
    sys.exit(main())
