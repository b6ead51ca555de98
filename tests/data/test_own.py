"""Pairs of your own: what is read, which columns are taken, what shares a group, what is refused."""

import gzip
import io
import json
import sys
import zipfile

import pandas as pd
import pytest

from medqa_lib.data import hash_splits, leakage_report, pairs_from, prepare_splits, split_pairs
from medqa_lib.data.texts import text_key

ROWS = pd.DataFrame(
    {
        "Prompt": [f"How is illness number {i} treated?" for i in range(30)],
        "response": [
            f"Illness {i} is treated with rest, fluids and medicine {i} of the ward." for i in range(30)
        ],
        "ward": [f"ward {i // 3}" for i in range(30)],
    }
)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("faq.csv", lambda path: ROWS.to_csv(path, index=False)),
        ("faq.CSV", lambda path: ROWS.to_csv(path, index=False, sep=";", encoding="utf-8-sig")),
        ("faq.tsv", lambda path: ROWS.to_csv(path, index=False, sep="\t")),
        ("faq.json", lambda path: ROWS.to_json(path, orient="records")),
        ("faq.jsonl", lambda path: ROWS.to_json(path, orient="records", lines=True)),
        ("faq.parquet", lambda path: ROWS.to_parquet(path)),
    ],
)
def test_pairs_from_reads_each_kind_of_file_alike(tmp_path, capsys, name, write):
    write(tmp_path / name)
    pairs = pairs_from(tmp_path / name)
    printed = capsys.readouterr().out
    assert "Prompt" in printed and "response" in printed and name in printed
    assert hash_splits(split_pairs(pairs)) == hash_splits(split_pairs(pairs_from(ROWS)))
    assert pairs["question"].tolist() == ROWS["Prompt"].tolist()


def test_pairs_from_keeps_a_group_on_one_side():
    splits = split_pairs(pairs_from(ROWS, group="ward"))
    wards = [{int(question.split()[4]) // 3 for question in split["question"]} for split in splits.values()]
    assert splits.num_rows == {"train": 24, "validation": 3, "test": 3}
    assert sum(map(len, wards)) == len(set.union(*wards)) == 10


def test_pairs_from_groups_equal_questions_and_nearly_equal_answers():
    rows = ROWS.copy()
    rows.loc[1, "Prompt"] = rows.loc[0, "Prompt"].upper()
    long = " ".join(f"word{i}" for i in range(30))
    rows.loc[[2, 3], "response"] = [long, long + " end"]
    pairs = pairs_from(rows)
    assert pairs["group"][0] == pairs["group"][1] != pairs["group"][2] == pairs["group"][3]
    assert pairs["group"].nunique() == 28
    assert leakage_report(split_pairs(pairs))["in_train"].sum() == 0


def test_pairs_from_cleans_what_is_safe_for_any_text_and_nothing_else():
    rows = ROWS.copy()
    rows.loc[0, "response"] = "Answer: <b>1.</b> Drink tea&nbsp;daily."
    rows.loc[1, "response"] = "Yes."
    rows.loc[2, "response"] = None
    rows.loc[3] = rows.loc[4]
    pairs = pairs_from(rows)
    assert pairs["answer"][:2].tolist() == ["Answer: 1. Drink tea daily.", "Yes."]
    assert len(pairs) == 28 and pairs.attrs["funnel"][0]["rows"] == 30


def test_pairs_from_takes_a_data_set_of_the_hub(monkeypatch):
    from datasets import Dataset

    half = {"train": Dataset.from_pandas(ROWS[:15]), "test": Dataset.from_pandas(ROWS[15:])}
    monkeypatch.setattr("datasets.load_dataset", {"clinic/faq": half}.get)
    assert len(pairs_from("clinic/faq", question="Prompt", answer="response")) == 30


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"source": ROWS, "answer": "reply"}, "reply.*Prompt, response, ward"),
        ({"source": ROWS, "group": "clinic"}, "clinic"),
        ({"source": ROWS.rename(columns={"Prompt": "title"})}, "title"),
        ({"source": ROWS[:9]}, "9 of 9.*10"),
        ({"source": ROWS[["Prompt", "response"]].T.reset_index(drop=True).T.set_axis(ROWS.iloc[0, :2], axis=1)}, "no header"),
        ({"source": "no/such/file.csv"}, "no/such/file.csv"),
        ({"source": "data/faq.csv"}, "data/faq.csv"),
        ({"source": sys.executable}, "Parquet"),
    ],
)
def test_pairs_from_says_in_one_line_what_is_wrong(arguments, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        pairs_from(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["faq.json", "faq.jsonl", "faq.parquet", "faq.csv"])
def test_pairs_from_names_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"{not \xe9 json")
    with pytest.raises(ValueError, match=name) as error:
        pairs_from(tmp_path / name)
    assert "\n" not in str(error.value)


