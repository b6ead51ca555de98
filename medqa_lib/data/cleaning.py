"""From raw rows to question-answer pairs, step by step, each step counted in a funnel.

A row step takes one `Row` and returns it (perhaps changed) or None (removed); a set step takes and returns all rows.
Nothing disappears uncounted: kept + removed = raw, whatever a cell holds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from medqa_lib.data import choices, texts
from medqa_lib.data.texts import text_cell, text_key

MIN_WORDS_BESIDE_TABLE = 10  # what is left of an answer beside a phenotype table must say something
MAX_CELL_CHARACTERS = 50_000  # the longest real answer has 30,000; beyond it, a quote in the CSV was not closed
LONG_ANSWER_WORDS = 300  # about what 512 tokens hold beside the question
TEMPLATE_WORDS = 8  # from here on one answer under two questions is a template, not coincidence
TEMPLATE_CAP = 3
PLACEHOLDERS = {"", "no rationale", "no rationale provided", "no answer", "no explanation", "none", "null", "nan", "na", "n a", "nil",
                "not available", "not applicable"}
_LETTER = re.compile(r"[^\W_]")
_NOT_MEDICAL = re.compile(r"\blogical(?:ly)? (?:conclude|infer|reasoning)|^if all\b|\bgenealog|\bbury the survivors", re.IGNORECASE)


class Row(NamedTuple):
    """One raw, then cleaned pair. Until `use_text` ran, a field holds whatever the source's cell held."""

    question: Any
    answer: Any
    source: str
    focus_area: Any = ""
    kind: Any = "qa"  # "qa", "saq", "mcq" or "consumer_queries"
    options: Any = ""  # JSON; from `read_options` on a tuple of texts
    correct: Any = ""  # "option4" or "option1,option3"; from `read_options` on a tuple of places in options
    choices: str = ""  # JSON {"options": [...], "correct": 2} of a question with exactly one key


# --- steps on one row ------------------------------------------------------------------------------------------------


def is_placeholder(text: str) -> bool:
    """Whether the text only says that there is none."""
    return len(text) < 40 and text_key(text) in PLACEHOLDERS


def use_text(row: Row) -> Row:
    """Make every cell text, and an answer such as "No rationale" empty."""
    row = Row(*map(text_cell, row))
    question, answer = ("" if is_placeholder(text) else text for text in (row.question, row.answer))
    return row._replace(question=question, answer=answer)


def drop_consumer_query(row: Row) -> Row | None:
    """Consumer questions of AfriMed-QA have no reference answer."""
    return None if row.kind == "consumer_queries" else row


def drop_oversized(row: Row) -> Row | None:
    """A cell longer than every real answer comes from a damaged file."""
    return None if max(map(len, row)) > MAX_CELL_CHARACTERS else row


def read_options(row: Row) -> Row | None:
    """Parse options and key of a multiple-choice row; without options, a rationale makes it a free question."""
    if row.kind != "mcq":
        return row
    if not row.options.strip():
        return row._replace(kind="saq") if row.answer else None
    parsed = choices.read_options(row.options, row.correct)
    return row._replace(options=parsed[0], correct=parsed[1]) if parsed else None


def clean_texts(row: Row) -> Row:
    """Unicode, HTML and white space in every text of the row."""
    question, answer, focus_area = map(texts.clean_text, (row.question, row.answer, row.focus_area))
    options = tuple(map(texts.clean_text, row.options)) if row.kind == "mcq" else row.options
    return row._replace(question=question, answer=answer, focus_area=focus_area, options=options)


def fix_templates(row: Row) -> Row | None:
    """Question templates, numbering and labels; a template with an empty slot asks nothing and is removed."""
    focus_area = texts.fix_focus_area(row.focus_area)
    question = texts.fix_question(row.question, focus_area, row.answer)
    if row.question and not question:
        return None
    answer = texts.strip_answer_label(row.answer)
    options = choices.tidy_options(row.options) if row.kind == "mcq" else row.options
    return row._replace(question=question, answer=answer, focus_area=focus_area, options=options)


def merge_equal_options(row: Row) -> Row | None:
    """Offer each option once, and none that cleaning emptied; a question left with one option or without its right one is none."""
    if row.kind != "mcq":
        return row
    merged = choices.merge_equal_options(row.options, row.correct)
    return row._replace(options=merged[0], correct=merged[1]) if merged else None


def cut_phenotype_table(row: Row) -> Row | None:
    """Cut the flattened table out of the answer; an answer that was little else is removed."""
    answer = texts.cut_phenotype_table(row.answer)
    if answer == row.answer:
        return row
    return row._replace(answer=answer) if len(texts.strip_echo(answer, row.question).split()) >= MIN_WORDS_BESIDE_TABLE else None


def strip_page_parts(row: Row) -> Row:
    """Headings such as "Key Points", tables of contents, publishers' names."""
    return row._replace(answer=texts.strip_page_parts(row.answer))


def strip_echo(row: Row) -> Row:
    """The question asked again at the start of its answer."""
    return row._replace(answer=texts.strip_echo(row.answer, row.question))


