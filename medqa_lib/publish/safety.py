"""What the demo says whatever the model answers: the disclaimer, the emergency notice and the limits of a question."""

from __future__ import annotations

import re

MAX_CHARACTERS = 1_000

DISCLAIMER = ("<b>Not medical advice.</b> A research demo of a small language model: its answers are often wrong. Do not act on them; "
              "ask a doctor. In an emergency call your local emergency number.")
EMERGENCY = ("<b>This may be an emergency. Call your local emergency number now</b> (112, 911, 999 or 000, depending on the country). "
             "If you think of harming yourself, call it or a crisis line (988 in the US, 116 123 in the UK). Do not wait for an answer "
             "here and do not act on one.")

# These wordings leave no doubt by themselves ...
_CERTAIN = (
    r"(kill|hurt|harm|cut)(ting|ing)? (my|him|her|them)sel(f|ves)", r"(want|going|plan\w*|wish) to (die|be dead)",
    r"end(ing)? (my (own )?life|it all)", r"suicidal", r"commit suicide", r"self.?harm\w*", r"(have|has|ve|just) overdosed",
    r"took an overdose", r"(can.?t|can ?not|unable to|struggl\w+ to) breathe?", r"(not|stopped|isn.?t|hardly|barely) breathing",
    r"(won.?t|will not|does ?n.?t|not) (wake|stop bleeding)", r"bleeding (won.?t|will not|does ?n.?t) stop",
    r"(can.?t|can ?not) stop (the )?bleeding", r"(is|am|are|was|.s) (unconscious|unresponsive|choking|turning blue)",
    r"no pulse", r"call an ambulance", r"(do ?n.?t|does ?n.?t|not|no longer) (want|wish)(s|es)? to (live|be alive|wake up)",
    r"(take|taking|took) (my|his|her) (own )?life", r"(slit|slitting|slash|slashed|slashing|cut|cutting) (my|his|her|their) (\w+ )?wrists?")
# From ten on; "500 mg" is no number of tablets.
_MANY = (r"(\d\d+(?! ?(mg|mcg|g|ml)\b)|ten|twelve|fifteen|twenty|thirty|forty|fifty|sixty|(a|one) hundred|dozens of|(all|lots) of"
         r"|(a|the) (\w+ )?(pack|packet|box|bottle|handful|lot|bunch) of)")
# ... these only together with a person who has them: "What is a stroke?" asks, "I think my father has a stroke" describes.
_SIGNS = (
    r"chest (pain|pressure|tightness|hurts)", r"pain in \w+ chest", r"heart attack", r"stroke", r"fac(e|ial) (is |was )?droop\w*",
    r"slurr\w+ speech", r"seizure", r"convuls\w+", r"overdos\w+", r"poison\w*", r"swallowed", r"drank (bleach|poison|petrol|acid)",
    r"too many (pills|tablets)", rf"(took|taken|swallowed|ate) (\w+ ){{0,2}}{_MANY} ([\w-]+ ){{0,3}}(pills|tablets|capsules)",
    r"anaphyla\w+", r"throat (is )?(closing|swelling)", r"bleeding (heavily|badly|a lot)", r"(severe|heavy) bleeding",
    r"(vomit|cough|throw)\w* (up )?blood", r"suicide", r"passed out", r"faint(ed|ing)", r"collapsed", r"unconscious", r"choking",
    r"(not|isn.?t|stopped) respond(ing)?(?! to (treatment|therapy|medic\w+))", r"(trouble|difficulty|problems?) breathing", r"snake ?bite",
    r"bitten by a snake", r"electrocuted", r"drown\w+", r"worst headache")
_PERSON = (r"i", r"i.m", r"i.ve", r"my", r"me", r"we", r"our", r"he", r"she", r"someone", r"somebody", r"right now", r"just now", r"help")


def _any_of(phrases: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\b({'|'.join(phrases)})\b", re.IGNORECASE)


_IS_CERTAIN, _HAS_SIGN, _HAS_PERSON = map(_any_of, (_CERTAIN, _SIGNS, _PERSON))


def describes_emergency(question: str) -> bool:
    """Whether the text describes somebody's emergency, rather than asks about a condition. In doubt, yes.

    Example:
        >>> describes_emergency("What is a stroke?"), describes_emergency("I have chest pain")
        (False, True)
    """
    return bool(_IS_CERTAIN.search(question) or (_HAS_SIGN.search(question) and _HAS_PERSON.search(question)))


def check_question(question: str) -> str:
    """What is wrong with the question, in a sentence for the person who asks; "" if nothing is."""
    if not question.strip():
        return "Please write a question first."
    if len(question) > MAX_CHARACTERS:
        return f"Your question has {len(question):,} characters; at most {MAX_CHARACTERS:,} are possible. Please shorten it."
    return ""
