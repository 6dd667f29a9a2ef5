"""What the student writes: who writes it, how it becomes a batch, what is learnt from it."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from modxfer_fast.data import CausalCollator
from modxfer_fast.engine import DistillConfig, DistillTrainer, Objective
from modxfer_fast.engine.on_policy import generation
from modxfer_fast.engine.on_policy.generation import StudentRollouts, complete
from modxfer_fast.engine.on_policy.mixing import prompts_of
from modxfer_fast.engine.on_policy.rollouts import Rollouts, Sampling
from modxfer_fast.models import patch_peft_model
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.reference import dense_terms
from tests.support.writing import greedy

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 12, 40], [60, 61]]
GREEDY = Sampling(max_new_tokens=9, max_length=32, temperature=0.0)
DRAWN = Sampling(max_new_tokens=9, max_length=32)


def add_lora(model):
    torch.manual_seed(5)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(model, config)


def fused():
    model = add_lora(tiny_llama())
    patch_peft_model(model)
    return model


def gpt2():
    """A model with a table of positions, exactly as many as a row may have."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=12,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def with_habits():
    model = tiny_llama()
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.max_length = 3
    return model


MODELS = {
    "plain": tiny_llama,
    "lora": lambda: add_lora(tiny_llama()),
    "fused": fused,
    "habits": with_habits,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_greedy_completions_are_the_likeliest_tokens(make):
    model = make().eval()
    habits = copy.deepcopy(model.generation_config)
    expected = [greedy(model, prompt, 9) for prompt in PROMPTS]
    stop = expected[2][3]  # ends rows there, and is kept
    assert complete(model, PROMPTS, GREEDY) == expected
    ended = complete(model, PROMPTS, replace(GREEDY, stop=(stop,)))
    assert ended == [greedy(model, prompt, 9, stop=(stop,)) for prompt in PROMPTS]
    assert ended[2].index(stop) == len(ended[2]) - 1 < 8
    few = complete(model, PROMPTS, replace(GREEDY, num_classes=20))
    assert few == [greedy(model, prompt, 9, num_classes=20) for prompt in PROMPTS]
    assert model.generation_config == habits


def test_rows_end_where_positions_do():
    model = gpt2().eval()
    sampling = replace(GREEDY, max_length=12)
    written = complete(model, PROMPTS, sampling)
    rooms = [min(9, 12 - len(prompt)) for prompt in PROMPTS]
    assert [len(row) for row in written] == rooms == [9, 9, 4, 9]
    assert written == [greedy(model, *pair) for pair in zip(PROMPTS, rooms, strict=True)]
    with pytest.raises(
        ValueError, match="max_length: expected more than the 12 tokens of a prompt"
    ):
        complete(model, [list(range(3, 15))], sampling)


def test_draws_follow_the_seed_and_leave_no_trace():
    student = tiny_llama(attention_dropout=0.5).train()
    student.gradient_checkpointing_enable()
    rollouts = StudentRollouts(student)
    assert isinstance(rollouts, Rollouts)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = rollouts.generate(PROMPTS, DRAWN, seed=7, step=0)
    assert torch.equal(torch.rand(3), expected)
    assert student.training
    assert rollouts.generate(PROMPTS, DRAWN, seed=7, step=5) == first
    assert rollouts.generate(PROMPTS, DRAWN, seed=8, step=0) != first
    plain = StudentRollouts(tiny_llama().eval()).generate(PROMPTS, DRAWN, seed=7, step=0)
    assert first == plain  # neither dropout nor checkpointing took part


def test_batches_of_prompts():
    student = tiny_llama().eval()
    at_once, by_three = (
        StudentRollouts(student, batch_size=size).generate(PROMPTS, GREEDY, seed=0, step=0)
        for size in (None, 3)
    )
    assert at_once == by_three
    assert StudentRollouts(student).generate([], GREEDY, seed=0, step=0) == []


def test_draws_have_the_distribution_that_is_asked_for():
    student = tiny_llama().eval()
    prompts = [PROMPTS[0]] * 2000
    logits = student(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    for changes in ({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}):
        sampling = replace(DRAWN, max_new_tokens=1, **changes)
        expected = (logits / sampling.temperature).softmax(-1)
        if "top_k" in changes:
            expected[expected < expected.sort().values[-3]] = 0.0
        if "top_p" in changes:
            order = expected.argsort(descending=True)
            before = expected[order].cumsum(0) - expected[order]
            expected[order[before >= 0.6]] = 0.0
        expected /= expected.sum()
        drawn = StudentRollouts(student).generate(prompts, sampling, seed=0, step=0)
        counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=97) / len(prompts)
        assert not counts[expected == 0].any()
        # the distance of 2000 draws to their distribution, of at most 97 classes
        assert (counts - expected).abs().sum() < 2 * (97 / len(prompts)) ** 0.5


# ---- prompts and batches ----


def batch_of(rows, left=False):
    """Rows of (ids, whether each is learnt) as a collator pads them."""
    width = max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids",)}
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for i, (ids, learnt) in enumerate(rows):
        start = width - len(ids) if left else 0
        here = slice(start, start + len(ids))
        batch["input_ids"][i, here] = torch.tensor(ids)
        batch["attention_mask"][i, here] = 1
        for t in range(len(ids) - 1):
            if learnt[t + 1]:
                batch["labels"][i, start + t] = ids[t + 1]
    return batch


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_prompts_precede_the_last_turn(left):
    rows = [
        ([5, 6, 7, 8, 9], [0, 0, 1, 1, 1]),  # a completion
        ([5, 6, 7, 8, 9, 10, 11], [0, 1, 1, 0, 1, 1, 0]),  # two turns, and what the template adds
        ([5, 6, 7, 8], [1, 1, 1, 1]),  # plain text
        ([5, 6], [1, 1]),
        ([5, 6, 7], [0, 0, 0]),
    ]
    batch = batch_of(rows, left)
    prompts = [[5, 6], [5, 6, 7, 8], [5], [5], [5, 6, 7]]
    assert prompts_of(batch, None) == prompts
    assert prompts_of(batch, 3) == [*prompts[:2], [5, 6, 7], [5], prompts[4]]
    with pytest.raises(ValueError, match="one document each, got position_ids"):
        prompts_of({**batch, "position_ids": batch["input_ids"]}, None)


class Fixed:
    """Writes what it was told to, and keeps what it was asked."""

    def __init__(self, write):
        self.write, self.asked = write, []

    def generate(self, prompts, sampling, *, seed, step):
        self.asked.append((prompts, seed, step))
        return [self.write(prompt) for prompt in prompts]


def make_trainer(tmp_path, on_policy=None, rollouts=None, student=None, teacher=None, **options):
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "divergence": "reverse_kl",
        "logging_steps": 1,
        **options,
    }
    args = DistillConfig(
        output_dir=str(tmp_path),
        on_policy=on_policy,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return DistillTrainer(
        student or tiny_llama(),
        args,
        teacher or tiny_llama(48, seed=1),
        train_dataset=TokenDataset(64),
        data_collator=align_collate,
        rollouts=rollouts,
    )


def spied(trainer):
    """The micro-batches of each step, as they are trained on."""
    steps, mixed = [], trainer.on_policy.mixed
    trainer.on_policy.mixed = lambda *args: steps.append(mixed(*args)) or steps[-1]
    return steps


def test_the_batch_of_what_was_written(tmp_path):
    rollouts = Fixed(lambda prompt: [90 + len(prompt), 2] if prompt[0] % 2 else [91])
    section = {"fraction": 1.0, "prompt_length": 2}
    trainer = make_trainer(tmp_path, section, rollouts)
    (first, second) = trainer.on_policy.mixed(
        [batch_of([([5, 6, 7], [0, 0, 1]), ([6, 7, 8, 9], [1] * 4)]), batch_of([([7, 3], [1, 1])])],
        step=4,
    )
    assert [(prompts, step) for prompts, _, step in rollouts.asked] == [([[5, 6], [6, 7], [7]], 4)]
    assert first["input_ids"].tolist() == [[5, 6, 92, 2], [6, 7, 91, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert first["labels"].tolist() == [[-100, 92, 2, -100], [-100, 91, -100, -100]]
    assert (first["num_valid"], first["num_tokens"], first["on_policy"]) == (3, 7, True)
    assert second["input_ids"].tolist() == [[7, 91, 2]]
    assert second["labels"].tolist() == [[91, 2, -100]]


def test_a_completion_has_the_loss_weight_of_its_row(tmp_path):
    trainer = make_trainer(tmp_path, {"fraction": 1.0}, Fixed(lambda prompt: [4, 5]))
    rows = batch_of([([5, 6, 7], [0, 0, 1]), ([5, 6], [0, 1])], left=True)
    rows["token_weights"] = torch.tensor([[0.5] * 3, [0.0, 2.0, 2.0]])
    (written,) = trainer.on_policy.mixed([rows], step=0)
    assert written["token_weights"].tolist() == [[0.5] * 4, [2.0, 2.0, 2.0, 0.0]]


def test_a_teacher_reads_its_own_prompt_before_what_was_written(tmp_path):
    """By hand, with a completion that is cut where the teacher's text would be too long."""
    texts = [([5, 6], [7, 8, 9, 10, 11], [3, 4]), ([5], [9] * 10, [6])]  # prompts, completion
    written = [[90, 91, 2], [92, 93, 94]]
    rollouts = Fixed(lambda prompt: written[len(prompt) == 1])
    trainer = make_trainer(tmp_path, {"fraction": 1.0, "max_length": 12}, rollouts)

    def row(own, others, completion):
        found = {}
        for name, prompt in (("", own), ("teacher_", others)):
            found[f"{name}input_ids"] = prompt + completion
            found[f"{name}is_target"] = [False] * len(prompt) + [True] * len(completion)
            found[f"{name}lengths"] = [len(prompt + completion)]
        return found

    data = CausalCollator(0, packed=False)([row(*text) for text in texts])
    (batch,) = trainer.on_policy.mixed([data], step=0)
    assert [prompts for prompts, _, _ in rollouts.asked] == [[[5, 6], [5]]]
    kept = [written[0], written[1][:2]]
    mask = batch["teacher_inputs"]["attention_mask"].bool()
    read = [
        ids[m].tolist() for ids, m in zip(batch["teacher_inputs"]["input_ids"], mask, strict=True)
    ]
    assert read == [others + new for (_, others, _), new in zip(texts, kept, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    student, teacher = copy.deepcopy(trainer.student).double(), tiny_llama(48, seed=1).double()
    for (own, others, _), new in zip(texts, kept, strict=True):
        log_q, log_p = (
            model(input_ids=torch.tensor([prompt + new])).logits[0, -len(new) - 1 : -1]
            for model, prompt in ((student, own), (teacher, others))
        )
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
        total += (log_q.exp() * (log_q - log_p)).sum()
    loss = trainer.model.train()(**batch)["loss"]
    torch.testing.assert_close(loss.double(), total / 5, rtol=1e-5, atol=0)


def test_the_seed_of_each_rank_and_step_is_its_own(tmp_path):
    rollouts = Fixed(lambda prompt: [4])
    on_policy = make_trainer(tmp_path, {"fraction": 1.0}, rollouts).on_policy
    seeds = set()
    for rank in range(3):
        on_policy._rank = rank
        for step in range(4):
            on_policy.mixed([batch_of([([5, 6, 7], [0, 0, 1])])], step)
            seeds.add(rollouts.asked[-1][1])
    assert len(seeds) == 12


@pytest.mark.parametrize("reuse", [1, 3])
def test_the_share_of_micro_batches_and_the_windows_of_reuse(tmp_path, reuse):
    section = {"fraction": 0.3, "reuse": reuse}
    rollouts = Fixed(lambda prompt: [4, 5, 6])
    on_policy = make_trainer(tmp_path, section, rollouts).on_policy
    rows = batch_of([([5, 6, 7], [0, 0, 1])])
    steps = [on_policy.mixed([{**rows} for _ in range(4)], step) for step in range(300)]
    is_written = [["on_policy" in batch for batch in step] for step in steps]
    share = sum(map(sum, is_written)) / 1200
    assert share == pytest.approx(0.3, abs=0.08 if reuse == 3 else 0.05)
    figures = on_policy.measurements(lambda x: x, "cpu")
    assert (figures["on_policy_share"], figures["completion_length"]) == (share, 3.0)
    for start in range(0, 300, reuse):
        window = steps[start : start + reuse]
        for place in range(4):
            places = [step[place] for step in window]
            if "on_policy" in places[0]:
                assert all(batch is places[0] for batch in places)
            else:
                assert not any("on_policy" in batch for batch in places)
    assert {step % reuse for *_, step in rollouts.asked} == {0}


def test_fraction_0_changes_nothing(tmp_path):
    trainers = [make_trainer(tmp_path, section) for section in (None, {"fraction": 0.0})]
    weights = []
    for trainer in trainers:
        trainer.train()
        weights.append(trainer.student.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# ---- what is learnt ----


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "forward_kl"])
def test_a_step_equals_the_dense_one_on_the_same_tokens(tmp_path, divergence):
    """Cross entropy counts on the data alone, and every label divides the sum."""
    section = {"fraction": 0.5, "prompt_length": 3, "max_new_tokens": 8}
    options = {"divergence": divergence, "ce_weight": 0.5, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, section, max_steps=1, **options)
    start, steps = copy.deepcopy(trainer.student), spied(trainer)
    trainer.train()
    batches = steps[0]
    kinds = [batch.get("on_policy", False) for batch in batches]
    assert any(kinds)
    assert not all(kinds)

    objective = Objective(divergence=divergence)
    moved = []
    for dtype in (torch.float64, torch.float32):
        student, teacher = copy.deepcopy(start).to(dtype), tiny_llama(48, seed=1).to(dtype)
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch, is_written in zip(batches, kinds, strict=True):
            kd, ce, _ = dense_terms(student, teacher, batch, objective)
            total += (kd if is_written else kd + 0.5 * ce) / tokens
        total.backward()
        torch.optim.SGD(student.parameters(), lr=0.5).step()
        moved.append(dict(student.named_parameters()))
        if dtype == torch.float64:
            assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, param in trainer.student.named_parameters():
        truth, yardstick = (each[name] for each in moved)
        own = (yardstick.double() - truth).abs().max()
        budget = 2 * own + 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (param.double() - truth).abs().max() <= budget, name


def test_figures_of_cross_entropy_are_those_of_the_data(tmp_path):
    trainer = make_trainer(tmp_path, {"fraction": 1.0}, ce_weight=0.5, max_steps=1)
    trainer.train()
    assert "ce_loss" not in trainer.state.log_history[0]


def test_reverse_kl_on_what_the_student_writes_goes_down(tmp_path):
    student, teacher = tiny_llama(), tiny_llama(48, seed=1)
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 40}
    section = {"fraction": 1.0, "prompt_length": 2, "max_new_tokens": 12}
    trainer = make_trainer(tmp_path, section, None, student, teacher, **options)

    def reverse_kl():
        rollouts = StudentRollouts(student)
        prompts = [[i, i + 1] for i in range(3, 90)]
        written = rollouts.generate(prompts, trainer.on_policy.sampling, seed=123, step=0)
        rows = [p + w for p, w in zip(prompts, written, strict=True)]
        batch = batch_of([(row, [0, 0] + [1] * (len(row) - 2)) for row in rows])
        with torch.no_grad():
            kd, _, count = dense_terms(student, teacher, batch, Objective(divergence="reverse_kl"))
        return (kd / count).item()

    before = reverse_kl()
    trainer.train()
    assert reverse_kl() < 0.7 * before


# ---- checkpoints ----


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_resumed_run_equals_a_whole_one(tmp_path, reuse):
    section = {"fraction": 0.7, "prompt_length": 2, "max_new_tokens": 6, "reuse": reuse}
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6}

    def trainer(**more):
        student = tiny_llama(attention_dropout=0.1)
        return make_trainer(tmp_path, section, None, student, **options, **more)

    whole = trainer(save_strategy="steps", save_steps=2)
    whole.train()
    file = tmp_path / "checkpoint-4" / "rollouts_0.pt"
    assert file.is_file() == (reuse == 3)  # the next step begins a window, or is inside one
    resumed = trainer()
    steps = spied(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(steps) == 2
    expected, got = whole.student.state_dict(), resumed.student.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]


# ---- what cannot work ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_policy": {"fraction": 1.5}}, r"on_policy\.fraction: .*less than or equal to 1"),
        ({"on_policy": {"fraction": -0.1}}, r"on_policy\.fraction: .*greater than or equal to 0"),
        ({"on_policy": {"reuse": 0}}, r"on_policy\.reuse"),
        ({"on_policy": {"lmbda": 0.5}}, r"on_policy\.lmbda: unknown key"),
        ({"on_policy": {}, "kd_weight": 0.0, "ce_weight": 1.0}, "a kd_weight above 0"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_an_encoder_writes_nothing(tmp_path):
    hidden = {"layers": {1: 1}}
    with pytest.raises(ValueError, match="on_policy: expected kind causal_lm"):
        DistillConfig(output_dir=str(tmp_path), kind="encoder", hidden_states=hidden, on_policy={})


def test_the_length_comes_from_the_student_where_it_is_not_given(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, {})
    sampling = trainer.on_policy.sampling
    assert (sampling.max_length, sampling.stop, sampling.num_classes) == (128, (2,), 97)
    section = trainer.args.on_policy_options()
    monkeypatch.setattr(generation, "max_tokens", lambda config: None)
    with pytest.raises(ValueError, match="max_length: expected a number"):
        generation.sampling_of(section, trainer.student, None, None)
