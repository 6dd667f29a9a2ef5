"""The first tensor that is not finite is named, of teacher, student, batch or gradient."""

import math

import pytest
import torch
from torch import nn

from modxfer_fast.engine import DistillConfig, DistillTrainer, NonFiniteError, nonfinite
from modxfer_fast.engine.nonfinite import KeptStep, Watch
from tests.support.models import TokenDataset, align_collate, tiny_llama


def make(folder, student, teacher, **options):
    options = {"max_steps": 2, "max_skipped_steps": 0, **options}
    args = DistillConfig(
        output_dir=str(folder),
        save_strategy="no",
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    data = TokenDataset(8)
    return DistillTrainer(student, args, teacher, train_dataset=data, data_collator=align_collate)


def break_output(module, value=math.nan, at=(0, 1)):
    def hook(module, args, output):
        output = output.clone()
        output[at] = value
        return output

    module.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("role", "place", "value"),
    [
        ("student", "model.layers.1.mlp.down_proj", math.nan),
        ("student", "model.embed_tokens", math.inf),
        ("teacher", "model.layers.0.self_attn.v_proj", -math.inf),
    ],
)
def test_the_first_broken_module_is_named(tmp_path, role, place, value):
    models = {"student": tiny_llama(), "teacher": tiny_llama(48, 2, seed=1)}
    module = models[role].get_submodule(place)
    break_output(module, value)
    run = make(tmp_path, models["student"], models["teacher"])
    width = getattr(module, "out_features", 32)
    with pytest.raises(
        NonFiniteError,
        match=rf"step 1: update skipped.*; first not finite: rank 0: {role}\.{place} output "
        rf"\({width} of \d+\); modxfer replay .*nonfinite/step-1 runs it again; 1 updates in a row",
    ):
        run.train()
    kept, findings = KeptStep.read(tmp_path / "nonfinite" / "step-1" / "rank-0.pt")
    assert findings[0].tensor == f"{role}.{place} output"
    assert (kept.step, kept.rank, len(kept.batches)) == (1, 0, 1)
    assert (tmp_path / "nonfinite" / "step-1" / "student" / "model.safetensors").is_file()


def test_a_gradient_that_alone_is_broken_is_named_by_running_it_backward(tmp_path):
    student = tiny_llama()
    norm = student.model.layers[1].post_attention_layernorm

    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: grad * math.nan)

    norm.register_forward_hook(hook)
    run = make(tmp_path, student, tiny_llama(48, 2, seed=1))
    with pytest.raises(NonFiniteError, match="every output is finite, the gradients are not"):
        run.train()
    kept, findings = KeptStep.read(tmp_path / "nonfinite" / "step-1" / "rank-0.pt")
    assert findings == []
    watch = Watch(nonfinite.models_of(run.model), backward=True)

    def step(batch):
        output = run.model(**batch)
        output["loss"].backward()
        return output

    kept.run(watch, step)
    first = watch.findings[0].tensor
    assert first == "student.model.layers.1.post_attention_layernorm output's grad"


def test_a_step_is_run_again_with_the_dropout_that_it_had(tmp_path):
    student = tiny_llama(attention_dropout=0.5)
    run = make(tmp_path, student, tiny_llama(48, 2, seed=1), max_skipped_steps=9)
    losses = []
    run.model.register_forward_hook(lambda _, args, output: losses.append(output["loss"].item()))
    student.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    run.train()
    assert len(losses) == 3  # of two steps in a row the first once more
    assert losses[0] == losses[1] != losses[2]


def test_batches_are_looked_at_and_padding_is_not():
    class Model(nn.Module):
        def forward(self, x):
            return x

    model = Model()
    watch = Watch({"student": model})
    x = torch.ones(2, 3, 4)
    x[0, 2] = math.nan
    with watch.watching():
        watch.begin(0, {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
        model(x)
        assert watch.findings == []
        watch.begin(1, {"answers": {"hidden": x}, "input_ids": torch.ones(2, 3, dtype=int)})
        model(x)
    assert [(f.tensor, f.micro_batch, f.broken, f.largest) for f in watch.findings] == [
        ("batch.answers.hidden", 1, 4, 1.0),
        ("student input", 1, 4, 1.0),
        ("student output", 1, 4, 1.0),
    ]


def test_no_more_steps_are_kept_than_asked_for(tmp_path):
    student = tiny_llama()
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output * math.nan if len(calls) % 2 else output

    student.model.norm.register_forward_hook(hook)
    options = {"max_steps": 8, "max_skipped_steps": 5}
    make(tmp_path / "some", student, tiny_llama(48, 2, seed=1), **options).train()
    assert len(list((tmp_path / "some" / "nonfinite").iterdir())) == 3
    make(
        tmp_path / "none", student, tiny_llama(48, 2, seed=1), keep_nonfinite_steps=0, **options
    ).train()
    assert not (tmp_path / "none" / "nonfinite").exists()
