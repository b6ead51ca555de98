"""Cleaning rules, each with a hand-worked example; rows here are made up."""

import json
import time

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medqa_lib.data import cleaning, texts
from medqa_lib.data.cleaning import Row, clean_rows

ANSWER = "Rest, fluids and time are all that most people need."


def clean_one(**fields) -> Row | None:
    """What is left of one row after all steps."""
    rows, _ = clean_rows(
        [Row(**{"question": "What helps against a cold?", "answer": ANSWER, "source": "medquad", **fields})]
    )
    return rows[0] if rows else None


def clean_mcq(
    options=None, correct="option2", answer="No rationale", question="Which organ makes insulin?"
) -> Row | None:
    options = {"option1": "Liver", "option2": "Pancreas", "option3": "Spleen"} if options is None else options
    return clean_one(
        question=question,
        answer=answer,
        source="afrimedqa",
        kind="mcq",
        correct=correct,
        options=options if isinstance(options, str) else json.dumps(options),
    )


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Crohn\u2019s  disease\r\n\u2013 a \u201cflare\u201d", 'Crohn\'s disease - a "flare"'),
        ("CO\u200b2 and\u00a0pH\ufeff", "CO2 and pH"),
        ("Cafe\u0301", "Caf\u00e9"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0631\u062f", "\u0645\u06cc\u200c\u062e\u0648\u0631\u062f"),  # Persian spells with it
        ("no\u200cjoiner \u200dhere", "nojoiner here"),
        ("fish &amp;amp; chips, p &lt; 0.05", "fish & chips, p < 0.05"),
        ("<p>One</p><p>two</p> is <b>bold</b><br/>", "One two is bold"),
        ('<a href="x">link</a>', "link"),
        ("p<0.05, <50% and a <b and c> d", "p<0.05, <50% and a <b and c> d"),
        ("stop </s> <|im_end|> ### Response:", "stop </s> <|im_end|> ### Response:"),
        ("tab\tand \x07 bell", "tab and bell"),
        ("\u2026\u2026\u2026 is common", "... is common"),
        ("", ""),
    ],
)
def test_clean_text_repairs_characters_and_keeps_content(raw, clean):
    assert texts.clean_text(raw) == clean


@pytest.mark.parametrize(
    ("raw", "question"),
    [
        ("What is (are) Gout ?", "What is Gout?"),
        ("Who is at risk for Stroke? ?", "Who is at risk for Stroke?"),
        (
            "what research (or clinical trials) is being done for Gout ?",
            "What research is being done for Gout?",
        ),
        ("Do you have information about Vaccines", "Do you have information about Vaccines?"),
        ("What causes What I need to know about Gallstones ?", "What causes Gallstones?"),
        ("71. Characteristics of breast milk", "Characteristics of breast milk"),
        ("64.9. A 52-year-old man", "A 52-year-old man"),
        ("21.45-year-old man", "45-year-old man"),
        ("2.5-year-old boy", "2.5-year-old boy"),
        ("75)Which is true?", "Which is true?"),
        ("6During surgery", "During surgery"),
        ("Q3: Which is true?", "Which is true?"),
        ("[Speaker 2]: Which is true?", "Which is true?"),
        (". Absolute indication:", "Absolute indication:"),
        ("2.5 kg is the weight of a child", "2.5 kg is the weight of a child"),
        ("3rd nerve palsy", "3rd nerve palsy"),
        ("45-year-old man", "45-year-old man"),
        ("... is the commonest cause", "... is the commonest cause"),
        ('"What should I eat?"', "What should I eat?"),
        ('Why is it called "flu"?', 'Why is it called "flu"?'),
        ("mRNA vaccines", "mRNA vaccines"),
        ("how is it spread?", "How is it spread?"),
        ("pH of blood", "pH of blood"),
    ],
)
def test_fix_question_undoes_templates_and_numbering(raw, question):
    assert texts.fix_question(raw) == question


