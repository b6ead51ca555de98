"""Where raw rows come from: the sample, a folder, Kaggle and the Hub; downloads that fail, against a server on this machine."""

import gzip
import io
import json
import zipfile

import pandas as pd
import pytest
from datasets import Dataset

from medqa_lib import reasons
from medqa_lib.data import load_sources, merge_sources, sources

MEDQUAD = "question,answer,source,focus_area\nWhat is gout?,Gout is a disease of joints.,x,gout\n"
AFRIMEDQA = (
    "sample_id,question_type,question,answer_options,correct_answer,answer_rationale\n"
    '1,mcq,Which organ?,"{""option1"": ""Liver"", ""option2"": ""Spleen""}",option2,No rationale\n'
)


@pytest.fixture(autouse=True)
def _no_folder_of_the_caller(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDQA_DATA_DIR", raising=False)
    monkeypatch.setenv("MEDQA_PROFILE", "smoke")
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "medquad.csv").write_text(MEDQUAD)
    (tmp_path / "afrimedqa_v2_x.csv").write_text(AFRIMEDQA)
    return tmp_path


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["smoke", "cpu"])
def test_load_sources_takes_the_bundled_sample_off_the_gpu(monkeypatch, profile):
    monkeypatch.setenv("MEDQA_PROFILE", profile)
    frames = load_sources()
    assert [frame.attrs["origin"] for frame in frames.values()] == ["bundled sample"] * 2
    assert all(set(sources.REQUIRED[name]) <= set(frame) for name, frame in frames.items())


def test_load_sources_prefers_a_folder_to_a_download(monkeypatch, folder):
    monkeypatch.setenv("MEDQA_PROFILE", "gpu")
    monkeypatch.setenv("MEDQA_DATA_DIR", str(folder))
    with gzip.open(folder / "medquad.csv.gz", "wt") as file:
        file.write(MEDQUAD)
    (folder / "medquad.csv").unlink()
    frames = load_sources()
    assert frames["medquad"]["focus_area"].tolist() == ["gout"]
    assert frames["medquad"].attrs["origin"] == "medquad.csv.gz"
    assert frames["afrimedqa"]["correct_answer"].tolist() == ["option2"]


@pytest.mark.parametrize("name", ["medquad", "afrimedqa"])
def test_load_sources_takes_one_source_alone_and_says_so(folder, capsys, name):
    for path in folder.glob("*.csv"):
        if not path.name.startswith(name):
            path.unlink()
    frames = load_sources(folder)
    assert list(frames) == [name] and name in capsys.readouterr().out
    assert len(merge_sources(frames)) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("medquad.csv", "MedQuAD.csv"),
        ("afrimedqa_v2_x.csv", "afri_med_qa_15k_v2.5_phase_2_15275.csv"),
        ("afrimedqa_v2_x.csv", "Afri-MedQA.CSV"),
        ("afrimedqa_v2_x.csv", "afrimedqa.parquet"),
        ("medquad.csv", "medQuad.jsonl"),
    ],
)
def test_load_sources_knows_the_files_by_the_names_that_their_publishers_give(folder, old, new):
    expected = merge_sources(load_sources(folder))
    frame = pd.read_csv(folder / old, dtype=str)
    (folder / old).rename(folder / new)
    if new.endswith("parquet"):
        frame.to_parquet(folder / new)
    elif new.endswith("jsonl"):
        frame.to_json(folder / new, orient="records", lines=True)
    pd.testing.assert_frame_equal(merge_sources(load_sources(folder)), expected)


