"""How well an answer fits its question, by words alone."""

import re

from medqa_lib.data.texts import FUNCTION_WORDS, text_key

_DEFINES = re.compile(r"^what (?:is|are) (?!(?:the \w+|financial help) (?:of|for|to)\b)([^?]+)\?$",
                      re.IGNORECASE)
# What a question asks, and what an answer to it says.
_SAYS = tuple((re.compile(asked), re.compile(said)) for asked, said in (
    ("treat", "treat|therap|surg|medic|manag|drug|cure"),
    ("symptom", "symptom|sign|feature|may have|common:|unknown:|pain"),
    ("cause", "caus|gene|result|mutation"), ("prevent", "prevent|avoid|lower|reduc|risk|vaccin"),
    ("diagnos", "diagnos|test|exam|detect|evaluat"), ("risk", "risk|more likely|common"),
    ("outlook", "prognos|outlook|outcome|surviv|recover|life"), ("inherit", "inherit"),
    ("how many", r"\d|preval|rare|common|people"), ("genetic", "gene|mutation|chromosom"),
    ("research", "research|trial|stud")))


def names_topic(question: str, answer: str, words: int) -> bool:
    """Whether the first words of an answer have a word, or the initials, of what the question is on."""
    head = " " + text_key(" ".join(answer.split()[:words]))
    asked = [word for word in text_key(question).split() if word not in FUNCTION_WORDS and len(word) > 1]
    initials = "".join(word[0] for word in asked)
    roots = [word[:max(4, len(word) - 3)] for word in asked] + [initials] * (len(initials) > 1)
    return any(f" {root}" in head for root in roots)


def answers_another(question: str, answer: str) -> bool:
    """Whether "What is X?" is answered without X, as where the page's own question was lost."""
    return bool(_DEFINES.match(question)) and not names_topic(question, answer, 100)


def relevance(question: str, answer: str) -> int:
    """0 to 3: 1 if the first 30 words of an answer name the topic, and 2 if they say what is asked."""
    head = " ".join(answer.split()[:30]).casefold().replace("'", "")
    if topic := _DEFINES.match(question):
        name = re.escape(re.sub(r"\s*\(.*|'", "", topic[1]).casefold().rstrip("s"))
        says = bool(re.search(rf"{name}\w*[^.]{{0,40}}? (?:is|are|was|refers?|means?|occurs?|happens?|causes?"
                              r"|affects?)\b", head))
    else:
        asked = question.casefold()
        says = next((bool(said.search(head)) for ask, said in _SAYS if ask.search(asked)), False)
    return names_topic(question, answer, 30) + 2 * says
