"""One small job that every test of the command line starts from."""

import pytest
import yaml

from tests.task_inputs import NER_LABELS

TINY = {
    "tokenizer": {"vocab_size": 320},
    "data": {"source": None, "max_length": 24, "eval_fraction": 0.2},
    "teacher": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "pretrain": {"max_steps": 20, "learning_rate": 5e-3, "save_strategy": "no"},
    },
    "student": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    },
    "training": {
        "max_steps": 10,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 5,
    },
    "compare": {"ce_only": True, "loss_rows": 8, "loss_repeats": 2},
}
WORDS = ["import", "return", "def", "class", "while", "for", "yield", "lambda", "pass", "raise"]


def merged(base, changes):
    """`base` with nested `changes`."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def job_file(folder, base, changes):
    """Writes `base` with nested `changes` and returns the file and its output folder."""
    job = merged({"output_dir": str(folder / "out")}, merged(base, changes))
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path, folder / "out"


def ner_task(material):
    """The task section of the sentences in a folder."""
    return {
        "kind": "ner",
        "files": {"train": str(material / "train.conllu")},
        "labels": list(NER_LABELS),
        "max_length": 32,
    }


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for the corpus and the cache of models."""
    folder = tmp_path_factory.mktemp("shared")
    lines = [" ".join(WORDS[(i * j) % 10] for j in range(1, 30)) for i in range(120)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return folder


@pytest.fixture(scope="session")
def write_job(shared):
    """A function that writes a job file next to its output folder and returns both."""

    def write(folder, **changes):
        base = merged(TINY, {"data": {"source": str(shared / "corpus.jsonl")}})
        return job_file(folder, base, changes)

    return write


@pytest.fixture(autouse=True)
def cache(shared, monkeypatch):
    """Models that a job builds stay out of the user's cache."""
    monkeypatch.setenv("MODXFER_CACHE", str(shared / "cache"))
