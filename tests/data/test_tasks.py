"""Tasks: files and hub corpora, splits, labels, encoding, scores, and errors that name the line."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from pydantic import ValidationError
from tokenizers import Regex, pre_tokenizers

from modxfer_fast.config.task import SPLITS, TaskSection
from modxfer_fast.data import DataError
from modxfer_fast.data.tasks import (
    check_task_tokenizer,
    encode_task,
    entity_scores,
    hub,
    load_task,
    load_task_tokenizer,
    task_collator,
    task_scores,
)
from tests.task_inputs import (
    NER_LABELS,
    SICK_COLUMNS,
    byte_tokenizer,
    sentences,
    word_tokenizer,
    write_conllu,
    write_pairs,
)


def ner(path, **options) -> TaskSection:
    return TaskSection(kind="ner", source=str(path), **options)


def all_texts(data):
    return [text for split in SPLITS for text in data.texts(split)]


def pairs(path, **options) -> TaskSection:
    return TaskSection(kind="nli", source=str(path), columns=SICK_COLUMNS, **options)


# --- local files


def test_conllu_file_is_split_by_seed(tmp_path):
    examples = sentences(50)
    path = write_conllu(tmp_path / "en.conllu", examples)
    data = load_task(ner(path, language="en"))
    assert data.labels == NER_LABELS
    assert [len(data.split(name)) for name in SPLITS] == [40, 5, 5]
    found = [
        (row["words"], [data.labels[tag] for tag in row["tags"]])
        for name in SPLITS
        for row in data.split(name)
    ]
    assert sorted(found) == sorted(examples)
    assert load_task(ner(path, language="en")).digest() == data.digest()
    assert load_task(ner(path, split_seed=1)).digest() != data.digest()


def test_conllu_comments_ranges_and_words_that_look_like_comments(tmp_path):
    path = tmp_path / "train.conllu"
    path.write_text("# text = x\n1-2\tdu\tO\n1\t#\tO\n2\tlima\tB-LOC\n\n1\ta\tO\n\n\n1\tb\tO")
    data = load_task(ner(path))
    assert sorted(all_texts(data)) == [["#", "lima"], ["a"], ["b"]]


def test_conll_columns_by_spaces(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("-DOCSTART- -X- O\n\nlima NNP B-LOC\n# NN O\n\na DT O\n\nb DT O\n")
    data = load_task(ner(path))
    assert ["lima", "#"] in all_texts(data)
    assert data.labels == ("O", "B-LOC", "I-LOC")
    reordered = tmp_path / "other.conll"
    reordered.write_text("O lima\n\nB-LOC rome\n\nO a\n")
    data = load_task(ner(reordered, columns={"words": 1, "tags": 0}))
    assert data.labels == ("O", "B-LOC", "I-LOC")


def test_sick_table(tmp_path):
    data = load_task(pairs(write_pairs(tmp_path / "SICK_train.txt", 20)))
    assert data.labels == ("ENTAILMENT", "NEUTRAL")
    assert len(data.train) == 16
    row = data.train[0]
    assert (row["text_a"] == row["text_b"]) == (data.labels[row["label"]] == "ENTAILMENT")
    assert data.texts()[0] == (row["text_a"], row["text_b"])


def test_one_file_per_split_keeps_their_order(tmp_path):
    for name, count in (("train", 10), ("dev", 4), ("test", 3)):
        write_pairs(tmp_path / f"{name}.tsv", count, seed=count)
    data = load_task(pairs(tmp_path))
    assert [len(data.split(name)) for name in SPLITS] == [10, 4, 3]
    named = TaskSection(
        kind="nli",
        files={"train": [str(tmp_path / "train.tsv")], "test": str(tmp_path / "test.tsv")},
        columns=SICK_COLUMNS,
    )
    held_out = load_task(named)
    assert [len(held_out.split(name)) for name in SPLITS] == [9, 1, 3]
    assert held_out.texts("test") == data.texts("test")


def test_csv_quotes_and_tsv_does_not(tmp_path):
    rows = ['"x, y",z,1', '"a ""b""",c,0'] * 3
    (tmp_path / "a.csv").write_text("text_a,text_b,label\n" + "\n".join(rows))
    data = load_task(TaskSection(kind="paraphrase", source=str(tmp_path / "a.csv")))
    assert set(all_texts(data)) == {("x, y", "z"), ('a "b"', "c")}
    (tmp_path / "a.tsv").write_text('text_a\ttext_b\tlabel\n"x\tz"\t1\n' + 'a\t"c\t0\n' * 3)
    data = load_task(TaskSection(kind="paraphrase", source=str(tmp_path / "a.tsv")))
    assert ('"x', 'z"') in all_texts(data)


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "lines"])
def test_json_with_ids_for_labels(tmp_path, as_list):
    rows = [{"tokens": words, "ner": [0] * len(words)} for words, _ in sentences(9)]
    rows.append({"tokens": ["lima"], "ner": [1]})
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)))
    columns = {"words": "tokens", "tags": "ner"}
    data = load_task(ner(path, columns=columns, labels=list(NER_LABELS)))
    assert data.labels == NER_LABELS
    assert [1] in [row["tags"] for split in SPLITS for row in data.split(split)]


