"""The committed notebooks, and the linter itself on notebooks that are broken on purpose."""

import json
import os

import lint_notebooks as lint
import pytest

NOTEBOOKS = sorted(lint.FOLDER.glob("*.ipynb"))
NAME = "11_made_up.ipynb"


def add_text(notebook, text):
    notebook["cells"][3]["outputs"].append({"output_type": "stream", "name": "stdout", "text": text})


def code_cell(source, count, outputs=()):
    return {
        "cell_type": "code",
        "id": f"c{count}",
        "metadata": {},
        "execution_count": count,
        "source": source,
        "outputs": list(outputs),
    }


@pytest.fixture
def good():
    table = "\n".join(f"| **{heading}** | x |" for heading in lint.HEADINGS)
    opening = (
        f"# Title\n\n[![Open in Colab](b.svg)]{lint.BADGE.format(NAME)}\n\n| | |\n| --- | --- |\n{table}"
    )
    opening = opening.replace("(b.svg)", "(https://colab.research.google.com/assets/colab-badge.svg)")
    picture = {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"},
    }
    cells = [
        {"cell_type": "markdown", "id": "m1", "metadata": {}, "source": opening},
        code_cell(lint.bootstrap_source(), 1),
        {
            "cell_type": "markdown",
            "id": "m2",
            "metadata": {},
            "source": f"See [here]({NAME}) and [there](https://example.org).",
        },
        code_cell("%matplotlib inline\nx = 1", 2, [picture]),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def problems_of(notebook, folder):
    path = folder / NAME
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return lint.find_problems(path)


def test_find_problems_accepts_a_good_notebook(good, tmp_path):
    assert problems_of(good, tmp_path) == []


BREAKS = {
    "is not a markdown title": lambda nb: nb["cells"][0].update(
        source=nb["cells"][0]["source"].replace("# Title", "Title")
    ),
    "no Open-in-Colab badge": lambda nb: nb["cells"][0].update(
        source=nb["cells"][0]["source"].replace(NAME, "12_other.ipynb")
    ),
    "lacks Writes": lambda nb: nb["cells"][0].update(
        source=nb["cells"][0]["source"].replace("**Writes**", "Writes")
    ),
    "is not the bootstrap cell": lambda nb: nb["cells"][1].update(source="import os"),
    "cells; at most 40": lambda nb: nb.update(
        cells=nb["cells"] + [code_cell("x = 1", i) for i in range(3, 41)]
    ),
    "are prose": lambda nb: nb.update(cells=nb["cells"] + [code_cell("x = 1", i) for i in range(3, 9)]),
    "ids are missing": lambda nb: nb["cells"][3].update(id="m1"),
    "has 16 lines": lambda nb: nb["cells"][3].update(source="\n".join(["x = 1"] * 16)),
    "defines answer": lambda nb: nb["cells"][3].update(
        source="!ls\nif True:\n    def answer():\n        return 42"
    ),
    "defines Answer": lambda nb: nb["cells"][3].update(source="class Answer:\n    pass"),
    "links to 99_missing.ipynb": lambda nb: nb["cells"][2].update(source="[next](99_missing.ipynb)"),
    "execution counts [1, 3]": lambda nb: nb["cells"][3].update(execution_count=3),
    "execution counts [1, None]": lambda nb: nb["cells"][3].update(execution_count=None),
    "error is among": lambda nb: nb["cells"][3]["outputs"].append({"output_type": "error", "traceback": []}),
    "metadata.widgets": lambda nb: nb["metadata"].update(widgets={}),
    "Hugging Face token": lambda nb: add_text(nb, "hf" + "_" + "a1" * 17),
    "private machine: /home/me": lambda nb: add_text(nb, ["Saved in ", "/home/me/medqa"]),
    "no figure": lambda nb: nb["cells"][3].update(outputs=[]),
    "1.00 MB": lambda nb: nb["cells"][3]["outputs"][0]["data"].update({"image/png": "A" * 1_000_000}),
}


@pytest.mark.parametrize("problem", BREAKS)
def test_find_problems_names_what_is_broken(problem, good, tmp_path):
    BREAKS[problem](good)
    assert problem in "\n".join(problems_of(good, tmp_path))


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
