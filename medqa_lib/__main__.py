"""`python -m medqa_lib`: run the notebooks from top to bottom without a browser, then print the results.

Finished runs are reused, and a training that was cut off goes on from its newest valid checkpoint: the same
command continues after a crash.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.util import run_sync

from medqa_lib import colab
from medqa_lib.config import Profile, current_profile, home_dir
from medqa_lib.reasons import user_errors

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CPU_LIST = ("00", "01", "02", "03", "04", "11", "12", "13", "14", "20")  # five minutes on 2 CPU cores


def main(arguments: list[str] | None = None) -> int:
    """Run the notebooks that the command line names. Returns 0, 1 if one failed, 130 after Ctrl-C."""
    available = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    parser = argparse.ArgumentParser(prog="python -m medqa_lib", description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help="for example 11 20")
    parser.add_argument("--list", action="store_true", help="show the notebooks; * marks the default ones")
    parser.add_argument("--gpus", type=int, default=1, metavar="N",
                        help="run notebooks that train side by side, one on each of N GPUs")
    parser.add_argument("--in-place", action="store_true", help="write executed notebooks over notebooks/")
    options = parser.parse_args(arguments)
    profile = prepare_environment()
    default = [number for number in available if profile.name != "cpu" or number in CPU_LIST]
    if options.list:
        for number, path in available.items():
            print("*" if number in default else " ", path.stem)
        return 0
    numbers = [number.zfill(2) for number in options.numbers] or default
    if unknown := [number for number in numbers if number not in available]:
        parser.error(f"no notebook {' '.join(unknown)} in {NOTEBOOKS}; expected {' '.join(available)}")
    paths = [available[number] for number in numbers]
    folder = NOTEBOOKS if options.in_place else home_dir() / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    # Importing takes longer than most notebooks do on a CPU. On a GPU each process gives its memory back.
    several = options.gpus > 1
    shared = None if options.in_place or several or profile.name == "gpu" else new_kernel()
    try:
        return run_on_gpus(paths, folder, options.gpus) if several else run_notebooks(paths, folder, shared)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the newest checkpoint.", file=sys.stderr)
        return 130
    finally:
        if shared and shared.has_kernel:
            run_sync(shared.shutdown_kernel)(now=True)


class Client(NotebookClient):
    """Clears the kernel first: as after a restart, but what others have imported is still in memory."""

    def __init__(self, notebook: nbformat.NotebookNode, km=None, **options):
        super().__init__(notebook, km, **options)
        # What is left, the imports, is looked through once: each Trainer collects several times.
        clear = "get_ipython().reset(); import gc; gc.collect(); gc.freeze(); del gc"
        self.on_notebook_start = lambda notebook: self.kc.execute_interactive(clear, silent=True)


def new_kernel():
    """A kernel manager for several notebooks in turn; its kernel starts with the first."""
    return NotebookClient(nbformat.v4.new_notebook()).create_kernel_manager()


def run_notebooks(paths: list[Path], folder: Path, kernel=None) -> int:
    """Execute them in turn, then print the results. Returns 1 if one failed, else 0."""
    for place, path in enumerate(paths, start=1):
        title, start = f"[{place}/{len(paths)}] {path.stem}", time.perf_counter()
        print(f"{title} ...", flush=True)
        if problem := run_notebook(path, folder, kernel):
            print(f"\n{problem}", file=sys.stderr)
            return 1
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
    print_results(current_profile())
    return 0


def run_on_gpus(paths: list[Path], folder: Path, gpus: int) -> int:
    """Each notebook in a process of its own: those that train side by side, the others in turn.

    Where two need one run, the second waits for the first and reads it. Returns 1 if one failed, else 0.
    """
    free, seen = SimpleQueue(), os.environ.get("CUDA_VISIBLE_DEVICES")
    for gpu in seen.split(",")[:gpus] if seen else range(gpus):
        free.put(gpu)

    def run(path: Path) -> int:
        """Run a notebook on a GPU that is free. Returns the exit status."""
        gpu, began = free.get(), time.perf_counter()
        command = [sys.executable, "-m", "medqa_lib", path.name[:2]]
        command += ["--in-place"] if folder == NOTEBOOKS else []
        variables = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        try:
            print(f"GPU {gpu}: {path.stem} ...", flush=True)
            code = subprocess.run(command, env=variables, stdout=subprocess.DEVNULL).returncode
            print(f"GPU {gpu}: {path.stem}: {time.perf_counter() - began:.0f} s", flush=True)
            return code
        finally:
            free.put(gpu)

    def trains(path: Path) -> bool:
        """Whether the notebook asks Colab for a GPU."""
        return nbformat.read(path, as_version=4).metadata.get("accelerator") == "GPU"

    with ThreadPoolExecutor(gpus) as pool:
        for side_by_side, some in groupby(paths, trains):
            start = pool.map if side_by_side else map
            if any(start(run, some)):
                return 1
    print_results(current_profile())
    return 0


def prepare_environment() -> Profile:
    """Fix the profile and the folders for all kernels, which start in notebooks/. In Colab they are on Drive.

    Raises:
        ValueError: there is no such profile, or the project folder cannot be written.
    """
    os.environ["MEDQA_HOME"] = str(colab.mount_drive())
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else each kernel warns of frozen modules
    profile = current_profile()
    os.environ["MEDQA_PROFILE"] = profile.name
    for name, path in (("MEDQA_DATA_DIR", os.environ.get("MEDQA_DATA_DIR")), ("MEDQA_MODEL", profile.model)):
        if path and Path(path).expanduser().exists():  # the model may be a local folder
            os.environ[name] = str(Path(path).expanduser().resolve())
    return current_profile()


def run_notebook(path: Path, folder: Path, kernel=None) -> str:
    """Execute a notebook in `kernel` or one of its own; write the copy, up to a failed cell, to `folder`.

    Returns:
        Which cell failed and why; "" if none did.
    """
    notebook, number = nbformat.read(path, as_version=4), 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # older outputs must not stand below a stop
    client = Client(notebook, kernel, timeout=None, coalesce_streams=True, record_timing=False,
                    shutdown_kernel="immediate", resources={"metadata": {"path": str(path.parent)}},
                    extra_arguments=["--log-level=ERROR"])
    try:
        with client.setup_kernel():  # not `execute`: its handler makes Ctrl-C look like a dead kernel
            for number, cell in enumerate(notebook.cells, start=1):
                client.execute_cell(cell, number - 1)
        return ""
    except CellExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        problem = "the kernel died, most often because memory ran out: close other programs and start again"
    finally:
        write_notebook(notebook, folder / path.name)
    return f"{path.name}, cell {number} of {len(notebook.cells)}: {problem}"


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook without widget state, which GitHub refuses, and without this machine's paths."""
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
    folders = {NOTEBOOKS.parent: ".", home_dir(): "runs", Path(sys.prefix): ".venv", Path.home(): "~",
               Path(tempfile.gettempdir()): "TMP"}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        if len(folder.parts) > 1:  # some containers have "/" as the home folder
            text = text.replace(str(folder), folders[folder])
    return text


def print_results(profile: Profile) -> None:
    """The untuned model and the experiments in one table."""
    from medqa_lib.evaluation.results import load_runs
    from medqa_lib.evaluation.tables import summary_table

    runs = load_runs(home_dir() / "results" / profile.model_slug)
    if runs:
        print(f"\n{profile.model}, profile {profile.name}\n{summary_table(runs).round(4).to_string()}")
        print("\nNotebook 20 compares them, with intervals.")


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