def drop_links(row: Row) -> Row | None:
    """An answer that only lists links answers nothing."""
    return None if texts.has_only_links(row.answer) else row


def write_pair(row: Row) -> Row:
    """A multiple-choice row as a pair: question with lettered options -> text of the right one and a real rationale."""
    if row.kind != "mcq" or not row.question:
        return row
    is_empty = is_placeholder(row.answer) or text_key(row.answer) == text_key("; ".join(row.options[place] for place in row.correct))
    pair = choices.write_pair(row.question, row.options, row.correct, "" if is_empty else row.answer)
    return row._replace(question=pair[0], answer=pair[1], choices=pair[2])


def drop_empty(row: Row) -> Row | None:
    """No question or no answer is left."""
    return row if _LETTER.search(row.question) and _LETTER.search(row.answer) else None


def drop_short(row: Row) -> Row | None:
    """Under three words a free answer says nothing; a right option may have one word."""
    return row if row.kind == "mcq" or len(row.answer.split()) >= 3 else None


def drop_repetition(row: Row) -> Row | None:
    """A free answer that is the question, or only asks another."""
    is_question = text_key(row.question) == text_key(row.answer) or re.fullmatch(r"[^.?!]*\?", row.answer)
    return None if is_question and row.kind != "mcq" else row


def drop_not_medical(row: Row) -> Row | None:
    """Logic puzzles and genealogy in AfriMed-QA."""
    return None if row.source == "afrimedqa" and _NOT_MEDICAL.search(row.question) else row


# --- steps on all rows -----------------------------------------------------------------------------------------------


def drop_exact_pairs(rows: list[Row]) -> list[Row]:
    """Of pairs with the same words in question and answer keep one, whatever the order of rows."""
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (text_key(row.question), text_key(row.answer))
        kept[key] = max(kept.get(key, row), row, key=lambda row: (row.question, row.answer, row.focus_area))  # small letters win
    return list(kept.values())


def keep_one_answer(rows: list[Row]) -> list[Row]:
    """Of several answers to a question keep the fullest of at most 300 words, or the shortest if all are longer."""

    def preference(row: Row) -> tuple:
        words = len(row.answer.split())
        return (words > LONG_ANSWER_WORDS, words if words > LONG_ANSWER_WORDS else -words, row.answer)

    best: dict[str, Row] = {}
    for row in rows:
        key = text_key(row.question)
        best[key] = min(best.get(key, row), row, key=preference)
    return list(best.values())


def cap_template_answers(rows: list[Row]) -> list[Row]:
    """One text under many diseases (a paragraph on inheritance, say) stays under three of them."""
    askers = defaultdict(list)
    for row in rows:
        if len(row.answer.split()) >= TEMPLATE_WORDS:
            askers[text_key(row.answer)].append(row.question)
    kept = {answer: sorted(questions)[:TEMPLATE_CAP] for answer, questions in askers.items() if len(questions) > TEMPLATE_CAP}
    return [row for row in rows if row.question in kept.get(text_key(row.answer), (row.question,))]


ROW_STEPS: tuple[tuple[str, Callable[[Row], Row | None]], ...] = (
    ("strings and placeholders", use_text),
    ("consumer questions (no reference answer)", drop_consumer_query),
    ("oversized cells", drop_oversized),
    ("options and key", read_options),
    ("Unicode, HTML and white space", clean_texts),
    ("question templates and labels", fix_templates),
    ("equal options", merge_equal_options),
    ("phenotype tables", cut_phenotype_table),
    ("lead-ins and page parts", strip_page_parts),
    ("echoed question", strip_echo),
    ("link-only answers", drop_links),
    ("choices to question and answer", write_pair),
    ("no question or answer", drop_empty),
    ("under three words", drop_short),
    ("answer is a question", drop_repetition),
    ("not medical", drop_not_medical),
)
SET_STEPS: tuple[tuple[str, Callable[[list[Row]], list[Row]]], ...] = (
    ("exact pairs", drop_exact_pairs),
    ("one answer a question", keep_one_answer),
    ("template answers", cap_template_answers),
)


def is_changed(new: Row, old: Row) -> bool:
    """Whether a field differs; a missing value, which answers no comparison, differs from the text that replaces it."""
    return any(after is not before and (type(after) is not type(before) or after != before) for after, before in zip(new, old, strict=True))


def clean_rows(rows: list[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    """All steps in order.

    Returns:
        the rows that are left, and the funnel: one dict a step with step, rows (left after it), removed, changed.
    """
    funnel = [{"step": "raw rows", "rows": len(rows), "removed": 0, "changed": 0}]

    def count(step: str, left: list[Row], changed: int) -> None:
        funnel.append({"step": step, "rows": len(left), "removed": funnel[-1]["rows"] - len(left), "changed": changed})

    for step, apply in ROW_STEPS:
        results = [apply(row) for row in rows]
        changed = sum(new is not None and is_changed(new, old) for new, old in zip(results, rows, strict=True))
        rows = [row for row in results if row is not None]
        count(step, rows, changed)
    for step, select in SET_STEPS:
        rows = select(rows)
        count(step, rows, 0)
    return rows, funnel
