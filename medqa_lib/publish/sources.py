"""Where to read more after an answer: MedlinePlus on the disease of the nearest training question.

MedQuAD's table has no page addresses, so the link is a search for the disease at the library it comes from.
"""

from __future__ import annotations

import html
import json
from typing import NamedTuple, Self
from urllib.parse import quote_plus

from medqa_lib.config import home_dir
from medqa_lib.data import load_splits

SEARCH = "https://vsearch.nlm.nih.gov/vivisimo/cgi-bin/query-meta?v%3Aproject=medlineplus&query="
NEAREST = 0.5  # cosine below which no training question is near


class Source(NamedTuple):
    """A disease, and the training answer about it."""

    title: str
    text: str

    def link(self) -> str:
        """HTML of the link: title and address alone."""
        return (f'<p>Read more: <a href="{SEARCH}{quote_plus(self.title)}" target="_blank" rel="noopener">'
                f"{html.escape(self.title)}, at MedlinePlus</a> (of the nearest training question).</p>")


class Sources:
    """Training questions that name a disease, as TF-IDF vectors.

    Args:
        train: a split with the columns question, answer, focus_area.
    """

    def __init__(self, train):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.rows = [Source(row["focus_area"], row["answer"]) for row in train if row["focus_area"]]
        self.vectorizer = TfidfVectorizer(sublinear_tf=True)
        self.vectors = self.vectorizer.fit_transform(row["question"] for row in train if row["focus_area"])

    @classmethod
    def of_home(cls) -> Self | None:
        """Of the newest splits in the project folder; None if there are none but of the bundled sample."""
        manifests = (home_dir() / "data").glob("*/group/manifest.json")
        for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
            sources = json.loads(path.read_text(encoding="utf-8")).get("sources", {})
            if sources.get("medquad", {}).get("origin", "bundled sample") != "bundled sample":
                return cls(load_splits(path.parent)["train"])
        return None

    def find(self, question: str) -> Source | None:
        """The source of the nearest training question, if its cosine is at least NEAREST."""
        cosines = (self.vectors @ self.vectorizer.transform([question]).T).toarray()[:, 0]
        return self.rows[cosines.argmax()] if cosines.max() >= NEAREST else None
