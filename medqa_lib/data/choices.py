"""Multiple-choice questions of AfriMed-QA: read options and key, tidy them, write them as a question-answer pair."""

from __future__ import annotations

import json
import re

from medqa_lib.data.texts import text_cell

LETTERS = "ABCDEFGHIJ"


def read_options(options: str, correct: str) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """The option texts and the places of the right ones; None without two to ten options or a key that names one.

    Example:
        >>> read_options('{"option1": "Gout", "option2": "Scurvy"}', "option2")
        (('Gout', 'Scurvy'), (1,))
    """
    try:
        parsed = json.loads(options)
    except (ValueError, RecursionError):
        return None
    filled = {name: text_cell(text) for name, text in parsed.items() if text_cell(text).strip()} if isinstance(parsed, dict) else {}
    keys = {key.strip() for key in correct.split(",")}
    if not keys <= filled.keys() or not 2 <= len(filled) <= len(LETTERS):
        return None
    return tuple(filled.values()), tuple(place for place, name in enumerate(filled) if name in keys)


def tidy_options(options: tuple[str, ...]) -> tuple[str, ...]:
    """Options without stray punctuation and, if all but one at most carry the letter of their place, without letters.

    A wrong letter goes too, unless it begins a species' name.

    Example:
        >>> tidy_options(("a. Shigella;", "b. Rotavirus;", "E. coli"))
        ('Shigella', 'Rotavirus', 'E. coli')
    """
    options = tuple(re.sub(r"^[.;,:)\s]+(?=\S)", "", option).rstrip(";, ") for option in options)
    found = [re.match(r"\(?([A-Ja-j])\s*[.)]\s*(?=\S)", option) for option in options]
    in_place = [match is not None and match[1].upper() == letter for match, letter in zip(found, LETTERS, strict=False)]
    if sum(in_place) < max(2, len(options) - 1):
        return options
    is_letter = [here or (match is not None and not re.match(r"[A-J]\.\s?[a-z]", option))
                 for here, match, option in zip(in_place, found, options, strict=True)]
    return tuple(option[match.end():] if strip else option for strip, match, option in zip(is_letter, found, options, strict=True))


def merge_equal_options(options: tuple[str, ...], correct: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """Each option once, without those of which cleaning left nothing, and the places of the right ones among them.

    Case tells options apart (the genotypes AA, Aa and aa); a dot at the end does not.

    Returns:
        None if fewer than two options are left, or one of the right ones is not.
    Example:
        >>> merge_equal_options(("Iron", "", "Zinc", "Zinc."), (3,))
        (('Iron', 'Zinc'), (1,))
    """
    keys = [option.rstrip(". ") for option in options]
    left = list(dict.fromkeys(filter(None, keys)))
    if len(left) < 2 or not all(keys[place] for place in correct):
        return None
    return tuple(options[keys.index(key)] for key in left), tuple(sorted({left.index(keys[place]) for place in correct}))


def write_pair(stem: str, options: tuple[str, ...], correct: tuple[int, ...], rationale: str) -> tuple[str, str, str]:
    """Question with lettered options, answer (the right option's text and the rationale), and the choices as JSON.

    The JSON is `{"options": [...], "correct": 2}`, and "" where the question has more than one key.
    """
    question = "\n".join([stem, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])
    right = "; ".join(options[place] for place in correct)
    answer = f"{right.rstrip('.')}. {rationale}" if rationale else right
    choices = json.dumps({"options": options, "correct": correct[0]}, ensure_ascii=False) if len(correct) == 1 else ""
    return question, answer, choices
