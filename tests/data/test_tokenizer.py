"""The trained tokenizer: round trip, repeatable, saved the way transformers loads it."""

import json

import pytest
from transformers import dynamic_module_utils

from modxfer_fast.data import DataError, load_tokenizer, tokenizer_digest, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n" * 3, "Größe: 3 µm, naïve café 🙂" * 3]


def test_any_text_round_trips():
    tokenizer = train_tokenizer(TEXTS, 320)
    for text in [*TEXTS, "日本語 never seen\t\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 320


def test_training_is_repeatable():
    assert tokenizer_digest(train_tokenizer(TEXTS, 320)) == tokenizer_digest(
        train_tokenizer(TEXTS, 320)
    )
    assert tokenizer_digest(train_tokenizer(TEXTS, 320)) != tokenizer_digest(
        train_tokenizer(TEXTS[:1], 320)
    )


def test_saved_and_loaded_alike(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert loaded.eos_token == "<|endoftext|>"
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.chat_template == tokenizer.chat_template


def test_padding_falls_back_to_the_end(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer("./absent")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="expected an end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_code_of_a_folder_runs_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    is_ours = True\n"
    )
    config = tmp_path / "own" / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "OwnTokenizer"
    fields["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    config.write_text(json.dumps(fields))
    assert load_tokenizer(str(tmp_path / "own"), trust_remote_code=True).is_ours
    with pytest.raises(DataError, match="trust_remote_code"):
        load_tokenizer(str(tmp_path / "own"))
