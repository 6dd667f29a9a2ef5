"""The README's example of the trainer runs as it stands, on folders with tiny models."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modxfer_fast.data import train_tokenizer
from tests.support.models import tiny_llama

README = Path(__file__).parents[2] / "README.md"


def test_the_trainer_example_runs_as_it_stands(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    [block] = [block for block in blocks if "DistillTrainer(" in block]
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["a few words to learn from"], 300)
    sizes = {"teacher": (48, 3), "student": (32, 2)}
    for seed, (name, (width, depth)) in enumerate(sizes.items()):
        model = tiny_llama(width, depth, seed=seed, vocab_size=len(tokenizer))
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in ("student", "out/student"))
    ids = torch.tensor(tokenizer("a few words")["input_ids"])[None]
    assert not torch.equal(before(ids).logits, after(ids).logits)
