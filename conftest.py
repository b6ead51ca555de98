"""The surroundings of every test, and of the kernels in which `pytest --nbmake` runs the notebooks.

Here and not under tests/, so that `pytest --nbmake notebooks/20_compare_experiments.ipynb` alone is the smoke profile too.
"""

import os
import shutil
import tempfile

RUN_HOME = tempfile.mkdtemp(prefix="medqa-tests-")


def pytest_configure() -> None:
    os.environ["MEDQA_PROFILE"] = "smoke"
    os.environ["MEDQA_HOME"] = RUN_HOME
    os.environ.pop("MEDQA_MODEL", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "MEDQA_DATA_DIR" in os.environ:  # a notebook's kernel starts in notebooks/, where a relative path means another folder
        os.environ["MEDQA_DATA_DIR"] = os.path.abspath(os.environ["MEDQA_DATA_DIR"])


def pytest_unconfigure() -> None:
    shutil.rmtree(RUN_HOME, ignore_errors=True)
