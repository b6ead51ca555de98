"""`python tests/set_repository.py OWNER/NAME`: write the repository's address where it is needed.

The address has one home, `[project.urls]` in pyproject.toml. Badges and bootstrap cells are copies of it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "YOUR_GITHUB_NAME/medqa"  # GitHub allows no underscore in an account's name: it can be nobody's
FILES = ("pyproject.toml", "README.md", "notebooks/*.ipynb", "medqa_lib/publish/card.md")


def current_repository(root: Path = ROOT) -> str:
    """OWNER/NAME in pyproject.toml."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def set_repository(new: str, root: Path = ROOT) -> int:
    """Replace the address in all files; returns in how many.

    Raises:
        ValueError: `new` is not OWNER/NAME.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", new):
        raise ValueError(f"{new!r} is not OWNER/NAME, for example jane/medqa")
    old, changed = current_repository(root), 0
    for path in [path for pattern in FILES for path in sorted(root.glob(pattern))]:
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, new), encoding="utf-8")
            changed += 1
    return changed


if __name__ == "__main__":
    try:
        print(f"{set_repository(*sys.argv[1:])} files changed")
    except (TypeError, ValueError) as error:
        sys.exit(f"{error}\nusage: python tests/set_repository.py OWNER/NAME")
