"""A student that teaches itself learns what a second model in its place would teach it."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from modxfer_fast.config import HiddenStatesSection
from modxfer_fast.engine import (
    DistillConfig,
    DistillModule,
    DistillTrainer,
    Objective,
    SelfDistillation,
    Teacher,
)
from modxfer_fast.engine.batch import Batch
from modxfer_fast.models import apply_peft, patch_peft_model
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.reference import dense_terms
from tests.support.writing import greedy

DATA = TokenDataset(24)
BATCH = align_collate([DATA[i] for i in range(4)])
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
SOURCES = ("base", "start", "ema")


def student(dropout: float = 0.0, seed: int = 5, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(**{**LORA, "lora_dropout": dropout, **config})
        return get_peft_model(tiny_llama(attention_dropout=dropout), lora)


def second_model(source: str, model):
    """A model of its own that answers as the source does at the start."""
    return tiny_llama() if source == "base" else copy.deepcopy(model)


def logits(answer):
    weight, _ = answer.head
    return answer.output @ weight.T


def of_model(model):
    with torch.no_grad():
        inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
        return model.eval()(**inputs).logits


def asked(module):
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    return logits(module.teacher.answer(Batch(inputs)))


def state(model):
    facts = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return facts, [module.training for module in model.modules()], list(model.modules())


@pytest.mark.parametrize("source", SOURCES)
def test_its_answers_are_those_of_a_second_model_whatever_the_student_learns(source):
    model = student()
    expected = of_model(second_model(source, model))
    module = DistillModule(model, SelfDistillation(source), Objective()).train()
    assert torch.allclose(asked(module), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.3)
    assert torch.allclose(asked(module), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(of_model(model), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("source", SOURCES)
def test_asking_leaves_the_student_and_its_random_numbers_as_they_were(source):
    model = student(dropout=0.4)
    module = DistillModule(model, SelfDistillation(source), Objective()).train()
    model.get_submodule("base_model.model.lm_head").training = False  # a flag of its own
    before, generator = state(model), torch.get_rng_state()
    first, second = asked(module), asked(module)
    after = state(model)
    assert torch.equal(first, second)  # no dropout, of the model or of its adapters
    assert torch.allclose(first, of_model(second_model(source, student(dropout=0.4))), atol=1e-5)
    assert torch.equal(torch.get_rng_state(), generator)
    assert before[1:] == after[1:]
    for name, (requires_grad, value) in before[0].items():
        assert after[0][name][0] == requires_grad
        assert torch.equal(after[0][name][1], value)


def gradients(model, teacher, checkpointing=None, hidden=None):
    module = DistillModule(model, teacher, Objective(ce_weight=0.3), hidden).train()
    if checkpointing is not None:
        module.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    torch.manual_seed(0)  # of dropout
    for rows in ((0, 1, 2), (3, 4)):
        module(**align_collate([DATA[i] for i in rows]))["loss"].backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "not"])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
def test_gradients_are_those_of_a_second_model(source, checkpointing, fused):
    found = {}
    for teacher in ("self", "second"):
        model = student(dropout=0.3)
        second = Teacher(second_model(source, model))
        if fused:
            assert patch_peft_model(model)
        given = SelfDistillation(source) if teacher == "self" else second
        found[teacher] = gradients(model, given, checkpointing)
    assert found["self"].keys() == found["second"].keys()
    assert any(grad.any() for grad in found["self"].values())
    for name, grad in found["second"].items():
        assert torch.allclose(found["self"][name], grad, rtol=1e-4, atol=1e-6), name


def test_hidden_states_of_the_one_network_are_taken_apart():
    options = HiddenStatesSection(layers={1: 1, 2: 2})
    own = gradients(student(), SelfDistillation("base"), hidden=options)
    second = gradients(student(), Teacher(tiny_llama()), hidden=options)
    assert own.keys() == second.keys()
    for name, grad in second.items():
        assert torch.allclose(own[name], grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("source", SOURCES)
def test_a_head_that_trains_has_its_counterpart(source):
    model = student(modules_to_save=["lm_head"])
    expected = of_model(second_model(source, model))
    module = DistillModule(model, SelfDistillation(source), Objective())
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.3)
    assert torch.allclose(asked(module), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", ["ia3", "bottleneck", "compacter"])
@pytest.mark.parametrize("source", ["base", "start"])
def test_other_adapters_teach_too(block, source):
    if block == "ia3":
        config = IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
        model = get_peft_model(tiny_llama(), config)
    else:
        model = apply_peft(tiny_llama(), {"type": block, "bottleneck_size": 8}, seed=0)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.2)
    expected = of_model(second_model(source, model))
    module = DistillModule(model, SelfDistillation(source), Objective())
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.mul_(1.5)
    assert torch.allclose(asked(module), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(of_model(model), expected, rtol=1e-2, atol=1e-2)


class Record(TrainerCallback):
    """The adapters before training, and after each step."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def _take(self, *args, **kwargs):
        params = self.model.named_parameters()
        self.seen.append({name: p.detach().clone() for name, p in params if p.requires_grad})

    on_train_begin = on_step_end = _take