def test_folder_saved_by_datasets(tmp_path):
    classes = ClassLabel(names=list(NER_LABELS))
    features = Features({"words": List(Value("string")), "tags": List(classes)})
    rows = Dataset.from_dict({"words": [["lima", "a"]] * 12, "tags": [[1, 0]] * 12}, features)
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    data = load_task(ner(tmp_path / "saved"))
    assert data.labels == NER_LABELS
    assert list(data.test["tags"]) == [[1, 0]] * 12
    assert len(data.train) == 11
    other = rows.cast_column("tags", List(ClassLabel(names=["O", "B-X", "I-X", "Y", "Z"])))
    DatasetDict({"train": rows, "test": other}).save_to_disk(str(tmp_path / "differing"))
    with pytest.raises(DataError, match=r"labels of train in test, O, B-LOC.*got O, B-X"):
        load_task(ner(tmp_path / "differing"))


# --- limits


def test_fractions_are_nested(tmp_path):
    path = write_pairs(tmp_path / "a.tsv", 500)
    whole = load_task(pairs(path)).texts()
    shares = {f: load_task(pairs(path, train_fraction=f)).texts() for f in (0.01, 0.1, 1.0)}
    assert [len(shares[f]) for f in shares] == [4, 40, 400]
    assert shares[1.0] == whole

    def places(texts):
        return {i for i, text in enumerate(whole) if text in texts}

    assert places(shares[0.01]) <= places(shares[0.1])
    limited = load_task(pairs(path, train_fraction=0.5, max_train_examples=80))
    assert len(limited.train) == 40
    assert places(shares[0.1]) == places(limited.texts())
    other = load_task(pairs(path, train_fraction=0.1, split_seed=1))
    assert other.texts() != shares[0.1]


def test_limits_of_held_out_examples(tmp_path):
    path = write_pairs(tmp_path / "a.tsv", 100)
    data = load_task(pairs(path, max_validation_examples=3, max_test_examples=50))
    assert (len(data.validation), len(data.test), len(data.train)) == (3, 10, 80)
    assert data.facts()["train_examples"] == 80
    assert set(data.texts("validation")) <= set(load_task(pairs(path)).texts("validation"))


