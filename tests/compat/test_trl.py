"""`compat.trl` beside the TRL that is installed: values and gradients, and its trainers on ours."""

import importlib.util
import inspect

import pytest
import torch
from torch import nn

from modxfer_fast.compat import trl as ours
from tests.support.models import VOCAB_SIZE, tiny_llama

B, K, V, D_S, D_T = 2, 5, 11, 6, 8

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed"
)


@pytest.fixture(scope="module")
def theirs():
    """The modules and classes of TRL; their import is most of what this file costs."""
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.gold import GOLDTrainer
    from trl.trainer import distillation_trainer

    return {"gkd": GKDTrainer, "gold": GOLDTrainer, "distillation": distillation_trainer}


@pytest.fixture
def make():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def mask():
    return torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 1, 1]])


# --- functions


@pytest.mark.parametrize("trainer", ["gkd", "gold"])
def test_arguments_of_jsd(theirs, trainer):
    known = inspect.signature(theirs[trainer].generalized_jsd_loss).parameters
    mine = inspect.signature(ours.generalized_jsd_loss).parameters
    assert {name: p.default for name, p in known.items()}.items() <= {
        name: p.default for name, p in mine.items()
    }.items()
    if trainer == "gkd":
        assert list(known) == list(mine)[: len(known)]


