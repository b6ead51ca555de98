"""README.md against the files that it speaks of."""

from pathlib import Path

from medqa_lib import results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_gives_the_gpu_time_of_the_published_runs():
    said = results.describe_gpu_time(results.load_runs(ROOT / "assets" / "results" / "smollm2-135m"))
    assert said in " ".join(README.split()), f"README.md must say: {said}"


def test_readme_tree_names_every_module():
    tree = README.partition("## The tree")[2].partition("notebooks/")[0].replace(",", " ").split()
    assert [path.stem for path in sorted((ROOT / "medqa_lib").glob("[!_]*.py")) if path.stem not in tree] == []
