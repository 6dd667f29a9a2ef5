"""A cache gives back what was written, or says which shard and row it cannot give."""

import pickle
import shutil

import pytest
import torch

from modxfer_fast.teacher_cache import CacheError, Document, Payload, TeacherCache, key_of

WIDTH, K = 6, 3
BOTH = Payload("bfloat16", WIDTH, K)
TEACHER = {"weights": "abc", "tokenizer": "def"}


def document(*ids):
    ids = torch.tensor(ids, dtype=torch.int32)
    return Document(key_of(ids), 0, 0, ids)


def answer(document, payload=BOTH):
    generator = torch.Generator().manual_seed(int(document.ids.sum()))
    n = len(document.ids)
    made = {
        "hidden": torch.randn(n, WIDTH, generator=generator).bfloat16(),
        "topk_ids": torch.randint(0, 9, (n, K), generator=generator, dtype=torch.int32),
        "topk_log_probs": torch.randn(n, K, generator=generator),
        "topk_log_tail": torch.randn(n, 1, generator=generator),
    }
    return {name: made[name] for name in payload.tensors()}


DOCUMENTS = [document(1, 2, 3), document(4), document(5, 6, 7, 8, 9)]


def filled(folder, payload=BOTH):
    cache = TeacherCache.create(folder, payload, TEACHER, {"weight": torch.eye(4)})
    cache.write([(d, answer(d, payload)) for d in DOCUMENTS[:2]])
    cache.write([(DOCUMENTS[2], answer(DOCUMENTS[2], payload))])
    return cache


def assert_whole(cache, payload=BOTH):
    assert len(cache) == len(DOCUMENTS)
    assert cache.num_tokens == 9
    for each in DOCUMENTS:
        found, expected = cache.read(each), answer(each, payload)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("payload", [BOTH, Payload(top_k=K), Payload("bfloat16", WIDTH)], ids=str)
def test_what_was_written_is_read(tmp_path, payload):
    cache = filled(tmp_path / "cache", payload)
    assert_whole(cache, payload)
    again = TeacherCache(tmp_path / "cache")
    assert_whole(again, payload)
    assert torch.equal(again.head()["weight"], torch.eye(4))
    assert again.teacher == TEACHER
    assert again.damaged() == []


def test_workers_of_a_loader_have_copies(tmp_path):
    cache = filled(tmp_path / "cache")
    cache.read(DOCUMENTS[0])  # maps a file
    assert_whole(pickle.loads(pickle.dumps(cache)))


def test_bytes_per_token_are_those_on_disk(tmp_path):
    payload = Payload("float32", 64, 16)
    assert payload.bytes_per_token() == 4 + 4 * 64 + 8 * 16 + 4
    ids = torch.arange(5000, dtype=torch.int32)
    long = Document(key_of(ids), 0, 0, ids)
    answers = {
        name: torch.zeros(5000, width, dtype=dtype)
        for name, (width, dtype) in payload.tensors().items()
    }
    cache = TeacherCache.create(tmp_path / "cache", payload, TEACHER, {})
    size = (cache.write([(long, answers)]) / "answers.safetensors").stat().st_size
    assert size == pytest.approx(5000 * payload.bytes_per_token(), rel=1e-3)


def attempted(cache, document):
    """What is read of a document, or why it is not."""
    try:
        return cache.read(document), ""
    except CacheError as error:
        return None, str(error)


