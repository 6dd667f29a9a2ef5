"""Rows of two tokenizers hold the same piece of text, and nothing else."""

import pytest
import torch
from transformers import PreTrainedTokenizer

from modxfer_fast.data import tokenizer_digest
from modxfer_fast.transfer import PAIRINGS, PairedBatch, Pairing, TransferError
from tests.transfer_inputs import TEXTS, byte_level, sentencepiece_like, wordpiece

TOKENIZERS = {"wordpiece": wordpiece(), "bytes": byte_level(), "unigram": sentencepiece_like()}
WORDPIECE, BYTES = TOKENIZERS["wordpiece"], TOKENIZERS["bytes"]


def only_batch(examples, teacher, student, kind="words", **options):
    batches = Pairing(kind, batch_size=len(examples), **options).batches(examples, teacher, student)
    assert len(batches) == 1
    return batches[0]


def row_ids(batch, side):
    """Ids of the tokens of each row."""
    pool = getattr(batch, f"{side}_pool")
    flat = getattr(batch, f"{side}_inputs")["input_ids"].flatten()
    return [row.tolist() for row in flat[pool.tokens].tensor_split(pool.starts[1:])]


def row_texts(batch, tokenizer, side):
    """Text of each row without spaces."""
    texts = [tokenizer.decode(ids).replace(" ", "") for ids in row_ids(batch, side)]
    return [text.replace("##", "") for text in texts]


@pytest.mark.parametrize("kind", PAIRINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_tokenizer_keeps_every_token(kind, name):
    batch = only_batch(TEXTS, TOKENIZERS[name], TOKENIZERS[name], kind)
    assert batch.counts.kept_fraction == 1.0
    ids = batch.student_inputs["input_ids"]
    if kind == "positions":
        expected = batch.student_inputs["attention_mask"].flatten()
    else:
        # TEXTS hold no unknown characters
        expected = ~torch.isin(ids.flatten(), torch.tensor(TOKENIZERS[name].all_special_ids))
    assert batch.student_pool.tokens.tolist() == expected.nonzero().flatten().tolist()
    assert torch.equal(batch.student_pool.tokens, batch.teacher_pool.tokens)


@pytest.mark.parametrize("kind", ["words", "spans"])
@pytest.mark.parametrize("teacher", TOKENIZERS)
@pytest.mark.parametrize("student", TOKENIZERS)
def test_rows_spell_the_same_text(kind, teacher, student):
    batch = only_batch(TEXTS[:2], TOKENIZERS[teacher], TOKENIZERS[student], kind)
    theirs = row_texts(batch, TOKENIZERS[teacher], "teacher")
    mine = row_texts(batch, TOKENIZERS[student], "student")
    assert theirs == mine
    assert "".join(mine) == "".join(TEXTS[:2]).replace(" ", "")
    if kind == "words":
        assert mine == " ".join(TEXTS[:2]).split()
    assert batch.counts.kept_fraction == 1.0


def test_spans_are_finer_than_words_and_never_split_a_token():
    words = only_batch(TEXTS, WORDPIECE, BYTES, "words").counts
    spans = only_batch(TEXTS, WORDPIECE, BYTES, "spans").counts
    assert words.rows == sum(len(text.split()) for text in TEXTS)
    assert words.rows < spans.rows < spans.student_tokens
    assert words.kept_tokens == spans.kept_tokens == spans.student_tokens


def test_spans_cut_scripts_without_spaces():
    text = "猫は静かに歩く"
    batch = only_batch([text], wordpiece(texts=[text]), sentencepiece_like(60, [text]), "spans")
    assert batch.counts.rows > 1
    assert only_batch([text], WORDPIECE, BYTES, "words").counts.rows == 1


def test_pooled_values_are_means_by_hand():
    batch = only_batch(["unbelievable fox"], WORDPIECE, BYTES)
    shape = batch.student_inputs["input_ids"].shape
    features = torch.randn(*shape, 5, dtype=torch.float64)
    ends = [end for _, end in BYTES("unbelievable fox").encodings[0].offsets]
    first = [i for i, end in enumerate(ends) if 0 < end <= 12]
    second = [i for i, end in enumerate(ends) if end > 12]
    expected = torch.stack([features[0, first].mean(0), features[0, second].mean(0)])
    torch.testing.assert_close(batch.student_pool(features), expected, rtol=1e-14, atol=1e-14)

    first_only = only_batch(["unbelievable fox"], WORDPIECE, BYTES, pooling="first")
    assert torch.equal(first_only.student_pool(features), features[0, [first[0], second[0]]])
    assert first_only.counts == batch.counts


def test_half_precision_is_pooled_in_fp32():
    batch = only_batch(["unbelievable fox"], WORDPIECE, BYTES)
    features = torch.randn(*batch.student_inputs["input_ids"].shape, 5).bfloat16()
    pooled = batch.student_pool(features)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, batch.student_pool(features.float()))