def test_load_sources_takes_headers_in_any_case_and_no_focus_area(folder, capsys):
    (folder / "medquad.csv").write_text(MEDQUAD.replace("question", " Question").replace("answer", "ANSWER"))
    assert load_sources(folder)["medquad"]["answer"].tolist() == ["Gout is a disease of joints."]
    (folder / "medquad.csv").write_text("question,answer\nWhat is gout?,Gout is a disease of joints.\n")
    assert load_sources(folder)["medquad"]["focus_area"].tolist() == [""]
    assert "focus_area" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (["train", "test", "test ", None], ["train", "test", "test", "train"]),
        (["train", "train", "", None], ["test", "train", "train", "train"]),  # it names no test
        (None, ["test", "train", "train", "train"]),
    ],
)
def test_check_source_takes_the_official_split_from_split_else_from_tier(split, expected):
    frame = pd.read_csv(sources.SAMPLE_DIR / "afrimedqa_v2_sample.csv", dtype=str)[:4].assign(
        tier=["expert", "expert", "crowdsourced", None], question_type=["mcq", "saq", "mcq", "mcq"]
    )
    frame = frame.assign(Split=split) if split else frame
    checked = sources.check_source(frame, "afrimedqa")
    assert checked["official"].tolist() == expected
    assert sources.check_source(checked, "afrimedqa")["official"].tolist() == expected


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "git-lfs"),
        (b"<!DOCTYPE html><html>Log in</html>", "web page"),
        (b"\x7fELF\0\0\1\0", "no table"),
        ("question,answer,focus_area\nM\u00e9,\u00e9\u00e8,x\n".encode() + b"a\xe9,b,c\n", "damaged in line 3"),
        (b"question,answer,focus_area\n", "no row"),
        (b"question,reply\nWhat?,That.\n", "answer, focus_area"),
        ("question,answer,focus_area\nM\u00e9ni\u00e8re?,x,y\n".encode("latin-1") + b"\xff\xfe\x80", "line 2"),
        (b'question,answer,focus_area\n"What?,x,y\n', "EOF inside string"),
        (b"question,answer,focus_area\na,b,c,d,e\nf,g,h,i,j\n", "more cells"),
        (b"question,answer,focus_area\na,b,c\nf,g,h,i,j\n", "line 3"),
    ],
)
def test_load_sources_names_the_file_and_what_is_wrong(folder, content, word):
    (folder / "medquad.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"medquad.csv.*{word}") as error:
        load_sources(folder)
    assert "\n" not in str(error.value)


def test_load_sources_reports_a_file_that_is_cut_off(folder):
    whole = gzip.compress(AFRIMEDQA.encode() * 50)
    (folder / "afrimedqa_v2_x.csv").unlink()
    (folder / "afrimedqa_v2_x.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="afrimedqa_v2_x.csv.gz"):
        load_sources(folder)


def test_load_sources_reports_missing_and_doubled_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*medquad.csv"):
        load_sources(tmp_path / "nowhere")
    (folder / "afrimedqa_v2_y.csv").write_text(AFRIMEDQA)
    with pytest.raises(FileNotFoundError, match="2 files like afrimedqa_v2"):
        load_sources(folder)


def test_load_sources_reads_a_byte_order_mark_and_keeps_the_word_none(folder):
    (folder / "medquad.csv").write_bytes(b"\xef\xbb\xbf" + MEDQUAD.encode() + b"What is left?,None,x,NA\n")
    assert load_sources(folder)["medquad"][["answer", "focus_area"]].iloc[1].tolist() == ["None", "NA"]


# --- Kaggle ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def waited(monkeypatch):
    seconds = []
    monkeypatch.setattr(reasons.time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def kaggle(web, monkeypatch, tmp_path):
    """The real kagglehub against `web`, which stands for Kaggle: an archive that `web.answers` may put off."""
    import kagglesdk.kaggle_env as env

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(env._env_to_endpoint, env.KaggleEnv.LOCAL, web.url)
    monkeypatch.setattr("kagglehub.clients.search_lib_in_call_stack", lambda name: None)  # half a second under pytest
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("medquad.csv", MEDQUAD)
    web.archive = packed.getvalue()
    web.version = (
        200,
        {"Content-Type": "application/json"},
        json.dumps({"currentVersionNumber": 1}).encode(),
    )
    return web


BUSY, HANG_UP = (503, {}, b""), (0, {}, b"")


@pytest.mark.parametrize("fault", ["429", "cut", "not a zip", "hang up"])
def test_download_medquad_survives_a_hiccup_of_kaggle(kaggle, waited, capsys, fault):
    whole, length = (200, {}, kaggle.archive), {"Content-Length": str(len(kaggle.archive))}
    first = {
        "429": [kaggle.version, (429, {"Retry-After": "7"}, b"")],
        "cut": [kaggle.version, (200, length, kaggle.archive[:50])],
        "not a zip": [kaggle.version, (200, {}, kaggle.archive[:50])],
        "hang up": [kaggle.version, HANG_UP],
    }[fault]
    kaggle.answers = [*first, kaggle.version, whole]
    frame = sources.download_medquad()
    assert frame["focus_area"].tolist() == ["gout"] and "kaggle.com" in frame.attrs["origin"]
    assert waited == [7 if fault == "429" else reasons.WAITS[0]]
    assert capsys.readouterr().out.count("MedQuAD: ") == 1


def test_download_medquad_gives_up_with_the_reason_and_the_way_out(kaggle, waited):
    kaggle.answers = [BUSY]
    with pytest.raises(RuntimeError, match="503.*MEDQA_DATA_DIR"):
        sources.download_medquad()
    assert len(kaggle.log) == 4 and waited == list(reasons.WAITS)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_download_afrimedqa_falls_back_to_the_mirror_and_says_why(monkeypatch, folder, capsys):
    asked = []

    def load_dataset(repository):
        asked.append(repository)
        if repository == sources.AFRIMEDQA_HUB:
            raise RuntimeError(
                "Dataset 'x' is a gated dataset on the Hub.\nYou must be authenticated to access it."
            )
        return {
            "train": Dataset.from_csv(str(folder / "afrimedqa_v2_x.csv"), cache_dir=str(folder / "cache"))
        }

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    frame = sources.download_afrimedqa()
    assert asked == [sources.AFRIMEDQA_HUB, sources.AFRIMEDQA_MIRROR]
    assert frame.attrs["origin"].endswith(sources.AFRIMEDQA_MIRROR)
    assert merge_sources({"afrimedqa": frame})["answer"].tolist() == ["Spleen"]
    assert "accepted conditions" in capsys.readouterr().out


def test_download_afrimedqa_gives_the_reason_of_each_repository(monkeypatch, web, waited):
    from huggingface_hub import hf_hub_download

    web.answers = [(401, {"X-Error-Code": "GatedRepo"}, b""), (404, {"X-Error-Code": "RepoNotFound"}, b"")]
    monkeypatch.setattr("datasets.load_dataset", lambda name: hf_hub_download(name, "x", endpoint=web.url))
    with pytest.raises(RuntimeError, match="intronhealth.*401.*afrimedqa/afrimedqa_v2.*404.*MEDQA_DATA_DIR"):
        sources.download_afrimedqa()
    assert waited == []