# --- malformed files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\ta\tO\n1\tb\n", r"train\.conllu:2: expected 3 columns, got '1\\tb'"),
        ("0\ta\tO\n\n0\t\tO\n", r":3: expected a word and its tag"),
        ("0\ta\tO\n\n0\tb\tLOC\n", r":3: expected O or a tag such as B-PER for 'b', got 'LOC'"),
        ("a\tO\n", r":1: expected words and tags in different columns, got 1 and -1"),
        ("", r"expected examples in train, got none"),
        ("0\ta\tO\n\n0\tb\tB-X\n", r"expected at least 3 examples to hold out"),
    ],
    ids=["columns", "no-word", "tag", "one-place", "empty", "too-few"],
)
def test_malformed_conll(tmp_path, text, message):
    path = tmp_path / "train.conllu"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(ner(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text_a\ttext_b\nx\ty\n", r":1: expected columns text_a, text_b, label, got text_a"),
        ("text_a\ttext_b\tlabel\nx\ty\n", r":2: expected 3 columns as in the header, got 2"),
        ("text_a\ttext_b\tlabel\nx\t\t1\n", r":2: expected text in 'text_b', got ''"),
        ("text_a\ttext_b\tlabel\nx\ty\t\n", r":2: expected a label in 'label', got ''"),
        ("text_a\ttext_b\tlabel\n" + "x\ty\t1\n" * 9, r"expected at least 2 labels"),
    ],
    ids=["header", "columns", "text", "label", "one-label"],
)
def test_malformed_table(tmp_path, text, message):
    path = tmp_path / "a.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(TaskSection(kind="nli", source=str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"words": ["a"], "tags": ["O", "O"]}',
            r"expected as many tags as words.*got 2 and 1",
        ),
        ('{"words": "a", "tags": ["O"]}', r"expected a list in 'words', got str"),
        ('{"words": ["a"]}', r"expected 'tags', got 'words'"),
        ('{"words": [1], "tags": ["O"]}', r"expected text in 'words', got 1"),
        ('{"words": ["a"], "tags": [true]}', r"expected a label in 'tags', got True"),
        ('{"words"', r"expected JSON, got '\{\"words\"'"),
        ("3", r"expected an object, got int"),
    ],
)
def test_malformed_json(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": ["a"], "tags": ["O"]}\n' + row + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: " + message):
        load_task(ner(path))


def test_files_that_are_not_there_or_not_of_the_task(tmp_path):
    with pytest.raises(DataError, match=r"absent\.tsv: no such file"):
        load_task(pairs(tmp_path / "absent.tsv"))
    with pytest.raises(DataError, match=r"expected a file named train.*got an empty folder"):
        load_task(pairs(tmp_path))
    write_pairs(tmp_path / "a.tsv")
    with pytest.raises(DataError, match="expected conll or json for ner, got tsv"):
        load_task(ner(tmp_path / "a.tsv"))
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(DataError, match=r"expected an ending among.*got \.xyz"):
        load_task(ner(tmp_path / "a.xyz"))
    (tmp_path / "bytes.conll").write_bytes(b"\xff\xfe\xfa O\n")
    with pytest.raises(DataError, match=r"bytes\.conll: cannot be read"):
        load_task(ner(tmp_path / "bytes.conll"))


# --- labels


def test_labels_that_train_lacks(tmp_path):
    write_conllu(tmp_path / "train.conllu", [(["rome"], ["B-LOC"]), (["a"], ["O"])] * 6)
    write_conllu(tmp_path / "test.conllu", [(["anna"], ["B-PER"])])
    with pytest.raises(DataError, match=r"labels of train in test, O, B-LOC, I-LOC, got B-PER"):
        load_task(ner(tmp_path))
    assert load_task(ner(tmp_path, labels=list(NER_LABELS))).labels == NER_LABELS
    with pytest.raises(DataError, match=r"train\.conllu:1: .*one of task\.labels, O, B-X, got"):
        load_task(ner(tmp_path, labels=["O", "B-X"]))


def test_inside_tags_need_not_occur_in_train(tmp_path):
    write_conllu(tmp_path / "train.conllu", [(["rome"], ["B-LOC"]), (["a"], ["O"])] * 6)
    write_conllu(tmp_path / "test.conllu", [(["rome", "rome"], ["B-LOC", "I-LOC"])])
    assert load_task(ner(tmp_path)).labels == ("O", "B-LOC", "I-LOC")


# --- the section


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "wikineural"}, "language: expected one of wikineural's de, en, .* got none"),
        ({"source": "wikineural", "language": "ja"}, "wikineural's de, en, .*, ru, got ja"),
        ({"source": "xnli", "language": "en"}, "source: expected one for ner, got xnli"),
        ({}, "expected exactly one of source and files"),
        ({"source": "a", "files": {"train": "b"}}, "expected exactly one of source and files"),
        ({"files": {"test": "b"}}, "files: expected one for train, got test"),
        ({"source": "a", "labels": ["O", "O"]}, "labels: expected different names, got O, O"),
        ({"source": "a", "columns": {"label": 1}}, "columns: expected words, tags for ner"),
        ({"source": "a", "train_fraction": 0.0}, "greater than 0"),
        (
            {"source": "wikineural", "language": "en", "format": "tsv"},
            "format: expected for local files only",
        ),
    ],
)
def test_section_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        TaskSection(kind="ner", **fields)


