"""Where to read more after an answer: at MedlinePlus, on the disease that the question names.

MedQuAD's table has no page addresses, so the link is a search for the disease at the library it comes from.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from urllib.parse import quote_plus

from medqa_lib.config import home_dir

SEARCH = "https://vsearch.nlm.nih.gov/vivisimo/cgi-bin/query-meta?v%3Aproject=medlineplus&query="


def read_diseases() -> dict[str, str]:
    """Disease -> its training answers, of the newest splits in the project folder, but not of the sample."""
    manifests = (home_dir() / "data").glob("*/group/manifest.json")
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        sources = json.loads(path.read_text(encoding="utf-8")).get("sources", {})
        if sources.get("medquad", {}).get("origin", "bundled sample") != "bundled sample":
            from medqa_lib.data import load_splits  # a Space has neither the data nor the package `datasets`

            rows = load_splits(path.parent)["train"].to_pandas()
            return rows[rows["focus_area"] != ""].groupby("focus_area")["answer"].agg("\n".join).to_dict()
    return {}


def find_disease(question: str, diseases: Iterable[str]) -> str:
    """The longest name of a disease that the question says, or ""."""
    names = [name for name in diseases if re.search(rf"\b{re.escape(name)}(?!\w)", question, re.IGNORECASE)]
    return max(names, key=len, default="")


def link(disease: str) -> str:
    """HTML of the link: title and address alone."""
    return (f'<p>Read more: <a href="{SEARCH}{quote_plus(disease)}" target="_blank" rel="noopener">'
            f"{html.escape(disease)}, at MedlinePlus</a></p>")
