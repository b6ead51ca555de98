import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from medqa_lib.prompts import (
    encode_chat_prompt,
    encode_prompt,
    escape_special_tokens,
    format_example,
    format_prompt,
    strip_eos,
)

CHAT_TEMPLATE = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"


def test_format_prompt_is_the_template_around_the_stripped_question():
    assert format_prompt("  What is gout?\n") == "### Instruction:\nWhat is gout?\n\n### Response:\n"


def test_format_example_appends_the_stripped_answer_and_no_eos():
    assert format_example("Q?", "\n Yes. ") == "### Instruction:\nQ?\n\n### Response:\nYes."


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("end</s>", "end< /s>"),
        ("<s>", "< s>"),
        ("a <|im_end|> b", "a < |im_end|> b"),
        ("<</s>s>", "<< /s>s>"),
        ("<repo_name>", "< repo_name>"),
        ("### Response:\nno", "# # # Response:\nno"),
        ("##  instruction :", "# #  instruction :"),
        ("half \ud800 pair", "half ? pair"),
    ],
)
def test_neutralize_breaks_control_text_and_markers_with_spaces(text, harmless):
    assert escape_special_tokens(text) == harmless
    assert escape_special_tokens(harmless) == harmless


@pytest.mark.parametrize(
    "text",
    ["p <0.05 and > 3", "a < b > c", "### Notes: see", "Response: stable", "x<-y", "50 µg — naïve ≤ 3"],
)
def test_neutralize_leaves_ordinary_text_alone(text):
    assert escape_special_tokens(text) == text


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "a</s>b", "<</s>/s>"])
def test_encode_prompt_gives_no_control_token_for_text_that_names_one(llama_like, text):
    assert {0, 1, 2} & set(
        llama_like(text, add_special_tokens=False)["input_ids"]
    )  # so it would be one, left alone
    ids = encode_prompt(llama_like, text)
    assert ids[0] == 1
    assert not {0, 1, 2} & set(ids[1:])


def test_encode_prompt_is_bos_and_the_prompts_ids(llama_like, ids_of):
    assert encode_prompt(llama_like, "Go?") == [1, *ids_of(" ### Instruction:\nGo?\n\n### Response:\n")]


def test_encode_prompt_drops_an_eos_that_the_tokenizer_adds(llama_like):
    closing = PreTrainedTokenizerFast(
        tokenizer_object=llama_like.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert closing("Go")["input_ids"][-1] == 2
    assert encode_prompt(closing, "Go?") == encode_prompt(llama_like, "Go?")


def test_strip_eos_takes_one_eos_off_the_end(llama_like):
    assert strip_eos(llama_like, [[1, 5, 2], [1, 5], [], [2, 5]]) == [[1, 5], [1, 5], [], [2, 5]]


def test_encode_chat_prompt_uses_the_models_template_and_neutralises(llama_like):
    llama_like.chat_template = CHAT_TEMPLATE
    ids = encode_chat_prompt(llama_like, " Go?</s> ")
    assert llama_like.decode(ids).replace(" ", "") == "<s>[user]Go?</s>\n[bot]"
    assert llama_like.eos_token_id not in ids


def test_encode_chat_prompt_has_one_bos(llama_like):
    llama_like.chat_template = CHAT_TEMPLATE
    assert encode_chat_prompt(llama_like, "Go?").count(1) == 1
    llama_like.chat_template = CHAT_TEMPLATE.removeprefix("<s>")
    assert encode_chat_prompt(llama_like, "Go?").count(1) == 1
