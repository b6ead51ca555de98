"""The wording for emergencies comes when one is described, and only then."""

import pytest

from medqa_lib.publish.safety import (
    DISCLAIMER,
    EMERGENCY,
    MAX_CHARACTERS,
    check_question,
    describes_emergency,
)

DESCRIBED = [
    "I have chest pain and my left arm is numb",
    "my father has a stroke, his face is drooping",
    "I can't breathe",
    "I can’t breathe properly",
    "My baby swallowed a battery",
    "she took too many pills an hour ago",
    "I want to die",
    "He is unconscious and not breathing",
    "the bleeding won't stop",
    "someone next to me has a seizure right now",
    "I was bitten by a snake",
    "I think about killing myself",
    "MY CHEST HURTS I THINK ITS A HEART ATTACK",
    "my throat is closing after eating nuts",
    "There is no pulse",
    "I don't want to live anymore",
    "I do not want to live any more",
    "he no longer wants to live",
    "I want to take my own life",
    "I slit my wrists",
    "she has cut her wrists",
    "My baby has trouble breathing",
    "she has difficulty breathing",
    "my husband fainted and is not responding",
    "My mother isn't responding",
    "I took 30 paracetamol tablets",
    "my son has taken about twenty of my sleeping pills",
    "She swallowed all of her tablets",
    "I took a whole pack of ibuprofen tablets",
    "What should I do if I think I am having a heart attack?",
]
ASKED = [
    "What is a stroke?",
    "What are the symptoms of a heart attack?",
    "How is epilepsy diagnosed?",
    "What causes chest pain?",
    "What are the treatments for snake bite?",
    "Is sickle cell disease inherited?",
    "Can I take antibiotics for a cold?",
    "What is the first-line drug for status epilepticus?",
    "How many people die of suicide each year?",
    "What is high blood pressure?",
    "What causes difficulty breathing?",
    "What are the causes of trouble breathing at night?",
    "What is the treatment for fainting?",
    "What if asthma is not responding to treatment?",
    "My rash is not responding to treatment",
    "Can I take two paracetamol tablets a day?",
    "I took 500 mg tablets of paracetamol for my cold",
    "I have taken two ibuprofen tablets today",
    "How many pills are in a pack of 30 tablets?",
    "Can people with asthma live a normal life?",
    "What causes a broken wrist?",
    "I have had a runny nose for two days",
    "How can poisoning be prevented?",
]


@pytest.mark.parametrize("question", DESCRIBED)
def test_describes_emergency_finds_a_described_one(question):
    assert describes_emergency(question)


@pytest.mark.parametrize("question", ASKED)
def test_describes_emergency_lets_a_question_about_a_condition_pass(question):
    assert not describes_emergency(question)


def test_check_question_counts_characters():
    assert check_question("a" * MAX_CHARACTERS) == ""
    assert "10,000 characters" in check_question("a" * 10_000) and "1,000" in check_question("a" * 10_000)


@pytest.mark.parametrize("question", ["", " ", "\n\t\u00a0"])
def test_check_question_asks_for_text(question):
    assert check_question(question) == "Please write a question first."


def test_notices_name_what_to_do():
    assert "Not medical advice" in DISCLAIMER
    assert "112" in EMERGENCY and "911" in EMERGENCY and "988" in EMERGENCY
