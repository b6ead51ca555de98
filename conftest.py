"""The surroundings of every test, and of the kernels in which `pytest --nbmake` runs the notebooks.

Here and not under tests/, so that `pytest --nbmake notebooks/20_compare_experiments.ipynb` alone is the smoke profile too.
"""

import functools
import gc
import os
import shutil
import tempfile

import pytest

RUN_HOME = tempfile.mkdtemp(prefix="medqa-tests-")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["MEDQA_PROFILE"] = "smoke"
    os.environ["MEDQA_HOME"] = RUN_HOME
    os.environ.pop("MEDQA_MODEL", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not os.path.exists(
        "/dev/nvidiactl"
    ):  # no NVIDIA GPU: Triton's interpreter, chosen when Triton is imported, by whichever test
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if (
        "MEDQA_DATA_DIR" in os.environ
    ):  # a notebook's kernel starts in notebooks/, where a relative path means another folder
        os.environ["MEDQA_DATA_DIR"] = os.path.abspath(os.environ["MEDQA_DATA_DIR"])
    if getattr(config.option, "nbmake", False):  # all notebooks share a kernel: imports take longer than most of them
        from nbmake import nb_run

        from medqa_lib.__main__ import Client, new_kernel

        config.kernel = new_kernel()
        nb_run.NotebookClient = functools.partial(Client, km=config.kernel)


@pytest.hookimpl(
    optionalhook=True
)  # a GPU machine may lack pytest-xdist: pytest -o addopts=--import-mode=importlib FILE
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two for the notebooks or for all quick tests, which halves minutes on two cores; else none: a single test starts at once."""
    all_quick = not config.option.file_or_dir and "not slow" in config.option.markexpr
    return 2 if config.option.nbmake or all_quick else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks come first: they take longest, and one process runs them all."""
    items.sort(key=lambda item: item.path.suffix != ".ipynb")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """One process runs all notebooks, each of which reuses the splits and runs of those before it; others share files.

    xdist's own `--dist loadgroup` does nothing with pytest 9.2: it writes a private name that is no longer read.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "notebooks" if path.endswith(".ipynb") else path

    config.option.loadscopereorder = False  # it would put files of many small tests first
    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What a gc.collect() has left, the imports above all, no later one looks through: each Trainer calls several."""
    gc.callbacks.append(lambda phase, about: gc.freeze() if phase == "stop" and about["generation"] == 2 else None)
    gc.collect()


def pytest_unconfigure(config: pytest.Config) -> None:
    if (kernel := getattr(config, "kernel", None)) and kernel.has_kernel:
        from nbclient.util import run_sync

        run_sync(kernel.shutdown_kernel)(now=True)
    shutil.rmtree(RUN_HOME, ignore_errors=True)
