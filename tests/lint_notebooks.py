"""What every committed notebook must be like. `python tests/lint_notebooks.py [FILES]` prints each problem."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from set_repository import current_repository  # noqa: E402

FOLDER = Path(__file__).parents[1] / "notebooks"
BADGE = "(https://colab.research.google.com/github/{}/blob/main/notebooks/{})"
HEADINGS = ("Question", "Needs", "Reads", "Writes", "Next")
WITH_FIGURES = ("03", "04", "11", "12", "13", "14", "15", "20", "21", "23", "40")
TRAINING = ("11", "12", "13", "14", "15", "16", "17")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
PRIVATE_PATH = re.compile(
    r"(?<![\w.~/-])(?:/(?:home|root|Users|tmp|var|opt|usr|mnt|srv|work)/[\w.-]+|[A-Z]:\\+Users)"
)
CHATTER = re.compile(r"gemm_4bit|pip install kernels|modules are dequantized|frozen modules|FutureWarning|UserWarning")
MAX_CELLS, MAX_LINES, MAX_BYTES = 32, 20, 1_000_000


def find_problems(path: Path) -> list[str]:
    """All that is wrong with one notebook, a line each; empty if nothing is."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = notebook["cells"]
    shown = "\n".join(source_of(cell) + output_text(cell) for cell in cells)
    problems = [*check_layout(path, cells), *check_run(cells)]
    if len(text.encode()) > MAX_BYTES:
        problems.append(f"{len(text.encode()) / 1e6:.2f} MB; the limit is {MAX_BYTES / 1e6:.0f} MB")
    if "widgets" in notebook["metadata"]:
        problems.append("metadata.widgets: GitHub refuses to render it")
    if (notebook["metadata"].get("accelerator") == "GPU") != (path.name[:2] in TRAINING):
        problems.append("metadata.accelerator: only a notebook that trains asks for a GPU")
    if TOKEN.search(text):
        problems.append("something that looks like a Hugging Face token")
    if found := PRIVATE_PATH.search(shown):
        problems.append(f"path of a private machine: {found[0]}")
    if found := CHATTER.search(shown):
        problems.append(f"chatter of a library: {found[0]}")
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    if path.name[:2] in WITH_FIGURES and not any("image/png" in output.get("data", {}) for output in outputs):
        problems.append("no figure among the outputs")
    return problems


def check_layout(path: Path, cells: list[dict]) -> list[str]:
    """Problems in what an author wrote: opening, bootstrap cell, sizes, links."""
    problems = []
    opening = source_of(cells[0])
    if cells[0]["cell_type"] != "markdown" or not opening.startswith("# "):
        problems.append("cell 1 is not a markdown title")
    if BADGE.format(current_repository(), path.name) not in opening:
        problems.append("cell 1 has no Open-in-Colab badge with this notebook's address")
    if missing := [heading for heading in HEADINGS if f"| **{heading}** |" not in opening]:
        problems.append(f"the table in cell 1 lacks {', '.join(missing)}")
    if len(cells) < 2 or source_of(cells[1]) != bootstrap_source():
        problems.append(f"cell 2 is not the bootstrap cell of {bootstrap_notebook().name}")
    if len(cells) > MAX_CELLS:
        problems.append(f"{len(cells)} cells; at most {MAX_CELLS}")
    if len({cell.get("id") for cell in cells} - {None}) != len(cells):
        problems.append("cell ids are missing or not unique")
    for i, cell in enumerate(cells, start=1):
        source = source_of(cell)
        if cell["cell_type"] == "code":
            if (lines := source.count("\n") + 1) > MAX_LINES:
                problems.append(f"cell {i} has {lines} lines; at most {MAX_LINES}")
        else:
            links = re.findall(r"\]\(([^)\s]+)\)", source)
            files = [link.partition("#")[0] for link in links if "://" not in link]
            missing = [file for file in files if not (path.parent / file).exists()]
            problems += [f"cell {i} links to {file}, which does not exist" for file in missing]
    return problems


def check_run(cells: list[dict]) -> list[str]:
    """Problems in how the notebook was executed."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    problems = []
    if counts != list(range(1, len(code) + 1)):
        problems.append(f"not run from top to bottom: execution counts {counts}")
    if any(output["output_type"] == "error" for cell in code for output in cell["outputs"]):
        problems.append("an error is among the outputs")
    if any("<iframe" in "".join(output.get("data", {}).get("text/html", "")) for cell in code for output in cell["outputs"]):
        problems.append("a frame is among the outputs: a page of this machine, with its token, that GitHub does not show")
    return problems


def bootstrap_notebook() -> Path:
    return min(FOLDER.glob("*.ipynb"))


def bootstrap_source() -> str:
    """The second cell, which all notebooks share: it names the repository."""
    source = source_of(json.loads(bootstrap_notebook().read_text(encoding="utf-8"))["cells"][1])
    assert f'REPOSITORY = "{current_repository()}"' in source, "run tests/set_repository.py"
    return source


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def output_text(cell: dict) -> str:
    """All text that a cell printed or displayed, without pictures."""
    texts = []
    for output in cell.get("outputs", ()):
        texts += ["".join(output.get("text", "")), *output.get("traceback", ())]
        texts += ["".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def main() -> int:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    found = [f"{path.name}: {problem}" for path in paths for problem in find_problems(path)]
    print("\n".join(found) or f"{len(paths)} notebooks: no problem found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
