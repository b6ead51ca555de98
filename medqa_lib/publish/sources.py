"""Where an answer's words come from: the passages it was made with, and a page on the disease asked about.

MedQuAD's table has no page addresses, so a link is a search at MedlinePlus, the library it comes from.
"""

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote_plus

from medqa_lib.config import EXPERIMENTS, home_dir
from medqa_lib.evaluation.retrieval import Index, Passage, has_source

SEARCH = "https://vsearch.nlm.nih.gov/vivisimo/cgi-bin/query-meta?v%3Aproject=medlineplus&query="


@dataclass(frozen=True)
class Training:
    """What the demo takes from training rows: disease -> its answers, and passages."""

    diseases: dict[str, str]
    index: Index


def read_training() -> Training | None:
    """Of the newest splits in the project folder that are not the sample's; None if there are none."""
    manifests = (home_dir() / "data").glob("*/group/manifest.json")
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        sources = json.loads(path.read_text(encoding="utf-8")).get("sources", {})
        if sources.get("medquad", {}).get("origin", "bundled sample") != "bundled sample":
            from medqa_lib.data import load_splits  # a Space has neither the data nor the package `datasets`

            train = load_splits(path.parent)["train"]
            rows = train.to_pandas()
            diseases = rows[rows["focus_area"] != ""].groupby("focus_area")["answer"].agg("\n".join).to_dict()
            return Training(diseases, Index(train))
    return None


def reads_passages(name: str) -> bool:
    """Whether an adapter was trained with passages before its questions."""
    return name in EXPERIMENTS and bool(EXPERIMENTS[name].passages)


def find_disease(question: str, diseases: Iterable[str]) -> str:
    """The longest name of a disease that the question says, or ""."""
    names = [name for name in diseases if re.search(rf"\b{re.escape(name)}(?!\w)", question, re.IGNORECASE)]
    return max(names, key=len, default="")


def link(words: str) -> str:
    """HTML of the link: words and address alone."""
    return (f'<a href="{SEARCH}{quote_plus(words)}" target="_blank" rel="noopener">'
            f"{html.escape(words)}, at MedlinePlus</a>")


def list_sources(label: str, answer: str, passages: Sequence[Passage], question: str) -> str:
    """HTML: whether the passages support the answer (`retrieval.has_source`), and their titles and links."""
    verdict = "Sources" if has_source(answer, passages, question) else "No source found, the nearest are"
    titles = "".join(f"<li>{link(each.title)}</li>" for each in passages)
    return f"<p><b>{verdict}</b>, {html.escape(label)}:</p><ol>{titles}</ol>"
