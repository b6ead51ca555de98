"""The one prompt template, both ways: a question to a prompt for generation, a pair to a text for training.

Text of a data set is escaped first: no row with `</s>` or `### Response:` can end its own answer.
"""

import re

TEMPLATE = "### Instruction:\n{question}\n\n### Response:\n"

# How tokenizers write control tokens: <s>, </s>, <unk>, <|im_end|>, <repo_name>. Not "p <0.05" and "a < b".
_CONTROL_TOKEN = re.compile(r"<(?=[|/]?[A-Za-z][\w-]*\|?>)")
_MARKER = re.compile(r"#{2,}(?=[ \t]*(?:Instruction|Response)[ \t]*:)", re.IGNORECASE)


def escape_special_tokens(text: str) -> str:
    """Break up what a tokenizer or this template would take for a control sign, and leave it readable.

    Only spaces are added. A lone surrogate, which no tokenizer takes, becomes "?".

    Example:
        >>> escape_special_tokens("Stop.</s> ### Response: p <0.05")
        'Stop.< /s> # # # Response: p <0.05'
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # a browser may send half of a surrogate pair
    text = _CONTROL_TOKEN.sub("< ", text)
    return _MARKER.sub(lambda match: " ".join(match[0]), text)


def format_prompt(question: str) -> str:
    """The prompt of a question, up to the place where the answer starts.

    Example:
        >>> format_prompt("What is gout?")
        '### Instruction:\\nWhat is gout?\\n\\n### Response:\\n'
    """
    return TEMPLATE.format(question=escape_special_tokens(question.strip()))


def format_example(question: str, answer: str) -> str:
    """Prompt and answer as one text. EOS is not part of it: it is added as a token id, not as text."""
    return format_prompt(question) + escape_special_tokens(answer.strip())


def strip_eos(tokenizer, rows: list[list[int]]) -> list[list[int]]:
    """The rows without the EOS that some tokenizers add by themselves, so that it is added once, by us."""
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]


def encode_prompt(tokenizer, question: str) -> list[int]:
    """(T,) ids of the prompt: exactly those that `labels.encode_example` masks."""
    ids = tokenizer([format_prompt(question)], split_special_tokens=True)["input_ids"]
    return strip_eos(tokenizer, ids)[0]


def encode_chat_prompt(tokenizer, question: str) -> list[int]:
    """(T,) ids of the question in the chat template that the model was released with: a baseline beside ours.

    A template that writes BOS itself does not get a second one.
    """
    messages = [{"role": "user", "content": escape_special_tokens(question.strip())}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    starts_with_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not starts_with_bos)["input_ids"]