def test_pairs_from_gives_the_hubs_reason(monkeypatch):
    def refuse(name):
        raise RuntimeError(f"Dataset '{name}' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError, match="clinic/faq.*accepted conditions"):
        pairs_from("clinic/faq")


# --- twenty sets of other shapes and languages ---------------------------------------------------------------------


def rows_of(question: str, answer: str, names=("question", "answer"), n: int = 20) -> pd.DataFrame:
    """Made-up rows; {i} is their number."""
    return pd.DataFrame({name: [text.format(i=i) for i in range(n)] for name, text in zip(names, (question, answer), strict=True)})


def as_csv(encoding="utf-8", before="", **options):
    return lambda frame: before.encode(encoding) + frame.to_csv(index=False, **options).encode(encoding)


def as_json(wrap=lambda rows: rows, encoding="utf-8"):
    return lambda frame: json.dumps(wrap(frame.to_dict("records")), ensure_ascii=False).encode(encoding)


def as_zip(frame):
    content = io.BytesIO()
    frame.to_csv(content, index=False, compression={"method": "zip", "archive_name": "rows.csv"})
    return content.getvalue()


ENGLISH = ("What is disease {i}?", "Disease {i} has sign {i}; rest, and drink water.")
GERMAN = ("Was hilft gegen Übelkeit {i}?", "Viel trinken, ruhen und süße Säfte {i} Tage lang meiden.")
FRENCH = ("Qu'est-ce que la fièvre {i} ?", "Une température élevée du corps, à traiter par {i} mesures.")
POLISH = ("Co to jest żółtaczka typu {i}?", "Jest to zażółcenie skóry i błon śluzowych, które trwa {i} dni.")
HUNGARIAN = ("Mi a betegség {i}?", "Az orvos gyógyszert ír fel {i} napra, ha erős a fájdalom.")  # no letter but ő is not Portuguese
TURKISH = ("Hastalık {i} nedir?", "Ağrı yapan {i} günlük bir hastalıktır.")
LATVIAN = ("Kas ir slimība {i}?", "Slimībai vajag atpūtu {i} dienas, ārsts izraksta zāles.")
RUSSIAN = ("Что такое болезнь {i}?", "Это болезнь, которую лечат покоем {i} дней.")
GREEK = ("Τι είναι η ασθένεια {i};", "Είναι μια ασθένεια που χρειάζεται ανάπαυση για {i} ημέρες.")
ARABIC = ("ما هو المرض رقم {i}؟", "هو مرض يحتاج إلى الراحة والماء لمدة {i} أيام.")
PERSIAN = ("بیماری {i} چیست؟", "این بیماری با استراحت {i} روزه درمان می\u200cشود.")
HEBREW = ("מהי מחלה מספר {i}?", "זוהי מחלה הדורשת מנוחה במשך {i} ימים.")
HINDI = ("रोग {i} क्या है?", "यह एक रोग है जिसमें {i} दिन आराम करना चाहिए।")
THAI = ("โรคที่ {i} คืออะไร", "เป็นโรคที่ต้องพักผ่อน {i} วัน")
CHINESE = ("什么是疾病{i}？", "这是一种需要休息{i}天的疾病。")
JAPANESE = ("病気{i}とは何ですか？", "それは{i}日間の休息が必要な病気です。")
KOREAN = ("질병 {i}은 무엇입니까?", "그것은 {i}일 동안 휴식이 필요한 질병입니다.")
AMHARIC = ("በሽታ {i} ምንድን ነው?", "ለ{i} ቀናት እረፍት የሚያስፈልገው በሽታ ነው።")
SWAHILI = ("Ugonjwa nambari {i} ni nini?", "Ni ugonjwa unaohitaji kupumzika kwa siku {i}.")
YORUBA = ("Kí ni àìsàn {i}?", "Àìsàn tó nílò ìsinmi fún ọjọ́ {i}.")
SETS = {
    "English, commas in a header of semicolons": (ENGLISH, ("Question, in English", "Answer"), as_csv(sep=";")),
    "German, Excel": (GERMAN, ("Frage", "Antwort"), as_csv("cp1252", before="sep=;\r\n", sep=";")),
    "French, Latin-1": (FRENCH, ("Question", "Réponse"), as_csv("latin-1", sep=";")),
    "Hungarian, CP1250": (HUNGARIAN, ("kérdés", "válasz"), as_csv("cp1250", sep=";")),
    "Turkish, CP1254": (TURKISH, ("soru", "cevap"), as_csv("cp1254", sep=";")),
    "Latvian, CP1257": (LATVIAN, ("question", "answer"), as_csv("cp1257", sep=";")),
    "French, Macintosh": (FRENCH, ("Question", "Answer"), as_csv("mac_roman", sep=";")),
    "Polish, CP1250": (POLISH, ("pytanie", "odpowiedz"), as_csv("cp1250", sep=";")),
    "Russian, UTF-16 with a mark": (RUSSIAN, ("Query", "Response"), as_csv("utf-16", sep="\t")),
    "Russian, KOI8": (RUSSIAN, ("query", "response"), as_csv("koi8_r")),
    "Greek, bars": (GREEK, ("q", "a"), as_csv(sep="|")),
    "Arabic, carets": (ARABIC, ("prompt", "completion"), as_csv(sep="^")),
    "Persian, JSON with a mark": (PERSIAN, ("question", "answer"), as_json(encoding="utf-8-sig")),
    "Hebrew, JSON in an object": (HEBREW, ("input", "output"), as_json(lambda rows: {"version": 1, "data": rows})),
    "Hindi, UTF-16 without a mark": (HINDI, ("question", "answer"), as_csv("utf-16-le")),
    "Thai, JSON Lines": (THAI, ("question", "answer"), lambda frame: frame.to_json(orient="records", lines=True).encode()),
    "Chinese, GB18030": (CHINESE, ("question", "answer"), as_csv("gb18030")),
    "Chinese, JSON by column": (CHINESE, ("问题", "回答"), lambda frame: frame.to_json().encode()),
    "Japanese, UTF-32": (JAPANESE, ("question", "answer"), as_csv("utf-32")),
    "Korean, CP949": (KOREAN, ("question", "answer"), as_csv("cp949")),
    "Amharic, gzip": (AMHARIC, ("Question", "Answer"), lambda frame: gzip.compress(frame.to_csv(index=False).encode())),
    "Swahili, Parquet": (SWAHILI, ("question", "answer"), lambda frame: frame.to_parquet()),
    "Yoruba, every cell quoted": (YORUBA, (" Question ", "Answer"), as_csv("utf-8-sig", quoting=1)),
    "English, broken bars": (ENGLISH, ("q", "a"), as_csv(sep="¦")),
    "Swahili, zip": (SWAHILI, ("question", "answer"), as_zip),
    "English, tildes": (ENGLISH, ("instruction", "target"), as_csv(sep="~")),
}


@pytest.mark.parametrize("ending", [".csv", ".dat"])  # the content decides, not the name
@pytest.mark.parametrize("name", SETS)
def test_pairs_from_reads_each_set_to_the_letter(tmp_path, capsys, name, ending):
    (question, answer), names, pack = SETS[name]
    frame = rows_of(question, answer, names)
    (tmp_path / f"rows{ending}").write_bytes(pack(frame))
    pairs = pairs_from(tmp_path / f"rows{ending}")
    assert pairs["question"].tolist() == frame[names[0]].tolist()
    assert pairs["answer"].tolist() == frame[names[1]].tolist()
    assert all(name.strip() in capsys.readouterr().out.replace("\\n", "") for name in names[:1])
    splits = split_pairs(pairs)
    assert sum(splits.num_rows.values()) == 20 and min(splits.num_rows.values()) >= 2
    report = leakage_report(splits)
    assert report["in_train"][report["check"].str.startswith("same")].sum() == 0


def test_pairs_from_reads_a_workbook(tmp_path):
    pytest.importorskip("openpyxl")
    ROWS.to_excel(tmp_path / "faq.xlsx", index=False)
    assert pairs_from(tmp_path / "faq.xlsx")["answer"].tolist() == ROWS["response"].tolist()


def test_pairs_from_says_which_package_a_workbook_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)  # as if it were not installed
    with zipfile.ZipFile(tmp_path / "faq.csv", "w") as archive:  # and misnamed
        archive.writestr("xl/workbook.xml", "<workbook/>")
        archive.writestr("xl/styles.xml", "<styles/>")
    with pytest.raises(ValueError, match="faq.csv.*pip install openpyxl"):
        pairs_from(tmp_path / "faq.csv")