def test_section_of_the_hub_is_read_again():
    section = TaskSection(kind="ner", source="wikineural", language="en")
    assert TaskSection(**section.model_dump()) == section


# --- the hub


def hub_rows(path, config, split, revision):
    if path == "Babelscape/wikineural":
        assert (config, split) in [(None, f"{name}_de") for name in ("train", "val", "test")]
        return Dataset.from_dict({"tokens": [["Lima", "x"]], "ner_tags": [[5, 0]], "lang": ["de"]})
    assert config == "de"
    assert split in ("train", "validation", "test")
    columns = {
        "facebook/xnli": {"premise": ["a"], "hypothesis": ["b"], "label": [2]},
        "google-research-datasets/paws-x": {
            "sentence1": ["a", "", "c"],
            "sentence2": ["b", "x", "d"],
            "label": [1, 0, -1],
        },
    }
    return Dataset.from_dict(columns[path])


@pytest.mark.parametrize(
    ("source", "kind", "label", "dropped"),
    [
        ("wikineural", "ner", "B-LOC", 0),
        ("xnli", "nli", "contradiction", 0),
        ("paws-x", "paraphrase", "paraphrase", 6),
    ],
)
def test_hub_corpora(monkeypatch, source, kind, label, dropped):
    monkeypatch.setattr(hub, "load_dataset", hub_rows)
    data = load_task(TaskSection(kind=kind, source=source, language="de"))
    first = data.test[0]["tags"][0] if kind == "ner" else data.test[0]["label"]
    assert data.labels[first] == label
    assert data.facts()["dropped"] == dropped
    with pytest.raises(DataError, match=r"task\.labels: expected those of the data, .*, got a, b"):
        load_task(TaskSection(kind=kind, source=source, language="de", labels=["a", "b"]))


def test_hub_without_access(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"split train_nl, cannot be loaded \(no route\)"):
        load_task(TaskSection(kind="ner", source="wikineural", language="nl"))


# --- encoding


@pytest.fixture
def ner_data(tmp_path):
    examples = [(["the", "stone", "paris"], ["O", "I-PER", "B-LOC"]), (["a"], ["O"])]
    for split in SPLITS:
        write_conllu(tmp_path / f"{split}.conllu", examples)
    return load_task(ner(tmp_path, labels=list(NER_LABELS), max_length=5))


def test_first_piece_carries_the_tag_and_truncation_is_counted(tmp_path, ner_data):
    tokenizer = word_tokenizer(tmp_path)
    encoded = encode_task(ner_data, "train", tokenizer)
    # [CLS] the sto ##ne [SEP]: paris does not fit
    assert encoded.rows[0]["labels"] == [-100, 0, 4, -100, -100]
    assert encoded.rows[0]["length"] == 5
    assert encoded.labelled_words == [[0, 1], [0]]
    assert encoded.gold == [[0, 4, 1], [0]]
    assert encoded.truncated == 1


def test_words_without_a_label_token_are_scored_as_outside(tmp_path, ner_data):
    encoded = encode_task(ner_data, "train", word_tokenizer(tmp_path)).by_length()
    labels = np.full((2, 5), -100)
    for row, ids in enumerate(encoded.rows["labels"]):
        labels[row, : len(ids)] = ids
    perfect = task_scores(encoded, np.where(labels == -100, 1, labels), labels)
    # of the two entities the truncated one is missed
    assert perfect == {"f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5}


def test_by_length_keeps_rows_and_their_gold_together(tmp_path):
    write_conllu(tmp_path / "a.conllu", sentences(30))
    data = load_task(ner(tmp_path / "a.conllu"))
    encoded = encode_task(data, "train", word_tokenizer(tmp_path)).by_length()
    lengths = list(encoded.rows["length"])
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 2
    for row, gold, words in zip(encoded.rows, encoded.gold, encoded.labelled_words, strict=True):
        assert [label for label in row["labels"] if label != -100] == [gold[w] for w in words]


def test_pairs_and_padding(tmp_path):
    data = load_task(pairs(write_pairs(tmp_path / "a.tsv")))
    tokenizer = word_tokenizer(tmp_path)
    encoded = encode_task(data, "train", tokenizer)
    row, example = encoded.rows[0], data.train[0]
    ids = tokenizer(example["text_a"], example["text_b"])["input_ids"]
    assert (row["input_ids"], row["labels"]) == (ids, example["label"])
    assert 1 in row["token_type_ids"]
    columns = ("input_ids", "attention_mask", "token_type_ids", "labels")
    rows = [{name: encoded.rows[i][name] for name in columns} for i in range(4)]
    batch = task_collator("nli", tokenizer)(rows)
    assert batch["input_ids"].shape == (4, max(len(row["input_ids"]) for row in rows))
    assert torch.equal(batch["labels"], torch.tensor([row["labels"] for row in rows]))


def test_padding_of_tags(tmp_path, ner_data):
    tokenizer = word_tokenizer(tmp_path)
    encoded = encode_task(ner_data, "train", tokenizer)
    rows = [
        {name: encoded.rows[i][name] for name in ("input_ids", "attention_mask", "labels")}
        for i in range(2)
    ]
    batch = task_collator("ner", tokenizer)(rows)
    assert batch["labels"].tolist()[1] == [-100, 0, -100, -100, -100]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 0, 0]