def test_arguments_of_the_chunked_divergence(theirs):
    known = inspect.signature(theirs["distillation"]._chunked_divergence_loss).parameters
    mine = inspect.signature(ours.chunked_divergence_loss).parameters
    assert [(n, p.default) for n, p in known.items()] == [(n, p.default) for n, p in mine.items()]


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["logits", "flat", "probabilities", "bf16"])
def test_jsd(theirs, make, mask, reduction, beta, num_items, labelled, kind):
    student, teacher = make(B, K, V).requires_grad_(), make(B, K, V)
    labels = torch.where(mask == 1, V + 3, -100) if labelled else None  # their value is not read
    options = {"labels": labels, "beta": beta, "temperature": 1.5, "reduction": reduction}
    options["num_items_in_batch"] = num_items
    z_s, z_t, trainer = student, teacher, theirs["gkd"]
    if kind == "probabilities":  # of some classes alone, as GOLD asks it
        z_s, z_t = (z.softmax(-1)[..., : V // 2] for z in (z_s, z_t))
        options["logits_are_probs"], trainer = True, theirs["gold"]
    elif kind == "flat":
        z_s, z_t = z_s.flatten(0, 1), z_t.flatten(0, 1)
        options["labels"] = None if labels is None else labels.flatten()
    elif kind == "bf16":
        z_s, z_t = z_s.bfloat16(), z_t.bfloat16()
    expected = trainer.generalized_jsd_loss(z_s, z_t, **options)
    got = ours.generalized_jsd_loss(z_s, z_t, **options)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if kind == "bf16":
        return  # theirs is rounded at every step
    torch.testing.assert_close(got, expected)
    grads = [
        torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (expected, got)
    ]
    torch.testing.assert_close(grads[1], grads[0])


def test_jsd_of_bf16_logits_is_rounded_once(make):
    z_s, z_t = (make(B, K, V).bfloat16() for _ in range(2))
    truth = ours.generalized_jsd_loss(z_s.double(), z_t.double())
    assert ours.generalized_jsd_loss(z_s, z_t) == truth.bfloat16()


def test_a_reduction_that_is_none_of_theirs_is_refused(make):
    with pytest.raises(ValueError, match="reduction: expected one of batchmean"):
        ours.generalized_jsd_loss(make(3, V), make(3, V), reduction="avg")


@pytest.fixture
def heads(make):
    student = {
        "student_hidden_states": make(B, K, D_S).requires_grad_(),
        "student_lm_head_weight": make(V, D_S).requires_grad_(),
        "student_lm_head_bias": make(V).requires_grad_(),
    }
    return student, {
        "teacher_hidden_states": make(B, K, D_T),
        "teacher_lm_head_weight": make(V, D_T),
        "teacher_lm_head_bias": make(V),
    }


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize(
    "bends",
    [
        {},
        {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
        {"student_final_logit_softcapping": 2.0, "teacher_final_logit_softcapping": 3.0},
    ],
    ids=["plain", "scaled", "capped"],
)
def test_chunked_divergence(theirs, heads, mask, beta, num_items, bends):
    student, teacher = heads
    options = {**student, **teacher, **bends, "num_items_in_batch": num_items, "temperature": 1.7}
    functions = (theirs["distillation"]._chunked_divergence_loss, ours.chunked_divergence_loss)
    expected, got = (f(completion_mask=mask, beta=beta, **options) for f in functions)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a)
    assert not got[1].requires_grad
    grads = [torch.autograd.grad(values[0], tuple(student.values())) for values in (expected, got)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a)


def test_chunked_divergence_of_no_token(heads):
    student, teacher = heads
    nothing = torch.zeros(B, K)
    loss, entropy, count = ours.chunked_divergence_loss(
        **student, **teacher, completion_mask=nothing, beta=0.5
    )
    loss.backward()
    assert (loss, entropy, count) == (0, 0, 0)


# --- trainers


def batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, :3] = 0  # padded on the left, as TRL's collators do
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


@pytest.fixture
def trainer(theirs, tmp_path):
    """(name, student, teacher) -> one of TRL's trainers on batches of ids."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig
    from trl.experimental.gold import GOLDConfig

    from modxfer_fast.data import train_tokenizer

    tokenizer = train_tokenizer(["a few words"], VOCAB_SIZE)

    def build(name: str, student: nn.Module, teacher: nn.Module, **options):
        options = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "lmbda": 0.0,
            "beta": 0.3,
            "temperature": 1.4,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "disable_dropout": True,
            "remove_unused_columns": False,
            **options,
        }
        config = {"gkd": GKDConfig, "gold": GOLDConfig}[name](**options)
        return theirs[name](
            model=student,
            teacher_model=teacher,
            args=config,
            data_collator=lambda rows: batch(),
            train_dataset=Dataset.from_dict({"input_ids": [[3, 4], [5, 6]] * 4}),
            processing_class=tokenizer,
        )

    return build


@pytest.fixture
def patched(theirs):
    with ours.patch_trl() as report:
        yield report


@pytest.mark.parametrize("name", ["gkd", "gold"])
def test_compute_loss_is_trls(trainer, name):
    student, teacher = tiny_llama(), tiny_llama(48, seed=1)
    it = trainer(name, student, teacher)
    losses, grads = [], []
    for is_patched in (False, True):
        report = ours.patch_trl() if is_patched else None
        loss = it.compute_loss(student, batch(), num_items_in_batch=torch.tensor(11))
        student.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in student.parameters()])
        if report is not None:
            report.unpatch()
            assert not report.declined
    torch.testing.assert_close(losses[1], losses[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bends", [{"logit_scale": 0.25}, {"final_logit_softcapping": 2.0}])
def test_models_that_bend_their_logits(trainer, bends):
    if "logit_scale" in bends:
        from transformers import CohereConfig as Config
        from transformers import CohereForCausalLM as Model
    else:
        from transformers import Gemma2Config as Config
        from transformers import Gemma2ForCausalLM as Model
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "initializer_range": 0.5, "pad_token_id": 0, **bends}
    student = Model(Config(**sizes))
    it = trainer("gkd", student, tiny_llama(48, seed=1))
    expected = it.compute_loss(student, batch())
    with ours.patch_trl():
        torch.testing.assert_close(it.compute_loss(student, batch()), expected)


def test_mixed_precision_is_trls(trainer):
    student, teacher = tiny_llama(), tiny_llama(48, seed=1)
    it = trainer("gkd", student, teacher, bf16=True)
    model = it.accelerator.prepare(student)  # as `train` does: the forward is then under autocast
    expected = it.compute_loss(model, batch())
    with ours.patch_trl() as report:
        loss = it.compute_loss(model, batch())
        assert not report.declined
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)
    exact = tiny_llama()
    it = trainer("gkd", exact, teacher)
    assert it.compute_loss(exact, batch()) != expected  # autocast is on


@pytest.mark.parametrize("name", ["gkd", "gold"])
def test_training_makes_no_logits(trainer, patched, name, monkeypatch):
    student, teacher = tiny_llama(), tiny_llama(48, seed=1)
    it = trainer(name, student, teacher)
    it.compute_loss(student, batch())  # tries both heads
    for model in (student, teacher):
        monkeypatch.setattr(model.lm_head, "forward", None)
    before = student.lm_head.weight.detach().clone()
    it.train()
    losses = [row["loss"] for row in it.state.log_history if "loss" in row]
    assert losses[1] < losses[0]
    assert not torch.equal(student.lm_head.weight, before)
    assert not patched.declined


def test_distillation_trainer_end_to_end(theirs, tmp_path):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from modxfer_fast.data import train_tokenizer

    tokenizer = train_tokenizer(["a few words"], 300)
    size = len(tokenizer)
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 6,
        "beta": 0.3,
        "temperature": 1.4,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
    }
    logs = []
    for is_patched in (False, True):
        report = ours.patch_trl() if is_patched else None
        student = tiny_llama(vocab_size=size)
        it = DistillationTrainer(
            model=student,
            teacher_model=tiny_llama(48, seed=1, vocab_size=size),
            args=DistillationConfig(**options),
            train_dataset=Dataset.from_dict({"prompt": ["a few", "words", "a", "few words"]}),
            processing_class=tokenizer,
        )
        it.train()
        logs.append(
            [
                [row[n] for n in ("loss", "entropy", "grad_norm")]
                for row in it.state.log_history
                if "loss" in row
            ]
        )
        if report is not None:
            report.unpatch()
            assert not report.declined
    assert len(logs[0]) == 2
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-4, atol=1e-5)


def test_what_ours_does_not_cover_is_trls_and_counted(trainer, patched):
    student, teacher = tiny_llama(), tiny_llama(48, seed=1)
    it = trainer("gkd", student, teacher)
    loss, outputs = it.compute_loss(student, batch(), return_outputs=True)
    assert outputs.logits.shape == (2, 9, VOCAB_SIZE)
    torch.testing.assert_close(loss, it.compute_loss(student, batch()))
    assert patched.declined == {"GKDTrainer: the outputs are asked for": 1}
    assert "1 calls left to TRL: GKDTrainer: the outputs" in str(patched)


# --- patching


def test_patch_and_unpatch(theirs):
    places = [
        (theirs["distillation"], "_chunked_divergence_loss"),
        *(
            (theirs[n], f)
            for n in ("gkd", "gold")
            for f in ("generalized_jsd_loss", "compute_loss")
        ),
    ]
    before = [inspect.getattr_static(*place) for place in places]
    report = ours.patch_trl()
    assert len(report.patched) == len(places)
    assert not report.skipped
    assert not report.already_patched
    assert all(inspect.getattr_static(*p) is not b for p, b in zip(places, before, strict=True))
    again = ours.patch_trl()
    assert again.already_patched
    again.unpatch()  # it changed nothing
    assert ours.patch_trl().already_patched
    ours.unpatch_trl()
    assert [inspect.getattr_static(*place) for place in places] == before
    report.unpatch()
    assert [inspect.getattr_static(*place) for place in places] == before


def test_gold_passes_its_arguments_in_its_own_order(theirs, patched, make, mask):
    labels = torch.where(mask == 1, 0, -100)
    p, q = (make(B, K, V).softmax(-1) for _ in range(2))
    given = (p, q, labels, 0.5, 1.0, "sum", True, 3)
    expected = ours.generalized_jsd_loss(*given[:6], num_items_in_batch=3, logits_are_probs=True)
    torch.testing.assert_close(theirs["gold"].generalized_jsd_loss(*given), expected)


def test_a_trl_with_other_arguments_is_left_alone(theirs, monkeypatch):
    monkeypatch.setattr(theirs["distillation"], "_chunked_divergence_loss", lambda hidden: hidden)
    monkeypatch.delattr(theirs["gold"], "generalized_jsd_loss")
    with ours.patch_trl() as report:
        told = dict(report.skipped)
        assert told["DistillationTrainer._chunked_divergence_loss"] == "its arguments are hidden"
        assert "no generalized_jsd_loss" in told["GOLDTrainer.generalized_jsd_loss"]
        assert "left to TRL: GOLDTrainer.generalized_jsd_loss" in str(report)
        assert len(report.patched) == 3