def test_pairs_from_guesses_no_encoding_that_cannot_be_told(tmp_path):
    (tmp_path / "rows.csv").write_bytes(as_csv("cp850")(rows_of(*FRENCH)))
    with pytest.raises(ValueError, match="rows.csv.*line 2.*UTF-8"):
        pairs_from(tmp_path / "rows.csv")


@pytest.mark.parametrize("change", [lambda frame: frame.astype("string"), lambda frame: frame.map(str.encode),
                                    lambda frame: frame.astype("category"), lambda frame: frame.set_axis([0] * 20)])
def test_pairs_from_reads_any_kind_of_text_column(change):
    frame = rows_of(*POLISH)
    assert pairs_from(change(frame))["answer"].tolist() == frame["answer"].tolist()


# --- shapes of rows --------------------------------------------------------------------------------------------------


def test_pairs_from_puts_the_task_before_its_input():
    frame = rows_of("Answer for ward {i}.", "Rest for {i} days.", ("instruction", "output")).assign(input="Which dose?")
    assert pairs_from(frame)["question"][3] == "Answer for ward 3. Which dose?"


def test_pairs_from_takes_one_text_out_of_a_list_and_refuses_dictionaries(tmp_path):
    frame = rows_of(*ENGLISH)
    lists = frame.assign(answer=[[text] for text in frame["answer"]])
    lists.to_parquet(tmp_path / "lists.parquet")  # an array per cell
    lists.to_csv(tmp_path / "lists.csv", index=False)  # a Python literal per cell
    for source in (lists, tmp_path / "lists.parquet", tmp_path / "lists.csv"):
        assert pairs_from(source)["answer"].tolist() == frame["answer"].tolist()
    squad = frame.assign(answer=[{"text": [text], "start": [0]} for text in frame["answer"]])
    squad.to_csv(tmp_path / "squad.csv", index=False)
    for source in (squad, tmp_path / "squad.csv"):
        with pytest.raises(ValueError, match="'answer' holds lists or dictionaries"):
            pairs_from(source)


