"""The notice that the demo always shows, and the questions that it answers with crisis lines alone."""

import re
import unicodedata

LINES = "988 (US, Canada), 116 123 (UK, Ireland), findahelpline.com"
DISCLAIMER = ("<b>Not medical advice.</b> The answers of this small model are often wrong; ask a doctor. "
              f"<b>Emergency: call 112, 911, 999 or your local number.</b> Suicide or self-harm: {LINES}.")
CRISIS = ("This question is not answered here. If anyone is in danger, or took too many pills, call your "
          "emergency number now: 112, 911, 999. If you think of harming yourself, you can talk to someone: "
          f"{LINES}.")

_DRUG = (r"\b(pills?|tablets?|capsules?|dos(e|es|age)|drugs?|med(s|ic\w+)|painkillers?|morphine|xanax"
         r"|heroin|\w*(cetamol|minophen|profen|zepam|tanyl)|tylenol|advil|aspirins?|insulin|opioids?|bleach"
         r"|antifreeze|poison|potassium|grams?|m?g)\b")
_DEATH = (r"\b(to die|(would|will|can|could|i|you) (\w+ )?die|kill (me|you|him|her|us|some\w+|an? \w+)"
          r"|fatal|lethal|deadly|(never|not) wake( up)?|stops? (the|my|your) heart)\b")
_MANY = (r"(too (many|much)|all (of )?(my|his|her|the)|(bottle|box|pack|packet|handful|lots|dozens) of"
         r"|[1-9]\d(?! ?m?c?g\b)|twenty|thirty|forty|fifty|hundred)")
_CRISIS = re.compile("|".join((
    r"suicid|\bself (harm|injur)|overdos|\bto od\b|\bkms\b|help me die|painless (death|way|method)|\bnoose\b",
    r"bleed out|\bld50\b|hate my life|life (is not|isn'?t) worth|like dying|better off dead|miss me if",
    r"\b(kill|hurt|harm|cut|hang|drown|poison|starv|shoot|end|hate)\w* (my|your|him|her|them) ?sel(f|ves)\b",
    r"\b(want\w*|wanna|wish|plan\w*|ready|how|ways?|rather) (to )?(die|be dead|be over|disappear)\b",
    r"(\bnot|n't|\bdont|\bdoesnt|longer) (want|wants|wish|wanna)( to)? (live|be alive|be here|wake up|exist)",
    r"\b(end|ending|take|taking|took) (it (all|tonight|now)|things|(my|his|her|their) (own )?life)\b",
    r"\bi (was|were) dead\b|(reason|point) (to|in) (live|living|go on)|can'?t go on|better off without me",
    r"want it (all )?to (end|stop)|\bjump\w* (off|in front of) (a|the) \w+",
    r"\b(slit|slash|cut)\w* (my|his|her|their) (\w+ )?(wrists?|veins?|throat|arms?|legs?|skin)\b",
    rf"{_DRUG}.*{_DEATH}|{_DEATH}.*{_DRUG}",
    rf"\b(took|taken|take|taking|swallow\w*|ate|drank) (\w+ ){{0,2}}{_MANY} (\w+ ){{0,3}}{_DRUG}")))


# Letters spelt one by one ("k i l l", "s.u.i.c.i.d.e") have lost the spaces between their words.
_SPELT = re.compile("suicid|overdos|todie|wannadie|endmylife|selfharm|(kill|hurt|harm|hang)(my|him|her)sel")
# Letters of other alphabets and digits that are read as Latin ones: "ѕuісіdе", "su1c1d3".
_LOOKALIKES = str.maketrans("абвезкмнорстухіїјѕԁһԛԝαβεικνορτυχ’‘`",
                            "a6be3kmhopctyxiijsdhqwabeikvoptux" + "'" * 3)
_MARKS = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cf", "Mn", "Me")]
_INVISIBLE = re.compile(f"[{''.join(_MARKS)}\u115f\u1160\u2800]+")
_DIGITS = str.maketrans("013457@$!", "oieastasi")


def is_crisis(question: str) -> bool:
    """Whether it is about suicide, self-harm or overdose. No list finds all: the page always shows LINES."""
    text = unicodedata.normalize("NFKD", question).casefold().translate(_LOOKALIKES)
    text = re.sub(r"(?<=[a-z])[013457@$!]+(?=[a-z])", lambda found: found[0].translate(_DIGITS), text)
    return any(_is_crisis(_INVISIBLE.sub(gap, text)) for gap in ("", " "))  # inside a word, or between words


def _is_crisis(text: str) -> bool:
    words = " ".join(re.sub(r"[^\w']+|_", " ", text).split())
    spelt = (run.replace(" ", "") for run in re.findall(r"\b(?:\w ){3,}\w\b", words))
    return bool(_CRISIS.search(words) or any(map(_SPELT.search, spelt)))