@pytest.mark.parametrize(
    ("name", "answer", "verb"),
    [
        ("Hives", "Hives are itchy swellings.", "are"),
        ("Night Terrors (Parasomnia)", "A night terror wakes a child.", "are"),
        ("Allergies", "An allergy is a reaction.", "are"),
        ("Eye Diseases", "The eye may be ill.", "are"),
        ("Kidney Stones in Children", "They are hard deposits.", "are"),
        ("Diabetes", "People with diabetes are thirsty.", "is"),
        ("Turner Syndrome", "Girls with Turner syndrome are short. Turner syndrome are words.", "is"),
        ("Rickets", "Rickets softens bones.", "is"),
        ("Fibrosis of the Eye Muscles", "The eye muscle stiffens.", "is"),
        ("Graves'", "Graves' is an overactive gland.", "is"),
    ],
)
def test_fix_question_takes_the_number_from_the_name(name, answer, verb):
    assert texts.fix_question(f"What is (are) {name} ?", name, answer) == f"What {verb} {name}?"


@pytest.mark.parametrize(
    "raw",
    ["What is (are)  ?", "Who is at risk for ? ?", "How to prevent  ?", "?"],
)
def test_fix_question_empties_a_template_without_a_disease(raw):
    assert texts.fix_question(texts.clean_text(raw)) == ""


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ("Answer: Zinc shortens the illness.", "Zinc shortens the illness."),
        ("Answer: BExplanation: Fleming saw it in 1928.", "Fleming saw it in 1928."),
        ("Answer Option A : Cervix", "Cervix"),
        ("Answer (Detailed Solution Below)Option C: Moro reflex", "Moro reflex"),
        ("Option D is correct.", ""),
        ("D. The lung is affected", "The lung is affected"),
        ("A. Rest B. Ice C. Sleep", "A. Rest B. Ice C. Sleep"),
        ("E. coli causes it", "E. coli causes it"),
        ("The correct answer is 2 months.", "The correct answer is 2 months."),
        ("Answering machines are not medical", "Answering machines are not medical"),
        ('"Drink more water."', "Drink more water."),
    ],
)
def test_strip_answer_label_removes_labels_only(raw, answer):
    assert texts.strip_answer_label(raw) == answer


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ("Key Points - Eczema itches. - It is not contagious.", "Eczema itches. - It is not contagious."),
        (
            "Summary : Vaccines train the immune system. Centers for Disease Control and Prevention",
            "Vaccines train the immune system.",
        ),
        ("Sleep matters. NIH: National Institute on Aging", "Sleep matters."),
        ("On this Page General facts What is it? How does it spread? It is a virus.", "It is a virus."),
        ("Wash hands. More on: Handwashing", "Wash hands."),
        ("It heals. (Watch the video. Press Escape (Esc) to leave.) Rest.", "It heals. Rest."),
        (
            "Ask the Centers for Disease Control and Prevention",
            "Ask the Centers for Disease Control and Prevention",
        ),
        ("Some key points matter. Summary: none.", "Some key points matter. Summary: none."),
    ],
)
def test_strip_page_parts_removes_the_web_page(raw, answer):
    assert texts.strip_page_parts(raw) == answer


@pytest.mark.parametrize(
    ("answer", "question", "left"),
    [
        (
            "What are the signs and symptoms of Gout? Joints hurt.",
            "What are the symptoms of Gout?",
            "Joints hurt.",
        ),
        (
            "How might Usher syndrome be treated? Use hearing aids.",
            "What are the treatments for Usher syndrome, type 1C?",
            "Use hearing aids.",
        ),
        (
            "What causes 22q13.3 deletion? A missing piece.",
            "What causes 22q13.3 deletion?",
            "A missing piece.",
        ),
        (
            "Is it hard to sit still? You may have ADHD.",
            "What is Attention Deficit Hyperactivity Disorder?",
            None,
        ),
        ("Joints hurt. Why? Crystals.", "What are the symptoms of Gout?", None),
    ],
)
def test_strip_echo_removes_only_the_question_itself(answer, question, left):
    assert texts.strip_echo(answer, question) == (answer if left is None else left)


def test_text_key_agrees_between_its_fast_and_general_form():
    assert texts.text_key("What is (are) Gout_x ?") == "what is are gout x"
    assert texts.text_key("Ménière's  Disease") == "ménière s disease"


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=200))
def test_clean_text_is_idempotent_and_printable(text):
    once = texts.clean_text(text)
    assert texts.clean_text(once) == once
    assert once.translate(dict.fromkeys((0x200C, 0x200D))).isprintable() and once == " ".join(once.split())


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=200))
def test_text_key_ignores_case_and_spacing_of_ordinary_text(text):
    key = texts.text_key(text)
    assert texts.text_key(key) == key and "  " not in key


# --- choices ---------------------------------------------------------------------------------------------------------