@pytest.mark.parametrize("kind", PAIRINGS)
def test_padding_and_special_tokens_are_never_rows(kind):
    texts = ["fox", "the lazy dog jumps over the quick brown fox"]
    batch = only_batch(texts, WORDPIECE, BYTES, kind)
    for side, tokenizer in (("teacher", WORDPIECE), ("student", BYTES)):
        ids = [i for row in row_ids(batch, side) for i in row]
        assert ids
        assert not {*tokenizer.all_special_ids} & {*ids}
        inputs, pool = getattr(batch, f"{side}_inputs"), getattr(batch, f"{side}_pool")
        assert inputs["attention_mask"].flatten()[pool.tokens].all()
        assert not inputs["attention_mask"].all()


def test_an_insertion_shifts_positions_but_not_words():
    text = "the lazy dog jumps over the quick brown fox"
    teacher = wordpiece(texts=[text, "xyz xyz"], vocab_size=200)
    student = wordpiece(texts=[text, "x xx y yy z zz"], vocab_size=200)
    longer = f"the xyz {text}"
    assert (teacher.tokenize("xyz"), len(student.tokenize("xyz"))) == (["xyz"], 3)
    assert only_batch([text], teacher, student, "positions").counts.kept_fraction == 1.0
    assert only_batch([longer], teacher, student, "positions").counts.kept_tokens == 1
    words = only_batch([longer], teacher, student, "words").counts
    assert words.kept_fraction == 1.0
    assert words.rows == len(longer.split())


def test_positions_spell_marked_vocabularies_like_wordpiece():
    teacher = byte_level(400, ["a ab ab ab cd cd cd xab"])
    student = wordpiece(200, ["ab xab cd"])
    assert teacher.tokenize("ab cd xab") == ["ab", "\u0120cd", "\u0120xab"]  # no mark at the front
    batch = only_batch(["ab cd xab"], teacher, student, "positions")
    assert row_texts(batch, student, "student") == ["cd", "xab"]  # nor is <s> a [CLS]
    assert batch.counts == (1, 2, 3, 2)


def test_words_that_are_given():
    words = ["New York", "is", "", "big", "."]
    batch = only_batch([words], WORDPIECE, BYTES)
    assert row_texts(batch, BYTES, "student") == ["NewYork", "is", "big", "."]
    assert batch.counts.rows == 4


def test_a_token_over_several_words_joins_them():
    joined = byte_level(texts=["a b"], vocab_size=400)
    joined.add_tokens(["is big"])
    batch = only_batch([["fox", "is", "big", "."]], WORDPIECE, joined)
    assert row_texts(batch, WORDPIECE, "teacher") == ["fox", "isbig", "."]


def test_pairs_of_texts():
    pairs = [("the lazy dog", "a quick fox"), ("an elephant", "the river and the mill")]
    batch = only_batch(pairs, WORDPIECE, BYTES)
    expected = [word for pair in pairs for text in pair for word in text.split()]
    assert row_texts(batch, BYTES, "student") == expected
    assert row_texts(batch, WORDPIECE, "teacher") == expected
    assert batch.counts.kept_fraction == 1.0


@pytest.mark.parametrize("swap", [False, True])
def test_a_word_that_truncation_cuts_is_dropped_on_both_sides(swap):
    text = "the dog unbelievable fox"
    sides = (WORDPIECE, BYTES) if swap else (BYTES, WORDPIECE)
    ends = [end for _, end in WORDPIECE(text).encodings[0].offsets]
    inside = next(i for i, end in enumerate(ends) if end > 10)  # in the middle of the third word
    batch = only_batch([text], *sides, max_length=inside + 2)
    assert row_texts(batch, BYTES, "teacher" if not swap else "student") == ["the", "dog"]
    assert 0 < batch.counts.kept_fraction < 1
    assert batch.counts.student_tokens == len(sides[1].tokenize(text))


