"""The page to read after an answer: of the nearest training question that names a disease, or none."""

from datasets import Dataset, DatasetDict

from medqa_lib.data import save_splits
from medqa_lib.publish import demo
from medqa_lib.publish.sources import Sources

TRAIN = Dataset.from_dict({
    "question": ["What are the symptoms of gout ?", "What causes Marfan <syndrome> & co ?", "Which drug?\nA. x\nB. y"],
    "answer": ["Gout hurts 4 joints.", "Mutations in the FBN1 gene.", "x"],
    "focus_area": ["Gout", "Marfan <syndrome> & co", ""],
})  # fmt: skip


def test_find_gives_the_disease_of_the_nearest_question_and_none_if_it_is_far():
    sources = Sources(TRAIN)
    assert sources.find("what are symptoms of gout").title == "Gout"
    assert sources.find("Which drug?") is None  # names no disease
    assert sources.find("How do I bake bread?") is None
    link = sources.find("What causes Marfan syndrome?").link()
    assert "query=Marfan+%3Csyndrome%3E+%26+co" in link and "Marfan &lt;syndrome&gt; &amp; co" in link


def test_of_home_reads_splits_of_real_data_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    assert Sources.of_home() is None
    splits = DatasetDict(train=TRAIN)
    for name, origin in (("a", "kaggle.com/x"), ("b", "bundled sample")):
        save_splits(splits, tmp_path / "data" / name / "group", {"sources": {"medquad": {"origin": origin}}})
    assert len(Sources.of_home().rows) == 2


def test_list_facts_leaves_out_what_the_source_states():
    answer = "In an autosomal recessive pattern. Mutations in the HBB gene; 1,000,000 people, 2.5 a year."
    assert demo.list_facts(answer, "HBB gene, 2.5") == "inheritance recessive; number 1,000,000"
    assert demo.list_facts("Rest.", "") == "none found"
