"""A tokenizer small enough to work out ids by hand, with what makes Llama 2's tricky; a Hub that does not answer."""

import http.server
import json
import threading
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = {
    token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(33, 127)), "▁G"])
}


@pytest.fixture
def make_llama_like():
    """A token a character; a space becomes ▁, and one is put before any text, and BOS too; ▁G is one token. Padding is EOS."""

    def make(*more_merges):
        vocabulary = VOCABULARY | {a + b: len(VOCABULARY) + i for i, (a, b) in enumerate(more_merges)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "G"), *more_merges], unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Replace("▁", " ")
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
        )
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
        )

    return make


@pytest.fixture
def llama_like(make_llama_like):
    return make_llama_like()


@pytest.fixture(scope="session")
def ids_of():
    """The ids that `llama_like` gives a text in the middle of another."""

    def ids(text):
        pieces = text.replace(" ", "▁").split("▁G")
        return [
            VOCABULARY[token]
            for i, piece in enumerate(pieces)
            for token in (["▁G"] if i else []) + list(piece)
        ]

    return ids


@pytest.fixture
def dead_hub(tmp_path, monkeypatch):
    """Nothing answers under the Hub's address, and its cache is an empty folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def cache_roberta(dead_hub):
    """Puts a random RoBERTa of 18 thin layers into the cache, as a download of roberta-large would, less some files; gives its folder."""

    def cache(without=()):
        import torch
        from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

        folder = dead_hub / "models--roberta-large" / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parents[1] / "refs").mkdir(exist_ok=True)
        (folder.parents[1] / "refs" / "main").write_text("0" * 40)
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=512).save_pretrained(folder)
        torch.manual_seed(0)
        RobertaModel(
            RobertaConfig(
                vocab_size=len(tokens),
                hidden_size=8,
                num_hidden_layers=18,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=514,
            )
        ).save_pretrained(folder)
        for name in without:
            (folder / name).unlink()
        return folder

    return cache


@pytest.fixture
def web():
    """A server on 127.0.0.1: `web.answers` is a list of (status, headers, body), the last of which repeats; status 0 hangs up,
    and a body that is shorter than its Content-Length is cut. `web.url`; `web.log`, one line a request."""
    web = SimpleNamespace(answers=[], log=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            web.log.append(f"{self.command} {self.path}")
            status, headers, body = web.answers.pop(0) if len(web.answers) > 1 else web.answers[0]
            if status:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)
            self.close_connection = not status or len(body) < int(headers.get("Content-Length", 0))

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    yield web
    server.shutdown()
