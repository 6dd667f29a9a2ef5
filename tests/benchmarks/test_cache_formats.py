"""The table of a cache's formats: exact ones are, and lists say less than all classes."""

import pytest
import torch

from benchmarks import cache_formats
from modxfer_fast.teacher_cache import Document, key_of
from tests.support.models import VOCAB_SIZE, TokenDataset, tiny_llama

ALL_BUT_ONE = VOCAB_SIZE - 1  # whose bucket is the last class


def test_errors_are_those_of_the_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_formats, "TOP_K", (4, ALL_BUT_ONE))
    ids = [row.int() for row in TokenDataset(3).rows]
    texts = [Document(key_of(own), 0, 0, own) for own in ids]
    model, exact = (tiny_llama(32, 3).to(dtype) for dtype in (torch.float32, torch.float64))
    for each in (model, exact):
        each.requires_grad_(False)
    rows = list(cache_formats.measure(model, exact, texts, str(tmp_path)))
    of = {(row.student, row.format): row for row in rows}
    assert {student for student, _ in of} == {"near", "far"}
    for student in ("near", "far"):
        for name in ("hidden, float32", f"top-{ALL_BUT_ONE} and bucket"):
            row = of[student, name]
            assert abs(row.kl_error) < 1e-5
            assert row.gradient_error < 1e-5
        rounded, listed = of[student, "hidden, bfloat16"], of[student, "top-4 and bucket"]
        assert 1e-4 < rounded.gradient_error < 5e-2
        assert -1 < listed.kl_error < -1e-2
    assert of["near", "hidden, bfloat16"].bytes_per_token == 2 * 32 + 4
    assert of["near", "top-4 and bucket"].bytes_per_token == 4 * (4 + 4) + 4 + 4
    assert of["near", "hidden, float32"].kl == pytest.approx(kl(exact, ids), rel=1e-6)


def kl(model, rows):
    """KL(teacher || student) a token by the model's own forward; its block 1 of 3 is left out."""
    logits = [model(input_ids=own.long()[None], use_cache=False).logits[0] for own in rows]
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[2]])
    model.config.num_hidden_layers = 2
    left = [model(input_ids=own.long()[None], use_cache=False).logits[0] for own in rows]
    p, q = (torch.cat(each).log_softmax(-1) for each in (logits, left))
    return float((p.exp() * (p - q)).sum(-1).mean())