def trainer(folder, source="ema", decay=0.8, **options):
    model = student(dropout=0.1)
    args = DistillConfig(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **{"learning_rate": 1e-2, "max_steps": 6, "save_strategy": "no", **options},
    )
    record = Record(model)
    run = DistillTrainer(
        model,
        args,
        SelfDistillation(source, decay),
        DATA,
        data_collator=align_collate,
        callbacks=[record],
    )
    return run, record


def average(seen, decay):
    mean = seen[0]
    for values in seen[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * value for name, value in values.items()}
    return mean


def test_the_average_moves_once_a_step_that_is_taken(tmp_path):
    run, record = trainer(tmp_path, max_skipped_steps=5)
    calls = 0

    def break_step_3(module, args, output):
        nonlocal calls
        calls += module.training
        return output * float("nan") if module.training and calls == 5 else output

    run.student.get_submodule("base_model.model.model.norm").register_forward_hook(break_step_3)
    run.train()
    assert run.guard.skipped == 1
    seen = record.seen
    assert all(torch.equal(seen[2][name], value) for name, value in seen[3].items())
    run.save_model(str(tmp_path / "model"))
    kept = load_file(tmp_path / "model" / "self_teacher.safetensors")
    expected = average(seen[:3] + seen[4:], 0.8)
    assert kept.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(kept[name], value, rtol=1e-5, atol=1e-7), name
        assert not torch.allclose(kept[name], seen[-1][name], rtol=1e-3), name


@pytest.mark.parametrize("source", SOURCES)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, source):
    whole, _ = trainer(tmp_path / "whole", source, save_strategy="steps", save_steps=3)
    whole.train()
    again, _ = trainer(tmp_path / "again", source)
    if source == "start":  # what a checkpoint says counts, not what the student begins with
        with torch.no_grad():
            for param in again.student.parameters():
                if param.requires_grad:
                    param.add_(1.0)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    states = []
    for run, name in ((whole, "a"), (again, "b")):
        run.save_model(str(tmp_path / name))
        files = sorted((tmp_path / name).glob("*.safetensors"))
        states.append({(f.name, key): v for f in files for key, v in load_file(f).items()})
    one, other = states
    assert one.keys() == other.keys()
    assert any(name == "self_teacher.safetensors" for name, _ in one) == (source != "base")
    assert all(torch.equal(one[key], value) for key, value in other.items())
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (whole, again)]
    assert losses[0][-1] == losses[1][-1]