def test_byte_level_tokenizers_put_a_space_before_words(tmp_path, ner_data):
    byte_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    loaded = load_task_tokenizer(str(tmp_path / "tokenizer"), "ner")
    words = ner_data.texts()[0]
    ids = loaded(words, is_split_into_words=True)
    assert set(ids.word_ids()) == {None, 0, 1, 2}
    assert loaded.convert_ids_to_tokens(ids["input_ids"])[1] == "Ġ"
    assert loaded.convert_ids_to_tokens(ids["input_ids"])[-6:-1] == list("paris")
    as_it_is = load_task_tokenizer(str(tmp_path / "tokenizer"), "nli")
    assert as_it_is.convert_ids_to_tokens(as_it_is("the")["input_ids"])[1] == "t"
    with pytest.raises(DataError, match="runs words together"):
        check_task_tokenizer(as_it_is, "ner")
    with pytest.raises(DataError, match="runs words together"):
        encode_task(ner_data, "train", as_it_is)


def test_spaces_before_words_but_not_before_their_parts(tmp_path):
    tokenizer = byte_tokenizer()
    split = pre_tokenizers.Split(Regex("'s| ?[a-z]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    running = tokenizer("it's", add_special_tokens=False)["input_ids"]
    space = tokenizer.convert_tokens_to_ids("Ġ")
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_task_tokenizer(str(tmp_path), "ner")
    ids = loaded(["it's", "it's"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert ids == [space, *running] * 2


def test_tokenizers_that_cannot_serve(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_task_tokenizer("./absent", "ner")
    tokenizer = byte_tokenizer(prefix_space=True)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(tmp_path / "unpadded"))
    assert load_task_tokenizer(str(tmp_path / "unpadded"), "ner").pad_token == "</s>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(tmp_path / "endless"))
    with pytest.raises(DataError, match="expected a padding or end-of-text token, got neither"):
        load_task_tokenizer(str(tmp_path / "endless"), "ner")


# --- scores


def test_entity_scores_need_type_and_both_borders():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-PER", "O", "B-LOC"]]
    # of 3 entities 1 is found, among 4 predicted
    scores = entity_scores(gold, predicted)
    assert scores == {
        "f1": pytest.approx(2 / 7),
        "precision": pytest.approx(1 / 4),
        "recall": pytest.approx(1 / 3),
    }
    assert entity_scores(gold, gold)["f1"] == 1.0
    assert entity_scores(gold, [["O"] * 4, ["O"] * 3])["f1"] == 0.0
    nothing = [["O"] * 4]
    assert entity_scores(nothing, nothing) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_entity_scores_of_iobes_tags():
    gold = [["B-PER", "E-PER", "S-PER", "O", "S-LOC"]]
    assert entity_scores(gold, gold)["f1"] == 1.0
    one_long = [["B-PER", "I-PER", "E-PER", "O", "B-LOC"]]
    assert entity_scores(gold, one_long) == {
        "f1": pytest.approx(2 / 5),  # LOC alone, of 3 entities, among 2 predicted
        "precision": pytest.approx(1 / 2),
        "recall": pytest.approx(1 / 3),
    }
    # a predicted inside that continues nothing begins an entity
    assert entity_scores([["O", "B-PER"]], [["O", "E-PER"]])["f1"] == 1.0
