"""What other programs kept of a teacher: as good as asking it, or refused for what is wrong."""

import fcntl
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file

from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine import CachedTeacher, DistillModule, Objective
from modxfer_fast.kernels.common import Bend
from modxfer_fast.teacher_cache import Document, TeacherCache, key_of
from modxfer_fast.teacher_cache.importers import (
    AxolotlColumns,
    DistillKitRows,
    HiddenStatesFiles,
    ImportRefused,
    TeacherHead,
    import_answers,
)
from tests.support.models import VOCAB_SIZE, tiny_llama

K = 6
NORM = "1+norm"


def texts(count=12):
    """Documents in which a token says mostly which one comes next."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(VOCAB_SIZE - 3, generator=generator) + 3
    for index in range(count):
        ids = [3 + index]
        for _ in range(20 + index):
            noise = torch.rand((), generator=generator) < 0.1
            other = torch.randint(3, VOCAB_SIZE, (), generator=generator)
            ids.append(int(other if noise else follows[ids[-1] - 3]))
        yield torch.tensor(ids)


TEXTS = list(texts())


@pytest.fixture(scope="module")
def model():
    """A teacher that knows these texts."""
    own = tiny_llama(32, 2, seed=1)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    for _ in range(40):
        batch = torch.nn.utils.rnn.pad_sequence(TEXTS, batch_first=True)
        own(input_ids=batch, labels=batch.masked_fill(batch == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return own.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def head(model):
    return TeacherHead(model.lm_head.weight, None, Bend(), model.model.norm)


def documents(learnt_from=0):
    for ids in TEXTS:
        learnt = torch.arange(len(ids)) >= learnt_from
        learnt[-1] = False
        yield Document(key_of(ids), 0, 0, ids.int()), learnt


def cache_of(folder):
    return folder.with_name(f"{folder.name}-cache")


def creating(folder):
    facts = {"classes": VOCAB_SIZE, "logit_scale": 1.0, "softcap": None}
    return lambda payload: TeacherCache.create(cache_of(folder), payload, facts, {})


def states(model, ids):
    """[n, layers, width] before the final norm, and [n, width] behind it."""
    kept = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: kept.append(out))
        for layer in model.model.layers
    ]
    last = model.model(input_ids=ids[None])[0][0]
    for hook in hooks:
        hook.remove()
    return torch.stack([each[0] for each in kept], 1), last


def top_k(model, ids):
    log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return log_probs.topk(K, -1)


def write_states(model, folder, take=lambda before, behind: before):
    for number, ids in enumerate(TEXTS):
        tensors = {"hidden_states": take(*states(model, ids)).contiguous(), "token_ids": ids}
        save_file(tensors, folder / f"{number}.safetensors")


# --- vllm


def test_hidden_states_are_those_of_the_teacher(tmp_path, model, head):
    write_states(model, tmp_path)
    source = HiddenStatesFiles(tmp_path, head)
    found = import_answers(source, documents(), creating(tmp_path), NORM)
    assert found.documents == len(found.cache) == len(TEXTS)
    for (document, _), ids in zip(documents(), TEXTS, strict=True):
        _, behind = states(model, ids)
        torch.testing.assert_close(found.cache.read(document)["hidden"], behind)
    logits = torch.cat([model(input_ids=ids[None]).logits[0, :-1] for ids in TEXTS])
    own = torch.nn.functional.cross_entropy(logits, torch.cat([ids[1:] for ids in TEXTS]))
    assert found.score == pytest.approx(-own.item(), rel=1e-4)


def test_states_behind_the_norm_are_taken_as_they_are(tmp_path, model, head):
    write_states(model, tmp_path, lambda before, behind: behind)
    found = import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path))
    document, _ = next(documents())
    assert torch.equal(found.cache.read(document)["hidden"], states(model, TEXTS[0])[1])


def test_states_before_the_norm_are_refused_and_the_norm_is_offered(tmp_path, model, head):
    write_states(model, tmp_path)
    with pytest.raises(ImportRefused, match=r'read as "1" .* say so \(--as "1\+norm"\)'):
        import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path))
    assert not cache_of(tmp_path).exists()


def test_the_wrong_layer_is_refused(tmp_path, model, head):
    write_states(model, tmp_path)
    with pytest.raises(ImportRefused, match=r'read as "0\+norm" .* \(--as "1\+norm"\)'):
        import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path), "0+norm")


def test_a_reading_that_the_format_does_not_have(tmp_path, model, head):
    write_states(model, tmp_path)
    told = r"expected a reading among 1, 1\+norm, 0, 0\+norm, got last"
    with pytest.raises(ImportRefused, match=told):
        import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path), "last")


def test_states_that_no_reading_makes_sense_of_are_refused(tmp_path, model, head):
    write_states(model, tmp_path, lambda before, behind: before[:, :1].roll(1, -1))
    with pytest.raises(ImportRefused, match="of another layer, another teacher or another tok"):
        import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path))


def test_a_file_that_is_being_written_is_left_for_later(tmp_path, model, head):
    write_states(model, tmp_path)
    lock = tmp_path / "3.safetensors.lock"
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        source = HiddenStatesFiles(tmp_path, head)
        found = import_answers(source, documents(), creating(tmp_path), NORM)
    assert found.documents == len(TEXTS) - 1
    (note,) = source.notes
    assert "3.safetensors is being written; import again" in note
    again = import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path), NORM)
    assert again.documents == 1
    assert len(again.cache) == len(TEXTS)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"states": torch.zeros(2)}, "expected hidden_states and token_ids, got states"),
        (
            {"hidden_states": torch.zeros(4, 1, 8), "token_ids": torch.arange(4)},
            r"expected hidden_states of shape \[4, 1, 32\], got \[4, 1, 8\]",
        ),
        (
            {"hidden_states": torch.full((4, 32), torch.nan), "token_ids": torch.arange(4)},
            "expected finite hidden states",
        ),
        *(
            (
                {
                    "hidden_states": torch.zeros(4, 32).to(dtype),
                    "token_ids": torch.arange(4),
                },
                r"expected hidden_states in float32, bfloat16, float16, got (float|int)\w+",
            )
            for dtype in (torch.float64, torch.float8_e4m3fn, torch.int8)
        ),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, head, tensors, told):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ImportRefused, match=rf"a.safetensors: {told}"):
        import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path))


def test_a_torn_file_and_none_at_all(tmp_path, head):
    with pytest.raises(ImportRefused, match=r"expected a folder of .safetensors files, got none"):
        HiddenStatesFiles(tmp_path, head)
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(ImportRefused, match="cannot be read"):
        import_answers(HiddenStatesFiles(tmp_path, head), documents(), creating(tmp_path))


def test_documents_of_another_job_are_told(tmp_path, model, head):
    write_states(model, tmp_path)
    source = HiddenStatesFiles(tmp_path, head)
    few = list(documents())[:2]
    assert import_answers(source, few, creating(tmp_path), NORM).other == len(TEXTS) - 2
    ids = torch.arange(5, dtype=torch.int32)
    other = [(Document(key_of(ids), 0, 0, ids), torch.ones(5, dtype=torch.bool))]
    with pytest.raises(ImportRefused, match="expected documents of the job"):
        import_answers(source, other, creating(tmp_path), NORM)


# --- axolotl


def columns(model, ids, *, own=True, divided=False):
    log_probs, listed = top_k(model, ids)
    if divided:
        log_probs = log_probs.log_softmax(-1)
    log_probs, listed, mask = log_probs.tolist(), listed.tolist(), [[1] * K] * len(ids)
    if own:  # the first token has no list, and the last list no token
        log_probs = [[-float("inf")] * K, *log_probs[:-1]]
        listed = [list(range(K)), *listed[:-1]]
        mask = [[0] * K, *mask[:-1]]
    return {
        "input_ids": ids.tolist(),
        "target_token_ids": listed,
        "target_logprobs": log_probs,
        "target_mask": mask,
    }


def write_records(path, records):
    if path.suffix == ".saved":
        Dataset.from_list(records).save_to_disk(path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def assert_listed(cache, model, rtol=1e-4):
    for (document, _), ids in zip(documents(), TEXTS, strict=True):
        found = cache.read(document)
        log_probs, listed = top_k(model, ids)
        assert torch.equal(found["topk_ids"][:-1].long(), listed[:-1])
        torch.testing.assert_close(
            found["topk_log_probs"][:-1].double(), log_probs[:-1], rtol=rtol, atol=rtol
        )
        tail = 1 - log_probs[:-1].exp().sum(-1)
        torch.testing.assert_close(
            found["topk_log_tail"][:-1, 0].double().exp(), tail, rtol=rtol, atol=10 * rtol
        )


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("own", [True, False])
def test_lists_of_axolotl_are_those_of_the_teacher(tmp_path, model, head, ending, own):
    records = [columns(model, ids, own=own) for ids in TEXTS]
    path = write_records(tmp_path / f"a.{ending}", records)
    wrong, right = ("next", "own") if own else ("own", "next")
    with pytest.raises(ImportRefused, match=rf'read as "{wrong}" .* \(--as "{right}"\)'):
        import_answers(AxolotlColumns(path, head), documents(), creating(tmp_path), wrong)
    found = import_answers(AxolotlColumns(path, head), documents(), creating(tmp_path), right)
    assert found.documents == len(TEXTS)
    assert_listed(found.cache, model)


def test_lists_that_were_divided_by_their_sum_leave_nothing(tmp_path, model, head):
    records = [columns(model, ids, divided=True) for ids in TEXTS]
    path = write_records(tmp_path / "a.jsonl", records)
    found = import_answers(AxolotlColumns(path, head), documents(), creating(tmp_path))
    tail = found.cache.read(next(documents())[0])["topk_log_tail"][:-1]
    assert (tail.exp() < 1e-6).all()


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_a_student_of_lists_learns_what_they_say(tmp_path, model, head, divided, tail):
    records = [columns(model, ids, divided=divided) for ids in TEXTS]
    path = write_records(tmp_path / "a.jsonl", records)
    found = import_answers(AxolotlColumns(path, head), documents(), creating(tmp_path))
    teacher = CachedTeacher(found.cache, tail=tail)
    rows = [
        {"input_ids": ids.tolist(), "is_target": [True] * len(ids), "lengths": [len(ids)]}
        for ids in TEXTS
    ]
    batch = teacher.collator(CausalCollator(0, packed=False))(rows)
    student = tiny_llama()
    DistillModule(student, teacher, Objective())(**batch)["loss"].backward()

    truth = tiny_llama().double()
    losses = []
    for ids in TEXTS:
        log_p, listed = (each[:-1] for each in top_k(model, ids))
        log_q = truth(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        if divided or tail == "renormalise":
            log_p, log_q = log_p.log_softmax(-1), log_q.gather(-1, listed)
        else:
            rest = log_q.scatter(-1, listed, -torch.inf).logsumexp(-1, keepdim=True)
            log_p = torch.cat([log_p, torch.log1p(-log_p.exp().sum(-1, keepdim=True))], -1)
            log_q = torch.cat([log_q.gather(-1, listed), rest], -1)
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
    torch.cat(losses).mean().backward()
    for own, expected in zip(student.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), expected.grad, rtol=1e-3, atol=1e-5)


def test_prompts_need_no_lists_and_what_is_learnt_does(tmp_path, model, head):
    records = [columns(model, ids) for ids in TEXTS]
    for record in records:  # tokens 0 to 4 are the prompt
        record["target_mask"][:5] = [[0] * K] * 5
    path = write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(ImportRefused, match="expected classes for each token that the job learns"):
        import_answers(AxolotlColumns(path, head), documents(), creating(tmp_path))
    found = import_answers(AxolotlColumns(path, head), documents(4), creating(tmp_path))
    assert found.documents == len(TEXTS)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("target_logprobs", 0.5, "expected log-probabilities of at most 0, got 0.5"),
        ("target_logprobs", float("nan"), "expected log-probabilities of at most 0, got nan"),
        ("target_logprobs", -0.1, "expected probabilities that sum to at most 1"),
        ("target_token_ids", VOCAB_SIZE, f"expected ids below {VOCAB_SIZE}"),
        ("target_token_ids", 7, "expected each id once, got 7 twice"),
        ("target_logprobs", None, "target_logprobs: expected as many float32 for each token"),
    ],
)
def test_damaged_lists_are_named(tmp_path, model, head, column, value, told):
    record = columns(model, TEXTS[0])
    record[column][4] = [value] * (K - (value is None))
    path = write_records(tmp_path / "a.jsonl", [record])
    with pytest.raises(ImportRefused, match=rf"a.jsonl, record 0: .*{told}"):
        import_answers(AxolotlColumns(path, head), documents(), creating(tmp_path))
    assert not cache_of(tmp_path).exists()


def test_other_records_are_named(tmp_path, head):
    for name, text, told in (
        ("a.jsonl", '{"input_ids": [1, 2]}\n', "record 0: expected columns input_ids, target"),
        ("b.jsonl", "{torn\n", "record 0: cannot be read"),
        ("c.parquet", "torn", "cannot be read"),
        ("d.txt", "text", "expected a .jsonl or .json or .parquet file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ImportRefused, match=told):
            list(AxolotlColumns(tmp_path / name, head).entries())


# --- distillkit


def bits(numbers, width):
    stream = "".join(f"{number:0{width}b}" for number in numbers)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]


CONFIGS = {
    "exact": {"exact_k": K, "residual_bins": [], "delta_encoding": False},
    "bins": {
        "exact_k": 2,
        "polynomial_terms": [0, 1, "sqrt"],
        "residual_bins": [
            {"scale_dtype": "float32", "element_bits": 13, "num_elements": 3},
            {"scale_dtype": "float32", "element_bits": 9, "num_elements": 1},
        ],
        "delta_encoding": False,
        "normalize_t": True,
    },
    "differences": {
        "exact_k": 3,
        "exact_dtype": "float64",
        "residual_bins": [{"scale_dtype": "float64", "element_bits": 15, "num_elements": 3}],
    },
}


def compressed(x, config):
    """Bytes of numbers [K], written down from the format and not by the reader."""
    codes = {"float32": "<f", "float64": "<d"}
    if config.get("delta_encoding", True):
        x = np.diff(x, prepend=0.0)
    exact_k = config["exact_k"]
    data = [struct.pack(codes[config.get("exact_dtype", "float32")], own) for own in x[:exact_k]]
    rest = x[exact_k:]
    if config.get("polynomial_terms"):
        points = np.linspace(0, 1, len(rest))
        terms = np.stack([np.ones_like(points), points, np.sqrt(points)], -1)
        found = np.linalg.lstsq(terms, rest, rcond=None)[0].astype(np.float32)
        data += [struct.pack("<f", own) for own in found]
        rest = rest - terms @ found
    for own in config["residual_bins"]:
        part, rest = rest[: own["num_elements"]], rest[own["num_elements"] :]
        half = 2 ** (own["element_bits"] - 1)
        scale = max(np.abs(part).max() / half, 1e-12)
        numbers = np.clip(np.round(part / scale), -half, half - 1).astype(int) + half
        data.append(struct.pack(codes[own["scale_dtype"]], scale))
        data.append(bytes(bits(numbers.tolist(), own["element_bits"])))
    return list(b"".join(data))


def write_rows(model, folder, config, **wrong):
    fields = {"d": VOCAB_SIZE, "k": K, **config, **wrong}
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(fields))
    records = []
    for ids in TEXTS:
        log_probs, listed = top_k(model, ids)
        records.append(
            {
                "input_ids": ids.tolist(),
                "compressed_logprobs": [compressed(own, config) for own in log_probs[:-1].numpy()],
                "bytepacked_indices": [bits(own, 7) for own in listed[:-1].tolist()],
            }
        )
    write_records(folder / "data_0.parquet", records)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_distillkit_are_those_of_the_teacher(tmp_path, model, head, name):
    write_rows(model, tmp_path, CONFIGS[name])
    found = import_answers(DistillKitRows(tmp_path, head), documents(), creating(tmp_path))
    assert found.documents == len(TEXTS)
    assert_listed(found.cache, model, rtol=1e-5 if name == "exact" else 2e-2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 3}, "expected at least exact_k and the bins, got 3"),
        ({"exact_dtype": "int8"}, "exact_dtype: .*got 'int8'"),
        ({"levels": 3}, "levels: .*got 3"),
        ({"d": 40000}, r"bytepacked_indices: expected \d+ bytes a token"),
    ],
)
def test_another_compression_is_named(tmp_path, model, head, change, told):
    write_rows(model, tmp_path, CONFIGS["exact"], **change)
    with pytest.raises(ImportRefused, match=told):
        import_answers(DistillKitRows(tmp_path, head), documents(), creating(tmp_path))


def test_rows_without_their_compression_are_refused(tmp_path, head):
    with pytest.raises(ImportRefused, match=r"compression_config.yaml: cannot be read"):
        DistillKitRows(tmp_path, head)
