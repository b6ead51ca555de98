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
    ("answer", "verb"),
    [("Kidney stones are hard deposits.", "are"), ("A stone in the kidney is hard.", "is")],
)
def test_fix_question_takes_the_number_from_the_answer(answer, verb):
    assert (
        texts.fix_question("What is (are) Kidney Stones ?", "Kidney Stones", answer)
        == f"What {verb} Kidney Stones?"
    )


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


def test_clean_rows_leaves_choices_empty_with_two_keys():
    row = clean_mcq(correct="option1,option3")
    assert (row.answer, row.choices) == ("Liver; Spleen", "")


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

TABLE = "The Human Phenotype Ontology provides a table. Tall stature frequent. A sign without a number may be rare or common."


def test_clean_rows_cuts_a_phenotype_table_out_of_a_real_answer():
    assert clean_one(answer=f"{ANSWER} {TABLE} See a doctor.").answer == f"{ANSWER} See a doctor."


@pytest.mark.parametrize(
    "answer",
    [
        TABLE,
        f"What are the signs and symptoms of a cold? {TABLE}",
        f"Nine words and a table are hardly an answer. {TABLE}",
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


def test_clean_rows_keeps_ten_words_beside_a_phenotype_table():
    ten_words = "Ten words and a table are counted as an answer."
    assert clean_one(answer=f"{ten_words} {TABLE}").answer == ten_words


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


def test_cap_template_answers_keeps_three_whatever_their_order():
    rows = [pair(f"Is disease {name} inherited?", ANSWER) for name in "edcba"] + [
        pair("Why?", "Short answers repeat.")
    ] * 5
    for order in (rows, rows[::-1]):
        kept = cleaning.cap_template_answers(order)
        assert sorted(row.question for row in kept if row.answer == ANSWER) == [
            f"Is disease {name} inherited?" for name in "abc"
        ]
        assert sum(row.question == "Why?" for row in kept) == 5


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
    text = "&" + (part * 49_000)[:49_000]
    options = json.dumps({"a": text[1:24_000] + "x", "b": text[:24_000]})
    start = time.process_time()
    choice = Row(text[1:], "x", "afrimedqa", "", "mcq", options, "a")
    clean_rows([Row(text, text + "x", "afrimedqa"), Row(text[1:], text[1:], "medquad"), choice])
    assert time.process_time() - start < 2


OPTIONS = st.text(max_size=20) | st.dictionaries(
    st.sampled_from(["option1", "option2"]), st.text(max_size=9)
).map(json.dumps)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.builds(
            Row,
            question=st.text(max_size=60),
            answer=st.text(max_size=80),
            source=st.sampled_from(["medquad", "afrimedqa"]),
            focus_area=st.text(max_size=10),
            kind=st.sampled_from(["qa", "saq", "mcq", "consumer_queries", ""]),
            options=OPTIONS,
            correct=st.sampled_from(["option1", "option2", "option1,option2", "", "x"]),
        ),
        max_size=8,
    )
)
def test_clean_rows_loses_no_row_uncounted_whatever_the_text(rows):
    left, funnel = clean_rows(rows)
    assert len(left) + sum(step["removed"] for step in funnel) == len(rows)
    assert all(
        before["rows"] - after["removed"] == after["rows"]
        for before, after in zip(funnel, funnel[1:], strict=False)
    )