@pytest.mark.parametrize(
    "text",
    [
        "A 2.5-year-old child takes 0.5 mg. E. coli, C. difficile and H. pylori were found.",
        "2.5-year-old children need 1.5 ml of it.",
        "E. coli causes it, p<0.05.",
        "B. Cereus is meant",
    ],
)
def test_pairs_from_keeps_decimals_and_abbreviated_genera(text):
    frame = rows_of(*ENGLISH)
    frame.loc[0] = text
    frame.loc[1, "answer"] = text
    pairs = pairs_from(frame)
    assert pairs["question"][0] == pairs["answer"][0] == pairs["answer"][1] == text


# --- how few, how many -----------------------------------------------------------------------------------------------


def test_pairs_from_names_the_smallest_number_that_works():
    with pytest.raises(ValueError, match="8 of 8 are usable; expected 10") as error:
        pairs_from(rows_of(*ENGLISH, n=8))
    assert "\n" not in str(error.value)
    assert split_pairs(pairs_from(rows_of(*ENGLISH, n=10))).num_rows == {"train": 8, "validation": 1, "test": 1}


def test_split_of_a_thousand_own_rows_of_one_group_says_so():
    pairs = pairs_from(rows_of(*ENGLISH, n=1000).assign(ward="A"), group="ward")
    with pytest.raises(ValueError, match="All 1000 pairs are in 1 group"):
        split_pairs(pairs)