def test_a_character_of_several_tokens_is_not_cut_in_its_middle():
    text = "fox 🦊"
    num_tokens = len(BYTES(text)["input_ids"])
    batch = only_batch([text], BYTES, BYTES, "spans", max_length=num_tokens - 1)
    assert "".join(row_texts(batch, BYTES, "student")) == "fox"
    assert "".join(row_texts(only_batch([text], BYTES, BYTES), BYTES, "student")) == "fox🦊"


def test_truncated_pairs_keep_what_is_whole():
    pair = ("the dog", "the quick brown fox jumps over the lazy unbelievable elephant")
    batch = only_batch([pair], WORDPIECE, WORDPIECE, max_length=20)
    rows = row_texts(batch, WORDPIECE, "student")
    words = [*pair[0].split(), *pair[1].split()]
    assert rows == words[: len(rows)]
    assert 2 < len(rows) < len(words)


def test_batches_come_in_order_and_again():
    batches = Pairing(batch_size=2).batches(TEXTS, WORDPIECE, BYTES)
    assert len(batches) == 3
    assert [batch.counts.examples for batch in batches] == [2, 2, 1]
    first, again = list(batches), list(batches)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.student_inputs["input_ids"], other.student_inputs["input_ids"])
        assert torch.equal(one.student_pool.tokens, other.student_pool.tokens)
    rows = [row for batch in first for row in row_texts(batch, BYTES, "student")]
    assert rows == " ".join(TEXTS).split()


def test_facts_tell_tokenizers_apart():
    facts = Pairing("spans", "first", 32, 2).batches(TEXTS, WORDPIECE, BYTES).facts
    assert facts == {
        "pairing": "spans",
        "pooling": "first",
        "max_length": 32,
        "batch_size": 2,
        "teacher_tokenizer": tokenizer_digest(WORDPIECE),
        "student_tokenizer": tokenizer_digest(BYTES),
    }
    assert facts["teacher_tokenizer"] != facts["student_tokenizer"]


def test_a_batch_of_ids_pairs_what_the_mask_leaves():
    ids = torch.arange(6).view(2, 3)
    batch = PairedBatch.of_ids(ids, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    features = torch.arange(12.0).view(2, 3, 2)
    assert batch.student_pool(features).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert batch.counts.kept_fraction == 1.0


class SlowTokenizer(PreTrainedTokenizer):
    def __init__(self, **kwargs):
        super().__init__(pad_token="[PAD]", **kwargs)

    vocab_size = 1

    def get_vocab(self):
        return {"[PAD]": 0}


IDS = torch.ones(2, 3, dtype=torch.int64)


def test_bad_input():
    without_padding = byte_level()
    without_padding.pad_token = None
    for make, message in (
        (lambda: PairedBatch.of_ids(IDS[0]), r"input_ids: expected shape \[B, T\], got \[3\]"),
        (lambda: PairedBatch.of_ids(IDS, IDS[:1]), r"attention_mask: expected .*, got \[1, 3\]"),
        (lambda: Pairing("sentences"), r"kind: expected one of words, spans, positions, got 'sen"),
        (lambda: Pairing(pooling="max"), r"pooling: expected one of mean, first, got 'max'"),
        (lambda: Pairing(max_length=0), r"max_length: expected at least 1, got 0"),
        (
            lambda: only_batch(["a"], BYTES, BYTES, max_length=2),
            r"max_length: .* the 2 special tok",
        ),
        (lambda: only_batch([("a", "b")], BYTES, BYTES, max_length=4), r"the 4 special tokens"),
        (lambda: only_batch(["a"], WORDPIECE, SlowTokenizer()), r"student_tokenizer: .* fast"),
        (lambda: only_batch(["a"], without_padding, BYTES), r"teacher_tokenizer: .* padding"),
        (lambda: Pairing().batches([], BYTES, BYTES), r"examples: expected at least one"),
        (lambda: only_batch(["a", 3], BYTES, BYTES), r"examples\[1\]: .* got int"),
        (lambda: only_batch([["a", None]], BYTES, BYTES), r"examples\[0\]: .* got NoneType, str"),
        (lambda: only_batch([("a", "b", "c")], BYTES, BYTES), r"tuple of two texts.*got 3"),
        (lambda: only_batch(["a", ("a", "b")], BYTES, BYTES), r"only pairs or only single"),
    ):
        with pytest.raises(TransferError, match=message):
            make()
