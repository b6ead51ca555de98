"""A tokenizer small enough to work out ids by hand, with what makes Llama 2's tricky."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(33, 127)), "▁G"])}


@pytest.fixture
def make_llama_like():
    """A token a character; a space becomes ▁, and one is put before any text, and BOS too; ▁G is one token. Padding is EOS."""

    def make(*more_merges):
        vocabulary = VOCABULARY | {a + b: len(VOCABULARY) + i for i, (a, b) in enumerate(more_merges)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "G"), *more_merges], unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Replace("▁", " ")
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")

    return make


@pytest.fixture
def llama_like(make_llama_like):
    return make_llama_like()


@pytest.fixture(scope="session")
def ids_of():
    """The ids that `llama_like` gives a text in the middle of another."""

    def ids(text):
        pieces = text.replace(" ", "▁").split("▁G")
        return [VOCABULARY[token] for i, piece in enumerate(pieces) for token in (["▁G"] if i else []) + list(piece)]

    return ids