def make_mcq(*options, correct=(0,)) -> Row:
    return Row("Which organ?", "", "afrimedqa", kind="mcq", options=options, correct=correct)


@pytest.mark.parametrize(
    ("raw", "tidy"),
    [
        ((". Shigella;", "b) Cholera", "C)Rotavirus"), ("Shigella", "Cholera", "Rotavirus")),
        (("a.\tOne", "Two", "c. Three"), ("One", "Two", "Three")),
        (("a. One", "b. Two", "b. Three"), ("One", "Two", "Three")),
        (("a. Shigella", "b. Rotavirus", "C. difficile"), ("Shigella", "Rotavirus", "C. difficile")),
        (("A. baumannii", "B. cereus", "C. difficile"), ("A. baumannii", "B. cereus", "C. difficile")),
        (("A. Mumps", "B. none", "C. C. difficile"), ("Mumps", "none", "C. difficile")),
        (("a. Shigella", "b. Rotavirus", "E. coli"), ("Shigella", "Rotavirus", "E. coli")),
        (
            ("E.coli", "E.histolytica", "C. difficile", "none"),
            ("E.coli", "E.histolytica", "C. difficile", "none"),
        ),
    ],
)
def test_tidy_options_strips_letters_in_place_but_not_of_names(raw, tidy):
    assert cleaning.tidy_options(make_mcq(*raw)).options == tidy


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 1)])
def test_merge_equal_options_moves_the_key(before, after):
    row = cleaning.merge_equal_options(make_mcq("Skin", "Liver", "Liver.", "Lung", correct=(before,)))
    assert (row.options, row.correct) == (("Skin", "Liver", "Lung"), (after,))


def test_options_that_only_fill_up_are_none():
    options = {"option1": "Na", "option2": "n/a", "option3": "None", "option4": "N/A "}
    row = cleaning.read_options(Row("Which?", "", "afrimedqa", kind="mcq", options=json.dumps(options), correct="option3"))
    assert (row.options, row.correct) == (("Na", "None"), (1,))
    assert cleaning.read_options(row._replace(options=json.dumps(options), correct="option2")) is None


def test_clean_rows_keeps_options_that_differ_in_case_apart():
    row = clean_mcq(
        {"option1": "AA", "option2": "Aa", "option3": "aa"}, question="Which genotype is heterozygous?"
    )
    assert row.answer == "Aa" and json.loads(row.choices) == {"options": ["AA", "Aa", "aa"], "correct": 1}


def test_clean_rows_writes_a_choice_question_as_a_pair():
    row = clean_mcq(answer="It makes insulin in its islets.", question="12. Which organ makes insulin?")
    assert row.question == "Which organ makes insulin?\nA. Liver\nB. Pancreas\nC. Spleen"
    assert row.answer == "Pancreas. It makes insulin in its islets."
    assert json.loads(row.choices) == {"options": ["Liver", "Pancreas", "Spleen"], "correct": 1}


@pytest.mark.parametrize(
    "rationale", ["No rationale", "no  rationale.", "", "Option B is correct.", "pancreas", "N/A"]
)
def test_clean_rows_takes_no_placeholder_for_a_rationale(rationale):
    assert clean_mcq(answer=rationale).answer == "Pancreas"


@pytest.mark.parametrize(
    ("stem", "options", "correct", "step"),
    [
        ("Which organ?", ["Liver", "Lung", "Skin"], "0,2", "several correct options"),
        ("Which organ?", ["Liver", "Lung", "A and B"], "2", "equal options"),
        ("Which organ?", ["Liver", "Liver", "Lung", "Both A and C only"], "0", "equal options"),
        ("Concerning malaria in adults:", ["A mosquito bite is needed", "The liver is never ill"], "0", "lists of statements, not a question"),
        ("The liver", ["Is an organ in the chest", "Has four lobes of equal size"], "1", "lists of statements, not a question"),
    ],
)
def test_clean_rows_removes_choices_without_one_best_option(stem, options, correct, step):
    row = Row(stem, "", "afrimedqa", kind="mcq", options=json.dumps(dict(zip("012345", options, strict=False))), correct=correct)
    rows, funnel = clean_rows([row])
    assert rows == [] and [each["step"] for each in funnel if each["removed"]] == [step]


