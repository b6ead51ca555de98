"""From raw rows to question-answer pairs, step by step, each step counted in a funnel: kept + removed = raw.

A row step takes a `Row` and returns it, perhaps changed, or None (removed); a set step takes and returns all.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from medqa_lib.data import texts
from medqa_lib.data.relevance import answers_another, relevance
from medqa_lib.data.texts import parse_cell, text_cell, text_key

MAX_CELL_CHARACTERS = 50_000  # beyond the longest real answer (30,000): a quote in the CSV was not closed
LONG_ANSWER_WORDS = 300  # about what 512 tokens hold beside the question
LETTERS = "ABCDEFGHIJ"
PLACEHOLDERS = {"", "no rationale", "no rationale provided", "no answer", "no explanation", "none", "null",
                "nan", "na", "n a", "nil", "not available", "not applicable"}
_LETTER = re.compile(r"[^\W_]")
_OTHER_OPTIONS = re.compile(r"(?:both |only )?[A-E](?:, ?[A-E])*,? ?(?:and|&|or) ?[A-E](?: only| above)?\.?",
                            re.IGNORECASE)
# A stem that is only a topic heads a list of true and false statements: "Concerning gout:", "The vagina".
_TOPIC = re.compile(r"(?:concerning|regarding|about|on|with regards? to|as regards)\b"
                    r"|(?=(?:\S+\s*){1,4}$)", re.IGNORECASE)
_ASKS = re.compile(r"\?|\.\.|_|\b(?:wh\w+|how|except|not|true|false|\w*correct|wrong|best|most|least|is|are"
                   r"|was|has|can|may|by|from|includes?|\w+ed|\w+ing|causes?|refers?)\b", re.IGNORECASE)
_GLUED = re.compile(r"(?>.*?\bA\s?[.)])(?>.*?B\s?[.)]).*?C\s?[.)]")
_PROMPT_MARKER = re.compile(r"#{2,}[ \t]*(?:Instruction|Response)[ \t]*:", re.IGNORECASE)
_NOT_MEDICAL = re.compile(r"\blogical(?:ly)? (?:conclude|infer|reasoning)|^if all\b|\bgenealog"
                          r"|\bbury the survivors", re.IGNORECASE)


class Row(NamedTuple):
    """One raw, then cleaned pair. Every field is text from the first step on."""

    question: Any
    answer: Any
    source: str
    focus_area: Any = ""
    kind: Any = "qa"  # "qa", "saq", "mcq" or "consumer_queries"
    options: Any = ""  # JSON; from `read_options` on a tuple of texts
    correct: Any = ""  # "option4" or "option1,option3"; from `read_options` on a tuple of places in options
    choices: str = ""  # JSON {"options": [...], "correct": 2} of a question with exactly one key
    official: str = ""  # AfriMed-QA's own split, "train" or "test"
    references: str = ""  # JSON list of the question's further answers


RowStep = Callable[[Row], Row | None]

# --- steps on one row ---------------------------------------------------------------------------------------


def is_placeholder(text: str) -> bool:
    """Whether the text only says that there is none."""
    return len(text) < 40 and text_key(text) in PLACEHOLDERS


def empty_placeholders(row: Row) -> Row:
    """An answer such as "No rationale" becomes empty."""
    return row._replace(question="" if is_placeholder(row.question) else row.question,
                        answer="" if is_placeholder(row.answer) else row.answer)


def for_choices(step: RowStep) -> RowStep:
    """The step, for multiple-choice rows only."""
    return lambda row: step(row) if row.kind == "mcq" else row


@for_choices
def read_options(row: Row) -> Row | None:
    """Parse two to ten options and their key; without options, a rationale makes it a free question."""
    if not row.options.strip():
        return row._replace(kind="saq") if row.answer else None
    parsed = parse_cell(row.options)
    cells = parsed.items() if isinstance(parsed, dict) else ()
    filled = {name: text_cell(cell) for name, cell in cells
              if text_cell(cell).strip().lower() not in ("", "n/a")}  # the Hub's file fills up with it
    keys = {key.strip() for key in row.correct.split(",")}
    if not keys <= filled.keys() or not 2 <= len(filled) <= len(LETTERS):
        return None
    correct = tuple(place for place, name in enumerate(filled) if name in keys)
    return row._replace(options=tuple(filled.values()), correct=correct)


def clean_texts(row: Row) -> Row:
    """Unicode, HTML and white space in every text of the row."""
    question, answer, focus_area = map(texts.clean_text, (row.question, row.answer, row.focus_area))
    options = tuple(map(texts.clean_text, row.options)) if row.kind == "mcq" else row.options
    return row._replace(question=question, answer=answer, focus_area=focus_area, options=options)


@for_choices
def tidy_options(row: Row) -> Row:
    """Options without stray punctuation and, if all but one at most carry their letter, without letters.

    A wrong letter goes too. One that begins a species' name stays: "a. Measles", "b. Mumps", "C. difficile".
    """
    options = [re.sub(r"^[.;,:)\s]+(?=\S)", "", option).rstrip(";, ") for option in row.options]
    found = [re.match(r"\(?([A-Ja-j])\s*[.)]\s*(?=\S)", option) for option in options]
    in_place = [bool(match) and match[1].upper() == LETTERS[place] for place, match in enumerate(found)]
    if sum(in_place) >= max(2, len(options) - 1):
        for place, match in enumerate(found):
            names = texts.SPECIES if in_place[place] else re.compile(r"[A-J]\.\s?[a-z]")
            if match and not names.match(options[place]):
                options[place] = options[place][match.end():]
    return row._replace(options=tuple(options))


def fix_templates(row: Row) -> Row | None:
    """Question templates, numbering and labels; a template with an empty slot asks nothing and is removed."""
    focus_area = texts.ABOUT.sub("", row.focus_area)
    question = texts.fix_question(row.question, focus_area, row.answer)
    if row.question and not question:
        return None
    answer = texts.strip_answer_label(row.answer)
    return tidy_options(row._replace(question=question, answer=answer, focus_area=focus_area))


@for_choices
def merge_equal_options(row: Row) -> Row | None:
    """Deduplicate options; drop the question if fewer than two, or a correct one, remain.

    Case tells options apart (the genotypes AA, Aa and aa); a dot at the end does not. An option such as
    "A and C" drops the question if it is the key, or if options left and the letters moved.
    """
    keys = [option.rstrip(". ") for option in row.options]
    left = list(dict.fromkeys(filter(None, keys)))
    if len(left) < 2 or not all(keys[place] for place in row.correct):
        return None
    letters = [place for place, key in enumerate(keys) if _OTHER_OPTIONS.fullmatch(key)]
    if letters and (len(left) < len(keys) or {*letters} & {*row.correct}):
        return None
    correct = tuple(sorted({left.index(keys[place]) for place in row.correct}))
    return row._replace(options=tuple(row.options[keys.index(key)] for key in left), correct=correct)


@for_choices
def write_pair(row: Row) -> Row:
    """Question: stem and lettered options; answer: the correct option, then the rationale if there is one."""
    if not row.question:
        return row
    question = "\n".join([row.question, *map("{}. {}".format, LETTERS, row.options)])
    answer = row.options[row.correct[0]]
    if not is_placeholder(row.answer) and text_key(row.answer) != text_key(answer):
        answer = f"{answer.rstrip('.')}. {row.answer}"
    choices = {"options": row.options, "correct": row.correct[0]}
    return row._replace(question=question, answer=answer, choices=json.dumps(choices, ensure_ascii=False))


def lists_statements(row: Row) -> bool:
    """Whether a multiple-choice stem is only a topic, and its options are statements on it."""
    topic = None if row.kind != "mcq" or row.answer else _TOPIC.match(row.question)
    if not topic or _ASKS.search(row.question, topic.end()):
        return False
    return sum(len(option.split()) for option in row.options) >= 4 * len(row.options)


def asks_again(row: Row) -> bool:
    """Whether the answer is the question, or only asks another."""
    return text_key(row.question) == text_key(row.answer) or bool(re.fullmatch(r"[^.?!]*\?", row.answer))


def drop(has_fault: Callable[[Row], Any]) -> RowStep:
    """The step that removes rows with the fault."""
    return lambda row: None if has_fault(row) else row


# --- steps on all rows --------------------------------------------------------------------------------------


def drop_exact_pairs(rows: list[Row]) -> list[Row]:
    """Of pairs with the same words in question and answer keep one."""
    ordered = sorted(rows, key=lambda row: (row.question, row.answer, row.focus_area))
    last = {(text_key(row.question), text_key(row.answer)): id(row) for row in ordered}
    kept = {*last.values()}
    return [row for row in rows if id(row) in kept]


def keep_one_answer(rows: list[Row]) -> list[Row]:
    """Of several answers keep the most relevant, of equal ones the fullest of at most 300 words.

    The others that are relevant at all become its further references.
    """

    def preference(row: Row) -> tuple:
        words = len(row.answer.split())
        length = -words if words > LONG_ANSWER_WORDS else words
        return relevance(row.question, row.answer), words <= LONG_ANSWER_WORDS, length, row.answer

    answers = defaultdict(list)
    for row in rows:
        answers[text_key(row.question)].append(row)
    kept = {}
    for several in answers.values():
        best, *others = sorted(several, key=preference, reverse=True) if several[1:] else several
        others = [row.answer for row in others if relevance(row.question, row.answer) >= 2]
        kept[id(best)] = json.dumps(others, ensure_ascii=False) if others else ""
    return [row._replace(references=kept[id(row)]) for row in rows if id(row) in kept]


ROW_STEPS = (
    ("placeholders", empty_placeholders),
    ("consumer questions (no reference answer)", drop(lambda row: row.kind == "consumer_queries")),
    ("oversized cells", drop(lambda row: max(map(len, row)) > MAX_CELL_CHARACTERS)),
    ("options and key", read_options),
    ("Unicode, HTML and white space", clean_texts),
    ("question templates and labels", fix_templates),
    ("equal options", merge_equal_options),
    ("several correct options", drop(lambda row: row.kind == "mcq" and len(row.correct) > 1)),
    ("lists of statements, not a question", drop(lists_statements)),
    ("options in a free question", drop(lambda row: row.kind != "mcq" and _GLUED.match(row.question))),
    ("phenotype tables", lambda row: row._replace(answer=texts.write_phenotypes(row.answer))),
    ("prompt markers", lambda row: row._replace(answer=_PROMPT_MARKER.split(row.answer)[0].strip())),
    ("lead-ins and page parts", lambda row: row._replace(answer=texts.strip_page_parts(row.answer))),
    ("echoed question", lambda row: row._replace(answer=texts.strip_echo(row.answer, row.question))),
    ("yes or no to what or how", lambda row: row._replace(answer=texts.strip_yes(row.answer, row.question))),
    ("repeated sentences", lambda row: row._replace(answer=texts.drop_repeats(row.answer))),
    ("link-only answers", drop(lambda row: texts.has_only_links(row.answer))),
    ("choices to question and answer", write_pair),
    ("no question or answer", drop(lambda row: not all(map(_LETTER.search, (row.question, row.answer))))),
    ("under three words", drop(lambda row: row.kind != "mcq" and len(row.answer.split()) < 3)),
    ("answer is a question", drop(lambda row: row.kind != "mcq" and asks_again(row))),
    ("answers to another question", drop(lambda row: row.source == "medquad"
                                         and answers_another(row.question, row.answer))),
    ("not medical", drop(lambda row: row.source == "afrimedqa" and _NOT_MEDICAL.search(row.question))),
)
SET_STEPS = (("exact pairs", drop_exact_pairs), ("one answer per question", keep_one_answer))


def clean_rows(rows: list[Row], only: set[str] | None = None) -> tuple[list[Row], list[dict]]:
    """All steps in order, or `only` those of these names.

    Returns:
        the rows that are left, and the funnel: per step a dict of step, rows left after it, removed, changed.
    """
    rows = [Row(*map(text_cell, row)) for row in rows]
    funnel = [{"step": "raw rows", "rows": len(rows), "removed": 0, "changed": 0}]
    for name, step in (each for each in ROW_STEPS + SET_STEPS if only is None or each[0] in only):
        if (name, step) in SET_STEPS:
            left = step(rows)
            changed = len({*left} - {*rows})
        else:
            results = [step(row) for row in rows]
            left = [row for row in results if row is not None]
            changed = sum(new not in (None, old) for new, old in zip(results, rows, strict=True))
        funnel.append({"step": name, "rows": len(left), "removed": len(rows) - len(left), "changed": changed})
        rows = left
    return rows, funnel