def test_a_flipped_bit_anywhere_is_told_with_shard_and_row(tmp_path):
    path = filled(tmp_path / "cache")._shards[0].path
    shard = path / "answers.safetensors"
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    noticed, place = 0, f"teacher cache, shard {path}"
    for at in range(header, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        shard.write_bytes(flipped)
        try:
            cache = TeacherCache(tmp_path / "cache")
        except CacheError as error:
            noticed += str(error).startswith(f"{place}: is damaged")
            continue
        assert cache.damaged() == [path.name]
        for index, each in enumerate(DOCUMENTS):
            found, told = attempted(cache, each)
            noticed += found is None
            # a flipped key is another document's
            assert (
                found is not None
                or told.startswith(f"{place}, row {index}: ")
                or ("no answer to a document" in told)
            )
            if found is not None:
                assert all(torch.equal(found[k], v) for k, v in answer(each).items())
    assert noticed >= (len(data) - header) // 7 - 8  # padding between tensors means nothing
    shard.write_bytes(data)
    assert_whole(TeacherCache(tmp_path / "cache"))


def test_a_shard_that_is_no_file_of_tensors_is_told(tmp_path):
    path = filled(tmp_path / "cache")._shards[0].path
    (path / "answers.safetensors").write_bytes(b"cut off")
    with pytest.raises(CacheError, match=f"shard {path}: cannot be read"):
        TeacherCache(tmp_path / "cache")


def test_a_shard_without_its_marker_is_none(tmp_path):
    cache = filled(tmp_path / "cache")
    (cache._shards[1].path / "complete.json").unlink()
    rest = TeacherCache(tmp_path / "cache")
    assert len(rest) == len(cache) - len(cache._shards[1].keys)
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(CacheError, match=r"no answer to a document of 3 tokens \(row 0 of the"):
        TeacherCache(tmp_path / "cache").read(DOCUMENTS[0])


def test_a_shard_whose_marker_is_damaged_is_written_again(tmp_path):
    cache = filled(tmp_path / "cache")
    marker = cache._shards[0].path / "complete.json"
    marker.write_bytes(b"\0" + marker.read_bytes()[1:])
    rest = TeacherCache(tmp_path / "cache")
    lost = [d for d in DOCUMENTS if d.key not in rest]
    assert len(lost) in (1, 2)
    rest.write([(d, answer(d)) for d in lost])
    assert len(rest) == len(DOCUMENTS)
    assert_whole(TeacherCache(tmp_path / "cache"))


def test_shards_that_others_are_writing_are_left_alone(tmp_path):
    cache = filled(tmp_path / "cache")
    shard = cache._shards[0].path
    shutil.copytree(shard, shard.with_name(f".{shard.name}-0123abcd.scratch"))
    assert len(TeacherCache(tmp_path / "cache")._shards) == 2


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_shard_that_is_damaged_before_its_first_read_is_told(tmp_path, damage):
    cache = filled(tmp_path / "cache")
    shard = cache._shards[0].path / "answers.safetensors"
    shard.unlink()
    if damage != "gone":
        shard.write_bytes(b"cut off")
    with pytest.raises(CacheError, match=f"shard {shard.parent}, row 0: cannot be read .*again"):
        [cache.read(d) for d in DOCUMENTS]


@pytest.mark.parametrize(
    ("payload", "name", "value"),
    [
        (Payload("float32", WIDTH), "hidden", float("nan")),
        (Payload("float16", WIDTH), "hidden", 1e5),  # above what the dtype has
        (Payload(top_k=K), "topk_log_probs", float("nan")),
        (Payload(top_k=K), "topk_log_tail", float("inf")),
    ],
)
def test_answers_that_are_no_numbers_are_refused(tmp_path, payload, name, value):
    cache = TeacherCache.create(tmp_path / "cache", payload, TEACHER, {})
    answers = {
        name: torch.zeros(3, width, dtype=torch.int32 if name == "topk_ids" else torch.float32)
        for name, (width, _) in payload.tensors().items()
    }
    answers[name][1, -1] = value
    with pytest.raises(CacheError, match=rf"expected answers that are numbers, got {name} with"):
        cache.write([(DOCUMENTS[0], answers)])
    assert len(TeacherCache(cache.folder)) == 0


def test_another_teacher_or_payload_is_refused(tmp_path):
    filled(tmp_path / "cache")
    with pytest.raises(CacheError, match="another teacher; tokenizer: expected xyz, found def"):
        TeacherCache.create(tmp_path / "cache", BOTH, {**TEACHER, "tokenizer": "xyz"}, {})
    with pytest.raises(CacheError, match="expected Payload"):
        TeacherCache.create(tmp_path / "cache", Payload(top_k=K), TEACHER, {})
    assert_whole(TeacherCache.create(tmp_path / "cache", BOTH, TEACHER, {}))


def test_a_damaged_teacher_is_told(tmp_path):
    filled(tmp_path / "cache")
    head = tmp_path / "cache" / "teacher" / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    with pytest.raises(CacheError, match=r"teacher is damaged \(head.safetensors\)"):
        TeacherCache(tmp_path / "cache")
    with pytest.raises(CacheError, match="no whole cache is there"):
        TeacherCache(tmp_path / "nothing")


def test_answers_of_another_shape_are_refused(tmp_path):
    cache = TeacherCache.create(tmp_path / "cache", BOTH, TEACHER, {})
    wrong = {**answer(DOCUMENTS[0]), "hidden": torch.zeros(3, WIDTH + 1)}
    with pytest.raises(ValueError, match=r"hidden: expected shape \(3, 6\), got \(3, 7\)"):
        cache.write([(DOCUMENTS[0], wrong)])
    assert not (tmp_path / "cache" / "shards").exists() or len(TeacherCache(cache.folder)) == 0


def test_payloads_that_keep_nothing_are_refused():
    with pytest.raises(ValueError, match="expected hidden, top_k or both, got neither"):
        Payload()
    with pytest.raises(ValueError, match="expected one of float32, bfloat16, float16 or None"):
        Payload("int8", 4)