@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("Which organ?", ["Liver", "Lung", "A and B"]),
        ("Which vitamins?", ["A, D, E and K", "B and C"]),
        ("The liver is", ["Bile into the small gut", "Insulin into the large gut"]),
        ("Which is true of malaria:", ["A mosquito bite is needed", "The liver is never ill"]),
        ("Asthma", ["Wheeze", "Rash"]),
    ],
)
def test_clean_rows_keeps_choices_with_one_best_option(stem, options):
    assert clean_mcq(dict(enumerate_options(options)), "option1", question=stem) is not None


def enumerate_options(options):
    return [(f"option{place}", option) for place, option in enumerate(options, 1)]


def test_clean_rows_removes_options_glued_to_a_free_question():
    assert clean_one(question="Who saw it first?A.KochB) PasteurC. Jenner", kind="saq") is None
    assert clean_one(question="Do vitamins A. and B12 help?", kind="saq") is not None


@pytest.mark.parametrize(
    ("options", "correct"),
    [
        ('{"option1": "Liver", "option2": ', "option1"),  # broken JSON
        ("[1, 2]", "option1"),
        ("17", "option1"),
        ("[" * 100_000, "option1"),
        ({"option1": "Liver", "option2": "Spleen"}, "option7"),  # out of range
        ({"option1": "Liver", "option2": "Spleen"}, ""),
        ({"option1": "Liver", "option2": ""}, "option1"),
        ({"option1": "Liver", "option2": " ", "option3": "Spleen"}, "option2"),
        ({"option1": "Liver", "option2": "Liver"}, "option1"),
        (
            {"option1": "Liver", "option2": ";", "option3": "Spleen"},
            "option2",
        ),  # cleaning leaves nothing of the right one
        ({"option1": "Liver", "option2": ";", "option3": "Spleen"}, "option1,option2"),
        ({"option1": "Liver", "option2": "\u200b"}, "option1"),
        ({f"option{i}": f"text {i}" for i in range(11)}, "option1"),
        ("", "option1"),
    ],
)
def test_clean_rows_counts_a_choice_question_that_cannot_be_asked(options, correct):
    options = options if isinstance(options, str) else json.dumps(options)
    rows, funnel = clean_rows(
        [Row("Which organ?", "", "afrimedqa", kind="mcq", options=options, correct=correct)]
    )
    assert rows == [] and sum(step["removed"] for step in funnel) == 1


def test_clean_rows_keeps_an_empty_option_out_and_the_key_right():
    row = clean_mcq(
        {"option1": "", "option2": "Pancreas", "option3": None, "option4": "Spleen"}, correct="option4"
    )
    assert row.answer == "Spleen" and json.loads(row.choices) == {
        "options": ["Pancreas", "Spleen"],
        "correct": 1,
    }


@pytest.mark.parametrize("nothing", [";", ";;", ",", ".", "\u200b", "&nbsp;", "<br>"])
def test_clean_rows_keeps_an_option_that_cleaning_empties_out(nothing):
    row = clean_mcq(
        {"option1": "Iron", "option2": nothing, "option3": "Zinc"}, correct="option3", question="Which metal?"
    )
    assert row.question == "Which metal?\nA. Iron\nB. Zinc"
    assert row.answer == "Zinc" and json.loads(row.choices) == {"options": ["Iron", "Zinc"], "correct": 1}


def test_clean_rows_makes_a_choice_question_without_options_a_free_one():
    row = clean_mcq("", correct="", answer=ANSWER)
    assert (row.question, row.answer, row.choices) == ("Which organ makes insulin?", ANSWER, "")


# --- rows ------------------------------------------------------------------------------------------------------------

LEGEND = "The Human Phenotype Ontology (HPO) has collected signs. A sign without a number may be rare or common."
TABLE = (
    "The Human Phenotype Ontology provides a list. Signs and Symptoms Approximate number of patients (when available) "
    "Tall stature 90% Low-set, small ears 4/5 Arnold-Chiari malformation 30% Ataxia 7.5% Coma 1% Autosomal dominant inheritance - "
    f"Intellectual disability, progressive - Adult onset - {LEGEND}"
)
SIGNS = (
    "Very common: Tall stature; Low-set, small ears. Common: Arnold-Chiari malformation. Occasional: Ataxia. "
    "Rare: Coma. Frequency unknown: Intellectual disability, progressive."
)


