from medqa_lib.evaluation.label_views import render_tokens, token_table

PROMPT_TOKENS = 37  # BOS, ▁ and 35 characters


def test_token_table_marks_each_policys_labels(llama_like):
    table = token_table(llama_like, "Q?", "Go")
    assert len(table) == PROMPT_TOKENS + 3 + 2  # answer and EOS, padding
    last = table.iloc[-6:].reset_index(drop=True)
    expected = {
        "token": ["\n", "G", "o", "</s>", "</s>", "</s>"],
        "label: aligned": ["·", "✓ G", "✓ o", "✓ </s>", "·", "·"],
        "label: preshifted": ["✗ G", "✗ o", "✗ </s>", "✗", "·", "·"],
        "label: padding_supervised": ["·", "✓ G", "✓ o", "✓ </s>", "✗ </s>", "✗ </s>"],
        "label: no_eos": ["·", "✓ G", "✓ o", "✗", "·", "·"],
    }
    assert {name: last[name].tolist() for name in expected} == expected
    assert table["label: full_sequence"].iloc[:3].tolist() == ["✗ <s>", "✗ ␣", "✗ #"]


def test_render_tokens_escapes_control_tokens(llama_like):
    text = render_tokens(token_table(llama_like, "Q?", "Go"))
    assert "✓ &lt;/s&gt;" in text and "</s>" not in text and "bgcolor" not in text
    assert text.count("<tr") == PROMPT_TOKENS + 5 + 1
