"""Cleaning rules on one text: they take out what the sources' export left in questions and answers."""

import ast
import html
import json
import re
import unicodedata
from typing import Any

import pandas as pd
import regex

# These scripts put no space between words, so each of their characters counts as a word.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_SPACELESS_CHARACTER = regex.compile(f"[{_SPACELESS}]")
# Combining marks belong to words: Hindi's vowel signs are marks.
_WORD = regex.compile(rf"[{_SPACELESS}]|[[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}]]+", regex.V1)
_ASCII_GAPS = str.maketrans({chr(code): " " for code in range(128) if not chr(code).isalnum()})


def text_cell(cell: Any) -> str:
    """A cell of a table as text: "" for a missing one, JSON for a list or dictionary."""
    if isinstance(cell, (str, bytes)):
        return cell if isinstance(cell, str) else cell.decode("utf-8", "replace")
    if not pd.api.types.is_scalar(cell):
        plain = getattr(cell, "tolist", lambda: cell)()  # an array of a Parquet file is a list
        return json.dumps(plain, ensure_ascii=False, default=str)
    return "" if pd.isna(cell) else str(cell)


def parse_cell(text: str) -> list | dict | None:
    """The list or dictionary in a cell, as JSON or as the Python literal that `to_csv` writes; else None."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    for parse in (json.loads, lambda text: ast.literal_eval(re.sub(r"\bnan\b(?=\s*[,}\]])", "None", text))):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return None


def text_key(text: str) -> str:
    """A key that texts of the same words in the same order share: `"What is Gout ?"` -> `"what is gout"`."""
    text = text.casefold()  # ASCII by table is five times as fast
    return " ".join(text.translate(_ASCII_GAPS).split() if text.isascii() else _WORD.findall(text))


def count_words(text: str) -> int:
    """How many words a text has, in any script."""
    return len(text.split()) + len(_SPACELESS_CHARACTER.findall(text))


_INVISIBLE = "\u200b\u200e\u200f\u2060\ufeff\u00ad\ufffc\ufffd\ufffe\uffff"
_LOOKALIKES = {"'": "\u2018\u2019\u02bc", '"': "\u201c\u201d", "-": "\u2010\u2011\u2012\u2013\u2212",
               "...": "\u2026", "": _INVISIBLE}
_CHARACTERS = str.maketrans({odd: plain for plain, odd_ones in _LOOKALIKES.items() for odd in odd_ones})
# Tags by name: `p<0.05`, `<50%` and `</s>` are content (prompts.py makes control-token text harmless).
_TAG = re.compile(r"</?(?:(b|i|u|em|strong|a|span|font)|p|br|hr|div|ul|ol|li|table|tr|td|th|h[1-6]|img|sup"
                  r"|sub)(?:\s+[\w-]+\s*=[^<>]*)?\s*/?>", re.IGNORECASE)
_JOINERS = re.compile("(?<![\u0590-\u1fff])[\u200c\u200d]")  # invisible, but spelling in Persian and Hindi


def clean_text(text: str) -> str:
    """Composed Unicode, plain quotes and hyphens, no entities, tags, control characters or double spaces."""
    text = html.unescape(html.unescape(text))  # pages are often escaped twice
    text = _TAG.sub(lambda tag: "" if tag[1] else " ", text)
    text = unicodedata.normalize("NFC", " ".join(text.translate(_CHARACTERS).split()))
    if not text.isprintable():
        text = _JOINERS.sub("", text)
        text = "".join(one if one.isprintable() or one in "\u200c\u200d" else " " for one in text)
    return re.sub(r"\.{4,}", "...", " ".join(text.split()))


# --- questions ----------------------------------------------------------------------------------------------

_AGE = r"\d\d+[- ]?(?:year|yr|month|week|day|hour)"  # two digits: "2.5-year-old" has no number before it
_NUMBERING = re.compile(
    r"^(?:\[[Ss]peaker \d+\]:|[Qq](?:uestion)?\s*\d*\s*[:.)]"  # [Speaker 2]:  Question:  Q3.
    rf"|\d{{1,3}}(?:\.\d{{1,2}})?\s*[.)](?=\s|[A-Za-z\"'.]|{_AGE})"  # 71.  64.9.  21.45-year-old
    r"|\d{1,3}(?=[A-Z][a-z])"  # 6During
    r"|(?!\.\.\.)[.):;,]+)\s*"  # stray punctuation, but not the gap of "... is the commonest cause"
)
ABOUT = re.compile(r"what i need to know about ", re.IGNORECASE)
_REWRITES = (
    (ABOUT, ""),
    (re.compile(r"^what research \(or clinical trials\) is", re.IGNORECASE), "What research is"),
    (re.compile(r"(?:\s*\?)+"), "?"),
    (re.compile(r"^(do you have information about [^?]+)$", re.IGNORECASE), r"\1?"),
)
_EMPTY_SLOT = re.compile(r"(?:what (?:is|are|is \(are\)|causes)|who is at risk for"
                         r"|how to (?:prevent|diagnose)|)\s*\?*", re.IGNORECASE)


def fix_question(question: str, focus_area: str = "", answer: str = "") -> str:
    """The question without numbering and template marks; "" where the template's slot is empty.

    `What is (are) X ?` becomes `What are X?` where X is a plural, else `What is X?`.
    """
    if question.count('"') % 2 or re.fullmatch(r'"[^"]*"', question):
        question = question.strip('" ')
    while (shorter := _NUMBERING.sub("", question, count=1)) != question:
        question = shorter
    for pattern, replacement in _REWRITES:
        question = pattern.sub(replacement, question)
    if _EMPTY_SLOT.fullmatch(question):
        return ""
    if question[:13].casefold() == "what is (are)":
        verb = "What are" if is_plural(focus_area or question[13:].strip(" ?"), answer) else "What is"
        question = verb + question[13:]
    return question if question[1:2].isupper() else question[:1].upper() + question[1:]


_PLURALS = re.compile(r"(?:disorder|disease|injurie|infection|problem|tumor|stone|cyst|bite|service|medicine"
                      r"|cancer|malformation|neuropathie|adhesion|aid)s|lice|teeth|feet|bacteria")


def is_plural(name: str, answer: str) -> bool:
    """Whether a name is a plural: "Warts" where the answer has "wart", or a sentence begins "Warts are"."""
    name = re.split(r"\s*(?:\(|:| (?:and|in|of|with|from|for)\b)", name.casefold())[0]
    last = name.split()[-1:]
    if not last or _PLURALS.fullmatch(last[0]) or not re.search(r"[^'suix]s$", last[0]):
        return bool(last and _PLURALS.fullmatch(last[0]))
    singular = re.escape(re.sub(r"ie$", "y", last[0][:-1]))
    begins = rf"(?:^|[.!?:] )(?:the )?{re.escape(name)} (?:\([^()]*\) )?are\b"
    return bool(re.search(rf"\b{singular}\b|{begins}", answer.casefold()))


# --- answers ------------------------------------------------------------------------------------------------

_ANSWER_LABEL = re.compile(r"^(?:correct )?answer\s*(?::|\(detailed solution below\)|(?=option\b))\s*",
                           re.IGNORECASE)
_OPTION_LABEL = re.compile(r"^(?:option\s*(?:[A-E]|\d)\s*(?:is (?:the )?correct(?: answer)?\s*)?|[A-E]\)?)"
                           r"(?:[:.]\s*|\s*(?=Explanation|Rationale)|$)", re.IGNORECASE)
_REASON_LABEL = re.compile(r"^(?:explanation|rationale(?:/reasoning)?|reason)\s*:\s*", re.IGNORECASE)
SPECIES = re.compile(r"[A-J]\.\s?(?:albicans|anthracis|auris|baumannii|botulinum|burgdorferi|cereus|coli"
                     r"|difficile|diphtheriae|duodenale|faecalis|faecium|fragilis|fumigatus|histolytica"
                     r"|influenzae|jejuni|lamblia|pertussis|perfringens|pylori|tetani|trachomatis)\b")


def strip_answer_label(answer: str) -> str:
    """The answer without `Answer:`, `Option D is correct.`, a lone option letter, or quotes around it all."""
    answer = answer[1:-1].strip() if re.fullmatch(r'"[^"]*"', answer) else answer
    rest = _ANSWER_LABEL.sub("", answer)
    if rest != answer or rest[:6].casefold() == "option":
        rest = _OPTION_LABEL.sub("", rest)
    if len(re.findall(r"(?:^|\W)[A-E][.)]", rest)) == 1:
        rest = re.sub(r"^[A-E][.)]\s*(?=[A-Z]|$)", "", rest)
    return _REASON_LABEL.sub("", rest)


_LEAD_IN = re.compile(r"^(?:Key Points\b[\s:-]*|Summary\s*:\s*|On this Page\b(?:[^.!?]*\?)*\s*"
                      r"|Frequently Asked Que+stions \(FAQs\)\s*)")
_CREDIT = re.compile(
    r"(?<!the )\b(?:NIH: National [^.?!:]{5,100}|Centers for Disease Control and Prevention"
    r"|Food and Drug Administration|Federal Emergency Management Agency"
    r"|Environmental Protection Agency|Agency for Toxic Substances Disease Registry"
    r"|United States Department of Agriculture|Agency for Healthcare Research and Quality"
    r"|Dept\. of Health and Human Services [^.?!:]{5,60}|More on: [^.?!]{3,90})$")
_PAGE_MARK = re.compile(r" More on: Resources for Health Professionals: (?:Antiparasitic )?[A-Z][a-z]+\b"
                        r"|(\.)(?<=[A-Za-z%)]{2}\.)\d{1,2}(?=\s+[A-Z-]|$)"  # "in girls.2 Most of"
                        r"|(?: \[|\[)\d{1,4}\]")
_PLAYER_HELP = re.compile(r"\(Watch the video[^()]*(?:\([^()]*\)[^()]*)*\)|\bTop of page\b")


def strip_page_parts(answer: str) -> str:
    """The answer without headings, footnote digits, the video player's help and the publisher's name."""
    if "Watch the video" in answer or "Top of page" in answer:
        answer = " ".join(_PLAYER_HELP.sub(" ", answer).split())
    answer = _PAGE_MARK.sub(r"\1", answer)
    while (shorter := _LEAD_IN.sub("", answer, count=1)) != answer:
        answer = shorter
    while credit := _CREDIT.search(answer, max(0, len(answer) - 130)):  # the longest credit
        answer = answer[:credit.start()].rstrip()
    return answer


_NO_SIGN = re.compile(r".* (?:inheritance|onset|penetrance|gene syndrome)|(?:\w+ )?\w*rogress(?:ion|ive)"
                      r"|Onset|Sporadic|Heterogeneous|Phenotypic variability|Variable expressivity"
                      r"|Somatic mutation|Somatic mosaicism|Genetic anticipation")
_FREQUENCIES = ((80, "Very common"), (30, "Common"), (5, "Occasional"), (0, "Rare"),
                (-1, "Frequency unknown"))


def write_phenotypes(answer: str) -> str:
    """The flattened table of signs and their shares of patients as sentences, most frequent first.

    The limits are those of the Human Phenotype Ontology. How it is inherited and when it begins is no sign.
    """
    before, found, rest = answer.partition("The Human Phenotype Ontology provides")
    if not found:
        return answer
    table, _, rest = rest.partition("The Human Phenotype Ontology (HPO) has collected")
    cells = re.split(r" (-|\d+(?:\.\d+)?%|\d+/\d+)(?= |$)", table.partition("(when available)")[2].rstrip())
    signs = {name: [] for _, name in _FREQUENCIES}
    for sign, share in zip(cells[:-1:2], cells[1::2], strict=True):
        part, _, whole = share.rstrip("%").partition("/")
        percent = -1 if share == "-" else 100 * float(part) / max(1, float(whole)) if whole else float(part)
        if not _NO_SIGN.fullmatch(sign := sign.strip()):
            signs[next(name for least, name in _FREQUENCIES if percent >= least)].append(sign)
    sentences = [f"{name}: {'; '.join(found)}." for name, found in signs.items() if found]
    return " ".join([before.strip(), *sentences, rest.partition("may be rare or common.")[2].strip()]).strip()


def drop_repeats(answer: str) -> str:
    """The answer without list items of seven words or more that stand again further down, as headings do.

    The first sentence stays where it is, and goes further down.
    """
    parts = re.split(r"(?<=[.?!:])\s+|\s+(?=- )", answer)
    keys = [part.casefold().strip("- ") for part in parts]
    last = {key: place for place, key in enumerate(keys)}
    if len(last) == len(parts):
        return answer
    return " ".join(part for place, (part, key) in enumerate(zip(parts, keys, strict=True))
                    if place == 0 or key.count(" ") < 6 or key != keys[0]
                    and not (last[key] > place and re.match(r"- [A-Z].*[.?!:]$", part)))


FUNCTION_WORDS = frozenset("""a an and any are as be been being by can could do does for from get has have
    how in inherited information is it many might of on or people someone that the there to treated treatment
    treatments what when which who with you""".split())


def strip_echo(answer: str, question: str) -> str:
    """The answer without a first sentence that only asks the question again."""
    echo = re.match(r"(?:[^.?!:]|\.(?=\d)){3,250}\?\s*", answer)
    if not echo:
        return answer
    asked, repeated = (set(text_key(text).split()) - FUNCTION_WORDS for text in (question, echo[0]))
    shared = len(asked & repeated)
    return answer[echo.end():] if 2 * shared >= min(len(asked), len(repeated)) and shared else answer


def has_only_links(answer: str) -> bool:
    """Whether the answer is a list of links and their titles."""
    titles = answer.startswith(("These resources address", "These resources from", "Here are links"))
    words = re.sub(r"(?:https?://|www\.)\S+", "", answer).split()
    return titles or len(words) < min(3, len(answer.split()))


def strip_yes(answer: str, question: str) -> str:
    """The answer to a question with what, how or who, without "Yes." or "No." before it."""
    said = re.match(r"(?:Yes|No)[.,;:!]\s+(?=\w+\W+\w)", answer)
    if not said or not question.startswith(("What", "How", "Who")):
        return answer
    return answer[said.end()].upper() + answer[said.end() + 1:]
