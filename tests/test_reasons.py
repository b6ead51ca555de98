"""The reason of a failed download, from answers of a real server to the real clients, and when another try is made."""

import pytest
import requests
from huggingface_hub import hf_hub_download

from medqa_lib import reasons

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}


@pytest.mark.parametrize(
    ("answer", "token", "words"),
    [
        ((401, GATED, b""), False, "accepted conditions"),
        ((403, GATED, b""), "hf_of_somebody", "accepted conditions"),
        ((401, {}, b""), "hf_expired", "refused the token (401)"),
        ((401, {}, b""), False, "no such repository"),
        ((404, {"X-Error-Code": "RepoNotFound"}, b""), "hf_of_somebody", "404"),
    ],
)
def test_hub_reason_reads_the_hubs_answer(web, tmp_path, answer, token, words):
    web.answers = [answer]
    with pytest.raises(OSError) as error:
        hf_hub_download("a/b", "config.json", endpoint=web.url, token=token, cache_dir=tmp_path)
    assert words in reasons.hub_reason(error.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((429, {}, b""), "429"),
        ((503, {}, b""), "answered 503"),
        ((200, {"Content-Length": "9"}, b"half"), "cut"),
        ((0, {}, b""), "cut"),
    ],
)
def test_hub_reason_finds_the_cause_down_the_chain(web, answer, words):
    web.answers = [answer]

    def fetch():
        try:
            requests.get(web.url, timeout=5).raise_for_status()
        except requests.RequestException as error:
            raise OSError("Check your internet connection") from error

    with pytest.raises(OSError) as error:
        fetch()
    assert words in reasons.hub_reason(error.value)


def test_hub_reason_tells_no_connection_from_other_errors():
    with pytest.raises(requests.ConnectionError) as error:
        requests.get("http://127.0.0.1:9", timeout=5)
    assert reasons.hub_reason(error.value, "Kaggle") == "no connection to Kaggle"
    assert reasons.hub_reason(ValueError("bad\nvalue")) == "ValueError: bad value"


@pytest.fixture
def waited(monkeypatch):
    seconds = []
    monkeypatch.setattr(reasons.time, "sleep", seconds.append)
    return seconds


def test_try_again_waits_as_long_as_the_server_asks(web, waited, capsys):
    web.answers = [(429, {"Retry-After": "3"}, b""), (503, {}, b""), (200, {}, b"data")]

    def fetch():
        response = requests.get(web.url, timeout=5)
        response.raise_for_status()
        return response.content

    assert reasons.try_again(fetch, "The file", "Kaggle") == b"data"
    assert waited == [3, reasons.WAITS[1]]
    lines = capsys.readouterr().out.splitlines()
    assert ["429" in lines[0], "503" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize(("status", "tries"), [(503, 4), (404, 1), (403, 1)])
def test_try_again_gives_up(web, waited, status, tries):
    web.answers = [(status, {}, b"")]
    with pytest.raises(requests.HTTPError, match=str(status)):
        reasons.try_again(lambda: requests.get(web.url, timeout=5).raise_for_status(), "The file", "Kaggle")
    assert len(web.log) == tries
