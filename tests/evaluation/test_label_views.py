from medqa_lib.config import POLICIES
from medqa_lib.evaluation.label_views import audit_table, plot_audits, render_tokens, token_table

PROMPT_TOKENS = 37  # BOS, ▁ and 35 characters


def make_report(policy, nll=(10.4, 2.2, 12.2), **shares):
    report = {"policy": policy, "verdict": "v", "nll": dict(enumerate(nll)), "chance_nll": 10.8, "rows": 6}
    return report | {f"{part}_share": shares.get(part, 0.0) for part in ("prompt", "answer", "eos", "padding")}


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


def test_audit_table_has_one_row_per_report():
    table = audit_table({"aligned": make_report("aligned", answer=1.0, eos=0.95), "odd": make_report(None)})
    numbers = table.loc["aligned", ["+0", "+1", "+2", "chance", "answer", "eos", "rows"]]
    assert numbers.tolist() == [10.4, 2.2, 12.2, 10.8, 1.0, 0.95, 6]
    assert table["found"].tolist() == ["aligned", "no policy"]


def test_plot_audits_draws_each_offset_and_share():
    table = audit_table({policy: make_report(policy, answer=1.0) for policy in POLICIES})
    left, right = plot_audits(table).axes
    assert [line.get_xdata().tolist() for line in left.lines[:3]] == [[10.4] * 5, [2.2] * 5, [12.2] * 5]
    assert [text.get_text() for text in right.texts] == ["0%", "100%", "0%", "0%"] * 5