def test_clean_rows_writes_a_phenotype_table_as_sentences():
    assert clean_one(answer=f"{ANSWER} {TABLE} See a doctor.").answer == f"{ANSWER} {SIGNS} See a doctor."
    asked = {"question": "What are the symptoms of Gout?", "answer": f"What are the signs and symptoms of Gout? {TABLE}"}
    assert clean_one(**asked).answer == SIGNS


@pytest.mark.parametrize(
    "answer",
    [
        f"The Human Phenotype Ontology provides a list. Number (when available) Sporadic - {LEGEND}",
        "These resources address colds: - A page - Another page",
        "https://example.org/cold www.example.org",
        "No rationale",
        "",
        "?!",
        float("nan"),
        None,
        "Sleep well.",
        "What helps against a cold ?",
        "How long does a cold last?",
    ],
)
def test_clean_rows_removes_what_is_no_answer(answer):
    assert clean_one(answer=answer) is None


@pytest.mark.parametrize(
    ("question", "answer", "left"),
    [
        ("How to diagnose Gout?", "Yes, blood tests help.", "Blood tests help."),
        ("What causes Gout?", "No. Nobody knows why.", "Nobody knows why."),
        ("Is Gout inherited?", "Yes. It runs in families.", "Yes. It runs in families."),
        ("What is No?", "No is a short word.", "No is a short word."),
        ("How is it?", "It heals soon. ### Response: It heals. ### Instruction: go on", "It heals soon."),
        ("How often is it?", "One in five girls.2 Most have it twice (in 2012.3 cases).[1] [22] More follows.3",
         "One in five girls. Most have it twice (in 2012.3 cases). More follows."),
        ("How is it?", "It heals. More on: Resources for Health Professionals: Treatment Wash it.", "It heals. Wash it."),
        ("How is it?", "It heals soon. More on: Taeniasis More on: Resources for All: Diagnosis Environmental Protection Agency", "It heals soon."),
        ("What is Gout?", "Gout is a disease of the joints. - Gout comes from crystals in the joint. - Rest helps. "
         "Gout is a disease of the joints. It hurts. Gout comes from crystals in the joint. Rest helps.",
         "Gout is a disease of the joints. - Rest helps. It hurts. Gout comes from crystals in the joint. Rest helps."),
    ],
)
def test_clean_rows_mends_an_answer(question, answer, left):
    assert clean_one(question=question, answer=answer).answer == left


@pytest.mark.parametrize(
    ("question", "answer", "kept"),
    [
        ("What is Gout?", "Salt comes from many foods that we eat.", False),
        ("What is Gout?", "Salt comes from foods. " * 20 + "Gout hurts.", True),
        ("What is Age-related Macular Degeneration?", "Dry ARMD has three stages.", True),
        ("What are the symptoms of Gout?", "Joints hurt and swell at night.", True),
    ],
)
def test_clean_rows_removes_what_answers_another_question(question, answer, kept):
    assert (clean_one(question=question, answer=answer) is not None) == kept


def test_clean_rows_removes_puzzles_of_afrimedqa_only():
    puzzle = "If all birds fly, can we logically conclude that this one does?"
    assert clean_one(question=puzzle, source="afrimedqa", kind="saq") is None
    assert clean_one(question=puzzle, source="medquad") is not None


def test_clean_rows_leaves_out_consumer_questions():
    rows, funnel = clean_rows([Row("Is tea safe?", ANSWER, "afrimedqa", kind="consumer_queries")])
    assert rows == [] and funnel[2]["removed"] == 1


@pytest.mark.parametrize(
    "cell",
    [3, 2.5, True, b"x", pd.NA, pd.NaT, ["a"], {"a": 1}, object(), "\ud800 lone surrogate", "x" * 100_000],
)
@pytest.mark.parametrize("field", ["question", "answer", "focus_area", "kind", "options", "correct"])
def test_clean_rows_counts_rows_with_odd_cells(field, cell):
    good = Row("What is rest?", ANSWER, "afrimedqa")
    rows, funnel = clean_rows(
        [good, Row(**{"question": "What is sleep?", "answer": ANSWER, "source": "afrimedqa", field: cell})]
    )
    assert len(rows) + sum(step["removed"] for step in funnel) == 2
    assert all(isinstance(text, str) and text.encode() for row in rows for text in (row.question, row.answer))


def test_clean_rows_removes_a_cell_of_100_000_characters_as_oversized():
    _, funnel = clean_rows([Row("What is rest?", "word " * 20_000, "medquad")])
    assert {step["step"]: step["removed"] for step in funnel}["oversized cells"] == 1