def test_groups_by_signs_stay_apart_and_whole():
    frame = rows_of(*ENGLISH, n=40).assign(kind=["+", "-", "A+", "B", "\u2640"] * 8)
    pairs = pairs_from(frame, group="kind")
    assert pairs.groupby(frame["kind"])["group"].nunique().tolist() == [1] * 5 and pairs["group"].nunique() == 5


# --- what shares a group ---------------------------------------------------------------------------------------------

LONG = "Rest in bed, drink water often, and see a doctor if the fever is still high after three days."


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (LONG, f"Colds pass by themselves. {LONG} Children should not take aspirin without advice.", True),
        (LONG, LONG.upper(), True),
        (LONG, LONG.replace("three", "four"), True),
        (LONG, f"{LONG[:30]} as all who {LONG[30:60]} should", False),
        ("Drink water.", f"Drink water. {LONG}", False),  # under eight words: coincidence
        ("这种疾病的患者应当卧床休息多喝水并且避免劳累", "这种疾病的患者应当卧床休息多喝水并且避免劳累。请咨询医生。", True),
        ("โรคนี้ต้องพักผ่อนมากๆ และดื่มน้ำให้เพียงพอ", "โรคนี้ต้องพักผ่อนมากๆ และดื่มน้ำให้เพียงพอ ไปพบแพทย์", True),
        ("以上都是", "以上都是", False),
    ],
)
def test_pairs_from_groups_contained_and_nearly_equal_answers(first, second, together):
    frame = rows_of(*ENGLISH)
    frame.loc[[4, 9], "answer"] = [first, second]
    pairs = pairs_from(frame)
    assert (pairs["group"][4] == pairs["group"][9]) is together
    assert pairs["group"].nunique() == 20 - together


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("पानी क्या है?", "पीना क्या है?"),  # Hindi: vowel signs are combining marks
        ("\u0645\u064e\u0644\u0650\u0643 \u061f", "\u0645\u0650\u0644\u0652\u0643 \u061f"),  # Arabic: king, property
        ("ọkọ̀ ni?", "ọkọ́ ni?"),  # Yoruba: vehicle, hoe
        ("ภาษีคือ", "ภาษาคือ"),  # Thai
    ],
)
def test_pairs_from_tells_words_apart_that_differ_in_marks_alone(one, other):
    assert text_key(one) != text_key(other)
    frame = rows_of(*ENGLISH)
    frame.loc[[0, 1], "question"] = [one, other]
    frame.loc[[0, 1], "answer"] = "Yes, it is."
    pairs = pairs_from(frame)
    assert len(pairs) == 20 and pairs["group"].nunique() == 20


# --- chosen once, for all notebooks ----------------------------------------------------------------------------------


def test_prepare_splits_takes_a_table_that_the_settings_name(monkeypatch, tmp_path):
    ROWS.to_csv(tmp_path / "faq.csv", index=False)
    monkeypatch.setenv("MEDQA_DATA_DIR", str(tmp_path / "faq.csv"))
    made = prepare_splits(home=tmp_path)
    assert hash_splits(made) == hash_splits(split_pairs(pairs_from(ROWS)))
    [manifest] = tmp_path.glob("data/*/group/manifest.json")
    assert json.loads(manifest.read_text())["sources"] == {"own": {"origin": "faq.csv", "rows": 30}}
