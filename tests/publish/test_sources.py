"""The page to read after an answer: on the disease that the question names, if training rows are about it."""

from datasets import Dataset, DatasetDict

from medqa_lib.data import save_splits
from medqa_lib.publish import demo, sources

TRAIN = Dataset.from_dict({
    "question": ["What are the symptoms of gout ?", "What is gout ?", "What causes it ?", "Which drug?\nA. x\nB. y"],
    "answer": ["It hurts 4 joints.", "An illness.", "A gene.", "x"],
    "focus_area": ["Gout", "Gout", "Marfan & <co>", ""],
    "group": ["a", "a", "b", "c"],
})  # fmt: skip


def test_find_disease_gives_the_longest_name_that_the_question_says():
    diseases = ["Anemia", "iron deficiency anemia", "Marfan & <co>"]
    assert sources.find_disease("Is Iron Deficiency Anemia common?", diseases) == "iron deficiency anemia"
    assert sources.find_disease("Is it anemia, pernicious?", diseases) == "Anemia"
    assert sources.find_disease("How are anemias treated?", diseases) == ""
    link = sources.link(sources.find_disease("what is marfan & <co>?", diseases))
    assert "query=Marfan+%26+%3Cco%3E" in link and "Marfan &amp; &lt;co&gt;" in link


def test_read_training_reads_splits_of_real_data_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    assert sources.read_training() is None
    for name, origin in (("a", "kaggle.com/x"), ("b", "bundled sample")):
        about = {"sources": {"medquad": {"origin": origin}}}
        save_splits(DatasetDict(train=TRAIN), tmp_path / "data" / name / "group", about)
    training = sources.read_training()
    assert training.diseases == {"Gout": "It hurts 4 joints.\nAn illness.", "Marfan & <co>": "A gene."}
    assert [each.text for each in training.index.find(["gout symptoms"])[0]] == ["It hurts 4 joints.", "An illness."]


def test_list_facts_leaves_out_what_the_source_states():
    answer = "In an autosomal recessive pattern. Mutations in the HBB gene; 1,000,000 people, 2.5 a year."
    assert demo.list_facts(answer, "HBB gene, 2.5") == "inheritance recessive; number 1,000,000"
    assert demo.list_facts("Rest.", "") == "none found"