# --- all rows --------------------------------------------------------------------------------------------------------


def pair(question: str, answer: str) -> Row:
    return Row(question, answer, "medquad")


def test_drop_exact_pairs_ignores_case_and_punctuation():
    rows = [
        pair("What is gout?", "A joint disease."),
        pair("WHAT IS GOUT ?", "a joint disease"),
        pair("What is gout?", "Another one."),
    ]
    for order in (rows, rows[::-1]):
        assert sorted(row.answer for row in cleaning.drop_exact_pairs(order)) == [
            "A joint disease.",
            "Another one.",
        ]


@pytest.mark.parametrize(("lengths", "kept"), [((5, 300, 301), 300), ((350, 301, 900), 301), ((4, 9), 9)])
def test_keep_one_answer_prefers_the_fullest_that_fits(lengths, kept):
    rows = [pair("What is gout?", " ".join(["word"] * n)) for n in lengths]
    assert [len(row.answer.split()) for row in cleaning.keep_one_answer(rows)] == [kept]


@pytest.mark.parametrize(
    ("question", "best", "reference", "other"),
    [
        ("What is Alzheimer's Disease?", "Alzheimers disease is an illness of nerve cells in the brain.", "Early Alzheimers disease (EAD) means loss.",
         "A long answer on caregivers of people with Alzheimers disease, and on what they do all day."),
        ("What are the treatments for Gout?", "Gout is treated with rest.", "Drugs and rest.",
         "Gout hurts so much that one cannot walk or sleep."),
        ("How to prevent Gout?", "To avoid gout, drink water.", "Drink water to lower the risk.", "Gout is a disease."),
    ],
)
def test_keep_one_answer_goes_by_relevance_and_keeps_further_references(question, best, reference, other):
    rows = [pair(question, text) for text in (other, reference, best)]
    for order in (rows, rows[::-1]):
        [row] = cleaning.keep_one_answer(order)
        assert (row.answer, json.loads(row.references)) == (best, [reference])
    assert cleaning.keep_one_answer(rows[:1])[0].references == ""


def test_clean_rows_keeps_the_inheritance_of_every_disease():
    paragraph = "This condition is inherited in an autosomal recessive pattern from both of the parents."
    rows, _ = clean_rows([pair(f"Is disease {name} inherited?", paragraph) for name in "abcdef"])
    assert len(rows) == 6


def test_clean_rows_counts_each_removed_and_changed_row_once_where_it_happens():
    raw = [
        pair("What is (are) Gout ?", "Gout is a disease of joints."),
        pair("What is gout?", "gout is a disease of joints"),
        pair("What is gout ?", "Gout hurts a lot."),
        pair("What is (are)  ?", "Nothing is asked."),
        pair("What is flu?", "A virus."),
    ]
    rows, funnel = clean_rows(raw)
    steps = {step["step"]: step for step in funnel}
    assert [row.question for row in rows] == ["What is gout?"]
    assert {name: step["removed"] for name, step in steps.items() if step["removed"]} == {
        "question templates and labels": 1,
        "under three words": 1,
        "exact pairs": 1,
        "one answer per question": 1,
    }
    assert (
        steps["question templates and labels"]["changed"] == 2
        and steps["Unicode, HTML and white space"]["changed"] == 1
    )
    assert (
        [step["rows"] for step in funnel][-1] + sum(step["removed"] for step in funnel)
        == funnel[0]["rows"]
        == 5
    )


@pytest.mark.parametrize(
    "part",
    [
        "?",
        " ?",
        "1. ",
        ".",
        "&amp;",
        "amp;",
        "<a x=",
        "(Watch the video ",
        "On this Page a?",
        "More on: ",
        "Answer: ",
        "A. ",
        "- ",
        ";",
        "A",
        "The Human Phenotype Ontology provides",
        "Key Points ",
        "what are the ",
    ],
)
def test_clean_rows_needs_no_quadratic_time_on_long_cells(part):
    text = "&" + (part * 30_000)[:30_000]
    options = json.dumps({"a": text[1:15_000] + "x", "b": text[:15_000]})
    start = time.process_time()
    choice = Row(text[1:], "x", "afrimedqa", "", "mcq", options, "a")
    clean_rows([Row(text, text + "x", "afrimedqa"), Row(text[1:], text[1:], "medquad"), choice])
    assert time.process_time() - start < 1.5