@pytest.mark.parametrize("source", ["start", "ema"])
def test_what_is_loaded_goes_where_the_teacher_is(tmp_path, source):
    """Also beside a student that does not train, as what a run has saved is measured."""
    run, _ = trainer(tmp_path / "run", source, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    frozen = student()
    frozen.requires_grad_(False)
    teacher = SelfDistillation(source).of(frozen, "causal_lm").to(torch.device("meta"))
    teacher.load(tmp_path / "saved")
    assert teacher._values
    assert all(value.is_meta for value in teacher._values.values())


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path):
    run, _ = trainer(tmp_path / "whole", "base", save_strategy="steps", save_steps=3, max_steps=3)
    run.train()
    again, _ = trainer(tmp_path / "again", "ema")
    with pytest.raises(ValueError, match=r"expected self_teacher.safetensors in"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def written_on_policy(folder, source, *, max_steps, **section):
    """The student, and the micro-batches of each step, some of its own texts."""
    options = {"fraction": 0.6, "prompt_length": 3, "max_new_tokens": 5, **section}
    args = DistillConfig(
        output_dir=str(folder),
        on_policy=options,
        divergence="reverse_kl",
        ce_weight=0.4,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    run = DistillTrainer(
        student(), args, SelfDistillation(source, 0.6), DATA, data_collator=align_collate
    )
    steps, mixed = [], run.on_policy.mixed

    def mixing(*given):
        steps.append(mixed(*given))
        return steps[-1]

    run.on_policy.mixed = mixing
    run.train()
    return run.student, steps


def texts(steps):
    rows = [
        (batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] != -100)
        for batches in steps
        for batch in batches
        if "on_policy" in batch
    ]
    return [
        (ids[mask].tolist(), int(learnt.sum()))
        for row in rows
        for ids, mask, learnt in zip(*row, strict=True)
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_a_student_that_writes_is_judged_by_its_own_network(source, tmp_path):
    start, objective = student(), Objective(divergence="reverse_kl")
    got, steps = written_on_policy(tmp_path, source, max_steps=4, top_k=1)
    whose = ["on_policy" in batch for batches in steps for batch in batches]
    assert len(set(whose)) == 2
    ends = {}
    for dtype in (torch.float64, torch.float32):
        model, teacher = student().to(dtype), second_model(source, start).to(dtype).eval()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for batches in steps:
            for ids, learnt in texts([batches]) if dtype == torch.float32 else ():
                assert len(ids) - learnt == 3
                assert ids[3:] == greedy(model, ids[:3], 5, stop=(2,))
            tokens = sum((batch["labels"] != -100).sum() for batch in batches)
            for batch in batches:
                kd, ce, _ = dense_terms(model, teacher, batch, objective)
                ((kd if "on_policy" in batch else kd + 0.4 * ce) / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            if source == "ema":
                with torch.no_grad():
                    for mean, new in zip(teacher.parameters(), model.parameters(), strict=True):
                        mean.mul_(0.6).add_(new, alpha=0.4)
        ends[dtype] = dict(model.named_parameters())
    before = dict(start.named_parameters())
    for name, param in got.named_parameters():
        truth, plain = (ends[dtype][name].double() for dtype in ends)
        band = 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        budget = 2 * (plain - truth).abs().max() + band
        assert (param.double() - truth).abs().max() <= budget, name
        if param.requires_grad:
            assert (before[name] - truth).abs().max() > 20 * budget, name


def test_what_it_writes_follows_the_seed(tmp_path):
    first, again, greedily = (
        texts(written_on_policy(tmp_path / name, "ema", max_steps=2, top_k=k)[1])
        for name, k in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != greedily


def test_what_cannot_teach_itself_is_told():
    with pytest.raises(ValueError, match="source: expected one of base, ema, start, got 'live'"):
        SelfDistillation("live")
    with pytest.raises(ValueError, match=r"ema_decay: expected in \[0, 1\), got 1"):
        SelfDistillation("ema", 1.0)
    for source in SOURCES:
        with pytest.raises(ValueError, match="teacher: expected a student with adapters"):
            DistillModule(tiny_llama(), SelfDistillation(source), Objective())
    biased = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(**LORA, bias="lora_only"))
    with pytest.raises(ValueError, match="teacher: expected source start or ema, because the base"):
        DistillModule(biased, SelfDistillation("base"), Objective())
    DistillModule(biased, SelfDistillation("start"), Objective())
    model = student()
    with pytest.raises(ValueError, match="got the student, frozen by that"):
        DistillModule(model, Teacher(model), Objective())
