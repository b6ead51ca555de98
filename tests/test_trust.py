"""What the project never does: run code that it downloaded, write outside its folder, show a token, use a file that was cut short."""

import ast
import json
import re
from pathlib import Path

import pytest

from medqa_lib import model
from medqa_lib.config import PROFILES

ROOT = Path(__file__).parents[1]
CANARY = "hf_" + "canary" * 5
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "os.system",
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "pd.read_pickle",
}


def sources():
    """(name, code) of every module of the library and every notebook; IPython's own lines are left out."""
    for path in sorted((ROOT / "medqa_lib").rglob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [
            cell
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == "code"
        ]
        lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
        yield path.name, "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines)


def dangers(code):
    """Line and name of each use of something that runs code from data."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in FORBIDDEN_CALLS:
                yield node.lineno, ast.unparse(node.func)
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and value != "False":
                    yield node.lineno, f"{keyword.arg}={value}"
                if keyword.arg == "weights_only" and value != "True":
                    yield node.lineno, f"weights_only={value}"


def test_no_source_runs_code_from_data():
    found = [f"{name}:{line} {what}" for name, code in sources() for line, what in dangers(code)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "exec(text)",
        "load(x, trust_remote_code=True)",
        "run(command, shell=True)",
        "read(x, weights_only=False)",
    ],
)
def test_dangers_sees_each_kind(code):
    assert len(list(dangers(code))) == 1


def test_load_tokenizer_that_fails_shows_no_token(monkeypatch):
    from transformers import AutoTokenizer

    def refuse(path, **options):
        raise OSError(f"401 Client Error for {path}\nAuthorization: Bearer {CANARY}")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setenv("MEDQA_MODEL", "someone/gated")
    with pytest.raises(RuntimeError, match="could not be loaded") as error:
        model.load_tokenizer(PROFILES["gpu"])
    assert CANARY not in str(error.value) and error.value.__suppress_context__
