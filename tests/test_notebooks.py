"""The committed notebooks, and the linter itself on notebooks that are broken on purpose."""

import json
import os
import re

import lint_notebooks as lint
import pytest
from set_repository import PLACEHOLDER, current_repository, set_repository

NOTEBOOKS = sorted(lint.FOLDER.glob("*.ipynb"))
NAME = "11_made_up.ipynb"


def add_text(notebook, text):
    notebook["cells"][3]["outputs"].append({"output_type": "stream", "name": "stdout", "text": text})


def code_cell(source, count, outputs=()):
    return {"cell_type": "code", "id": f"c{count}", "metadata": {}, "execution_count": count, "source": source,
            "outputs": list(outputs)}


@pytest.fixture
def good():
    table = "\n".join(f"| **{heading}** | x |" for heading in lint.HEADINGS)
    badge = lint.BADGE.format(current_repository(), NAME)
    opening = f"# Title\n\n[![Open in Colab](https://example.org/b.svg)]{badge}\n\n| | |\n| --- | --- |\n{table}"
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo="}}
    prose = f"See [here]({NAME}) and [there](https://example.org)."
    cells = [
        {"cell_type": "markdown", "id": "m1", "metadata": {}, "source": opening},
        code_cell(lint.bootstrap_source(), 1),
        {"cell_type": "markdown", "id": "m2", "metadata": {}, "source": prose},
        code_cell("def double(x):\n    return 2 * x", 2, [picture]),
    ]
    return {"cells": cells, "metadata": {"accelerator": "GPU"}, "nbformat": 4, "nbformat_minor": 5}


def problems_of(notebook, folder):
    path = folder / NAME
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return lint.find_problems(path)


def test_a_good_notebook_has_no_problem(good, tmp_path):
    assert problems_of(good, tmp_path) == []


def replace_title(old, new):
    return lambda nb: nb["cells"][0].update(source=nb["cells"][0]["source"].replace(old, new))


BREAKS = {
    "no title": replace_title("# Title", "Title"),
    "badge of another notebook": replace_title(NAME, "12_other.ipynb"),
    "badge of another repository": replace_title(current_repository(), "somebody/else"),
    "heading missing": replace_title("**Writes**", "Writes"),
    "other bootstrap": lambda nb: nb["cells"][1].update(source="import os"),
    "too many cells": lambda nb: nb["cells"].extend(code_cell("x = 1", i) for i in range(3, 40)),
    "equal ids": lambda nb: nb["cells"][3].update(id="m1"),
    "long cell": lambda nb: nb["cells"][3].update(source="\n".join(["x = 1"] * 21)),
    "dead link": lambda nb: nb["cells"][2].update(source="[next](99_missing.ipynb)"),
    "not run in order": lambda nb: nb["cells"][3].update(execution_count=3),
    "not run": lambda nb: nb["cells"][3].update(execution_count=None),
    "error": lambda nb: nb["cells"][3]["outputs"].append({"output_type": "error", "traceback": []}),
    "widgets": lambda nb: nb["metadata"].update(widgets={}),
    "no GPU asked for": lambda nb: nb["metadata"].pop("accelerator"),
    "token": lambda nb: add_text(nb, "hf" + "_" + "a1" * 17),
    "private path": lambda nb: add_text(nb, ["Saved in ", "/home/me/medqa"]),
    "chatter": lambda nb: add_text(nb, "Failed to load CPU gemm_4bit_forward"),
    "no figure": lambda nb: nb["cells"][3].update(outputs=[]),
    "too large": lambda nb: nb["cells"][3]["outputs"][0]["data"].update({"image/png": "A" * 1_000_000}),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_each_fault_is_one_problem(fault, good, tmp_path):
    BREAKS[fault](good)
    assert len(problems_of(good, tmp_path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "/content/medqa",
        "./runs/results",
        "~/medqa",
        "https://example.org/home/me",
        "and/opt/or",
        "runs/tmp/x",
    ],
)
def test_private_path_spares_what_every_reader_has(text):
    assert not lint.PRIVATE_PATH.search(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_find_problems_finds_none_in_committed_notebooks(path):
    assert lint.find_problems(path) == []


def test_committed_notebooks_quote_no_row_of_a_real_data_set():
    """Runs only where the real data is: set MEDQA_DATA_DIR."""
    if "MEDQA_DATA_DIR" not in os.environ:
        pytest.skip("MEDQA_DATA_DIR is not set")
    from medqa_lib.data import load_sources

    sources = load_sources()
    values = [
        *sources["medquad"]["answer"],
        *sources["afrimedqa"]["question"],
        *sources["afrimedqa"]["answer_rationale"],
    ]
    rows = {" ".join(str(value)[:80].split()) for value in values if len(str(value)) >= 80}
    assert len(rows) > 10_000
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        shown = " ".join(" ".join(lint.output_text(cell) for cell in cells).split())
        assert [row for row in rows if row in shown] == []


def test_set_repository_writes_every_copy(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "https://github.com/{PLACEHOLDER}"\n')
    for name in ("README.md", "notebooks/00.ipynb"):
        (tmp_path / name).write_text(f"see github.com/{PLACEHOLDER} and github.com/{PLACEHOLDER}/blob")
    assert set_repository("jane/medqa-fork", tmp_path) == 3
    assert current_repository(tmp_path) == "jane/medqa-fork"
    assert (tmp_path / "notebooks/00.ipynb").read_text().count("jane/medqa-fork") == 2
    with pytest.raises(ValueError, match="no slash"):
        set_repository("no slash", tmp_path)


def test_readme_and_notebooks_name_one_repository():
    address = current_repository()
    for path in [lint.FOLDER.parent / "README.md", *NOTEBOOKS]:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"colab.research.google.com/github/([^/]+/[^/]+)/", text)) == {address}, path.name
