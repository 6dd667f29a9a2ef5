"""Task models that learn from task models: the formula, both kinds, two tokenizers."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
)

from modxfer_fast.config import ConfigError
from modxfer_fast.engine import (
    DistillConfig,
    DistillTrainer,
    Objective,
    TaskHiddenOptions,
    TaskTextCollator,
    distil_task,
)
from modxfer_fast.engine.evaluation import without_repeated_samples
from modxfer_fast.engine.tasks.distillation import check_distillation
from modxfer_fast.kernels.common.head import Head
from tests.encoder_models import tiny_encoder, word_tokenizer

WORDS = ["paris", "is", "old", "anna", "went", "home", "rivers", "cold", "x", "by"]
LABELS = {0: "O", 1: "B-LOC", 2: "B-PER"}
ARGS = {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 0.2, "optim": "sgd"}
ARGS |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1}
SOFT = {"temperature": 2.0, "scale_by_temperature_squared": True}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The student's and the teacher's, which cut other words into pieces."""
    folders = [tmp_path_factory.mktemp(name) for name in ("student", "teacher")]
    pieces = (["paris", "is", "anna", "home"], ["old", "went", "riv", "##ers", "anna", "cold"])
    return [word_tokenizer(*both) for both in zip(folders, pieces, strict=True)]


def sentences(count: int) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 8, (count,), generator=draw).tolist()
    picks = [torch.randint(len(WORDS), (n,), generator=draw).tolist() for n in lengths]
    return Dataset.from_dict({"words": [[WORDS[i] for i in row] for row in picks]})


def pairs(count: int) -> Dataset:
    texts = [" ".join(words) for words in sentences(2 * count)["words"]]
    return Dataset.from_dict({"text_a": texts[:count], "text_b": texts[count:]})


def model(auto_class, tokenizer, hidden_size=32, num_layers=2, seed=0, **fields):
    sizes = {"vocab_size": len(tokenizer), "num_labels": 3, "seed": seed}
    built = tiny_encoder(auto_class, "bert", hidden_size, num_layers, **{**sizes, **fields})
    if "num_labels" not in fields:
        built.config.id2label = dict(LABELS)
    return built


def with_lora(built, task_type, targets=("query", "value")):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(built, LoraConfig(task_type, r=2, target_modules=list(targets)))


def rows_of(logits, inputs, tokenizer, texts, known):
    """Logits at the first piece of each word of `known` (indices by text), one by one."""
    found = []
    for b, words in enumerate(texts["words"]):
        encoding = tokenizer(words, is_split_into_words=True)
        for word in known[b]:
            found.append(logits[b, encoding.word_ids().index(word)])
    return torch.stack(found)


def kl(student, teacher, temperature=1.0):
    p, q = (x.double().div(temperature).log_softmax(-1) for x in (teacher, student))
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("options", [{}, SOFT], ids=["default", "soft"])
@pytest.mark.parametrize("other_tokenizer", [False, True], ids=["same", "other"])
def test_first_loss_of_a_token_classifier_is_the_formula(
    tmp_path, tokenizers, other_tokenizer, options
):
    ours, theirs = tokenizers if other_tokenizer else (tokenizers[0], tokenizers[0])
    texts = sentences(6)
    student = model(AutoModelForTokenClassification, ours)
    teacher = model(AutoModelForTokenClassification, theirs, 48, 3, seed=1)
    collator = TaskTextCollator(ours, theirs if other_tokenizer else None)
    batch = collator(list(texts))
    everything = [range(len(words)) for words in texts["words"]]
    expected = []
    for network, tokenizer, inputs in (
        (student, ours, batch),
        (teacher, theirs, batch.get("teacher_inputs", batch)),
    ):
        fed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = network.eval()(**fed).logits
        expected.append(rows_of(logits, fed, tokenizer, texts, everything))
    args = {**ARGS, "max_steps": 1, "gradient_accumulation_steps": 2}
    log = distil_task(
        student, teacher, texts, collator, args, seed=0, output_dir=tmp_path, **options
    )
    temperature = options.get("temperature", 1.0)
    assert log[0]["kd_loss"] == pytest.approx(kl(*expected, temperature).item(), rel=1e-5)
    assert log[0]["loss"] == pytest.approx(log[0]["kd_loss"] * temperature**2, rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_temperature_means_what_it_means_to_a_language_model(tmp_path, tokenizers, scaled):
    options = {"temperature": 2.0, "scale_by_temperature_squared": scaled}
    options |= {"kd_weight": 0.5, "ce_weight": 0.25}
    texts = pairs(6).add_column("label", [0, 2, 1, 1, 0, 2])
    student = model(AutoModelForSequenceClassification, tokenizers[0])
    teacher = model(AutoModelForSequenceClassification, tokenizers[0], 48, 3, seed=1)
    config = {**ARGS, "max_steps": 1, "per_device_train_batch_size": 6, "save_strategy": "no"}
    run = DistillTrainer(
        student,
        DistillConfig(output_dir=str(tmp_path), kind="classifier", **config, **options),
        teacher,
        texts,
        texts,
        data_collator=TaskTextCollator(tokenizers[0]),
    )
    before = deepcopy(student).eval()
    batch = TaskTextCollator(tokenizers[0])(list(texts))
    labels = batch.pop("labels")
    with torch.no_grad():
        target = teacher(**batch).logits
    # a head that passes logits on makes a language model's terms of a classifier's
    head = torch.eye(3)
    logits = before(**batch).logits
    expected = Objective(**options).terms(
        Head(logits, head), Head(target, head), labels, None, None
    )
    expected.loss.backward()
    measured = run.evaluate()
    run.train()
    logged = next(entry for entry in run.state.log_history if "loss" in entry)
    for value, name in ((expected.kd, "kd"), (expected.ce, "ce")):
        assert measured[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5)
        assert logged[f"{name}_loss"] == pytest.approx(value.item(), rel=1e-5)
    for value in (logged["loss"], measured["eval_loss"]):
        assert value == pytest.approx(expected.loss.item(), rel=1e-5)
    assert "eval_perplexity" not in measured
    for moved, start in zip(student.parameters(), before.parameters(), strict=True):
        if start.grad is not None:
            torch.testing.assert_close((start - moved) / 0.2, start.grad, rtol=1e-3, atol=1e-5)


def test_words_that_one_side_cuts_off_do_not_count(tokenizers):
    ours, theirs = tokenizers
    texts = [{"words": ["rivers", "paris", "home"]}, {"words": ["is", "rivers"]}]
    batch = TaskTextCollator(ours, theirs, max_length=8)(texts)
    # rivers is six pieces of the student: with the special ones no room is left for a second word
    assert batch["rows"].tolist() == [1, 8 + 1, 8 + 2]
    width = batch["teacher_inputs"]["input_ids"].shape[1]
    assert width > 5
    of_is = theirs(["is"], is_split_into_words=True)["input_ids"]
    assert batch["teacher_rows"].tolist() == [1, width + 1, width + len(of_is) - 1]


@pytest.mark.parametrize("other_tokenizer", [False, True])
def test_tags_become_labels_of_the_words_that_count(tokenizers, other_tokenizer):
    ours, theirs = tokenizers
    texts = [
        {"words": ["rivers", "paris", "home"], "tags": [2, 1, 0]},
        {"words": ["is", "rivers"], "tags": [1, 2]},
    ]
    batch = TaskTextCollator(ours, theirs if other_tokenizer else None, max_length=8)(texts)
    labels = batch["labels"].flatten()
    assert labels[batch["rows"]].tolist() == [2, 1, 2]
    assert (labels != -100).sum() == 3
    assert "labels" not in TaskTextCollator(ours)([{"words": ["is"]}])
    pair = {"text_a": "is", "text_b": "home", "label": 1}
    assert TaskTextCollator(ours)([pair])["labels"].tolist() == [1]


def test_a_tokenizer_limits_the_length(tokenizers):
    ours = deepcopy(tokenizers[0])
    ours.model_max_length = 8
    batch = TaskTextCollator(ours, max_length=64)([{"words": ["rivers"] * 9}])
    assert batch["input_ids"].shape == (1, 8)


def test_gradient_accumulation_changes_nothing(tmp_path, tokenizers):
    trained = []
    for size, accumulated in ((6, 1), (2, 3)):
        student = model(AutoModelForTokenClassification, tokenizers[0])
        teacher = model(AutoModelForTokenClassification, tokenizers[0], seed=1)
        args = {**ARGS, "per_device_train_batch_size": size, "max_steps": 1}
        args |= {
            "gradient_accumulation_steps": accumulated,
            "train_sampling_strategy": "sequential",
        }
        hidden = {"layers": {2: 2}, "weight": 0.5}
        collator = TaskTextCollator(tokenizers[0])
        distil_task(
            student,
            teacher,
            sentences(6),
            collator,
            args,
            hidden=hidden,
            seed=0,
            output_dir=tmp_path,
        )
        trained.append(student.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["tokens", "sequences"])
def test_a_peft_student_learns_its_teachers_module(tmp_path, tokenizers, task):
    auto_class, task_type, texts = {
        "tokens": (AutoModelForTokenClassification, "TOKEN_CLS", sentences(24)),
        "sequences": (AutoModelForSequenceClassification, "SEQ_CLS", pairs(24)),
    }[task]
    student = with_lora(model(auto_class, tokenizers[0]), task_type)
    teacher = with_lora(model(auto_class, tokenizers[1], 48, 3, seed=1), task_type)
    frozen = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    args = {**ARGS, "max_steps": 30, "optim": "adamw_torch", "learning_rate": 0.02}
    log = distil_task(
        student,
        teacher,
        texts,
        TaskTextCollator(*tokenizers),
        args,
        seed=0,
        output_dir=tmp_path,
    )
    losses = [entry["kd_loss"] for entry in log if "kd_loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())


def test_equal_seeds_give_equal_students(tmp_path, tokenizers):
    def trained(seed):
        student = model(AutoModelForTokenClassification, tokenizers[0], hidden_dropout_prob=0.1)
        teacher = model(AutoModelForTokenClassification, tokenizers[0], seed=1)
        collator = TaskTextCollator(tokenizers[0])
        distil_task(student, teacher, sentences(9), collator, ARGS, seed=seed, output_dir=tmp_path)
        return student.state_dict()

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("as_space_map", [False, True], ids=["matrix", "map"])
def test_hidden_states_go_through_frozen_maps(tmp_path, tokenizers, as_space_map):
    class Map:
        def __init__(self, read, offset):
            self.read, self.offset = read, offset

    draw = torch.Generator().manual_seed(0)
    read = torch.randn(32, 48, generator=draw, dtype=torch.float64)
    offset = torch.randn(48, generator=draw, dtype=torch.float64) * as_space_map
    texts = sentences(6)
    student = model(AutoModelForTokenClassification, tokenizers[0])
    teacher = model(AutoModelForTokenClassification, tokenizers[1], 48, 3, seed=1)
    collator = TaskTextCollator(*tokenizers)
    batch = collator(list(texts))
    states = []
    for network, inputs, rows, layer in (
        (student, batch, batch["rows"], 1),
        (teacher, batch["teacher_inputs"], batch["teacher_rows"], 2),
    ):
        fed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            hidden = network.eval()(**fed, output_hidden_states=True).hidden_states[layer]
        states.append(hidden.flatten(0, 1)[rows].double())
    expected = (states[0] @ read + offset - states[1]).square().mean()
    hidden = TaskHiddenOptions(
        {1: 2}, maps={1: Map(read, offset) if as_space_map else read}, weight=0.1
    )
    args = {**ARGS, "max_steps": 1, "per_device_train_batch_size": 6}
    log = distil_task(
        student,
        teacher,
        texts,
        collator,
        args,
        kd_weight=0.0,
        hidden=hidden,
        seed=0,
        output_dir=tmp_path,
    )
    assert log[0]["hidden_loss"] == pytest.approx(0.1 * expected.item(), rel=1e-4)
    assert log[0]["loss"] == pytest.approx(log[0]["hidden_loss"], rel=1e-5)
    assert "kd_loss" not in log[0]


def test_hidden_states_of_pairs_need_one_tokenizer(tmp_path, tokenizers):
    student = model(AutoModelForSequenceClassification, tokenizers[0])
    teacher = model(AutoModelForSequenceClassification, tokenizers[1], seed=1)
    texts = Dataset.from_dict({"text_a": ["the old house"] * 4, "text_b": ["by one", "near"] * 2})
    with pytest.raises(ValueError, match="hidden: expected teacher_rows beside teacher_inputs"):
        distil_task(
            student,
            teacher,
            texts,
            TaskTextCollator(*tokenizers),
            {**ARGS, "max_steps": 1},
            hidden=TaskHiddenOptions({1: 1}),
            seed=0,
            output_dir=tmp_path,
        )


def test_labels_add_cross_entropy(tmp_path, tokenizers):
    tokenizer = tokenizers[0]
    encoded = tokenizer(list(sentences(6)["words"]), is_split_into_words=True)
    labels = [[-100] + [1, 2] + [-100] * (len(ids) - 3) for ids in encoded["input_ids"]]
    rows = Dataset.from_dict({"input_ids": encoded["input_ids"], "labels": labels})
    collator = DataCollatorForTokenClassification(tokenizer)
    student = model(AutoModelForTokenClassification, tokenizer)
    teacher = model(AutoModelForTokenClassification, tokenizer, seed=1)
    batch = collator(list(rows))
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        answers = [m.eval()(**inputs).logits[batch["labels"] != -100] for m in (student, teacher)]
    ce = F.cross_entropy(answers[0], batch["labels"][batch["labels"] != -100]).item()
    args = {**ARGS, "max_steps": 1}
    args |= {"gradient_accumulation_steps": 2}
    log = distil_task(
        student,
        teacher,
        rows,
        collator,
        args,
        kd_weight=0.5,
        ce_weight=2.0,
        seed=0,
        output_dir=tmp_path,
    )
    assert log[0]["ce_loss"] == pytest.approx(ce, rel=1e-5)
    expected = 0.5 * kl(*answers).item() + 2.0 * ce
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_does_not_fit_is_told(tmp_path, tokenizers):
    def run(student, teacher, args=ARGS, **options):
        collator = TaskTextCollator(tokenizers[0])
        texts = sentences(3)
        distil_task(student, teacher, texts, collator, args, seed=0, output_dir=tmp_path, **options)

    def tokens(**fields):
        return model(AutoModelForTokenClassification, tokenizers[0], **fields)

    with pytest.raises(ValueError, match="expected the student's labels O, B-LOC, B-PER, got"):
        run(tokens(), tokens(num_labels=2))
    renamed = tokens()
    renamed.config.id2label = {0: "O", 1: "B-PER", 2: "B-LOC"}
    with pytest.raises(ValueError, match="got O, B-PER, B-LOC"):
        run(tokens(), renamed)
    sequences = model(AutoModelForSequenceClassification, tokenizers[0])
    with pytest.raises(ValueError, match="expected a classifier of tokens, got one of sequences"):
        run(tokens(), sequences)
    with pytest.raises(ValueError, match="all are frozen"):
        run(tokens().requires_grad_(False), tokens())
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        run(tokens(), tokens(), temperature=0)
    with pytest.raises(ValueError, match=r"hidden\.maps: expected shape"):
        run(tokens(), tokens(hidden_size=48), hidden={"layers": {1: 1}, "maps": {1: torch.eye(32)}})
    with pytest.raises(ValueError, match=r"hidden\.maps: expected one for each student layer 1"):
        run(tokens(), tokens(), hidden={"layers": {1: 1}, "maps": {2: torch.eye(32)}})
    with pytest.raises(ConfigError, match=r"training\.max_stepz: unknown key"):
        run(tokens(), tokens(), {"max_stepz": 1})
    with pytest.raises(ValueError, match="expected a model of its own"):
        run(same := tokens(), same)
    broken = tokens()
    broken.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="teacher: expected weights that are finite, got NaN"):
        run(tokens(), broken)
    with pytest.raises(ValueError, match="expected a task model"):
        run(model(AutoModel, tokenizers[0]), tokens())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"loss_impl": "dense"}, "loss_impl: expected fused"),
        ({"workspace_mb": 64}, "workspace_mb"),
        ({"filter_eps": 1e-4}, "filter_eps: expected None"),
        ({"gradients": "recompute"}, "gradients: expected forward"),
    ],
)
def test_options_of_a_fused_head_are_refused(tmp_path, option, message):
    with pytest.raises(ValueError, match=f"{message}.* with kind 'classifier'"):
        DistillConfig(output_dir=str(tmp_path), kind="classifier", **option)


@pytest.mark.parametrize(
    ("auto_class", "texts"),
    [
        (AutoModelForTokenClassification, sentences(2)),
        (AutoModelForSequenceClassification, pairs(2)),
    ],
    ids=["tokens", "sequences"],
)
def test_every_rank_refuses_repeated_samples(tmp_path, monkeypatch, tokenizers, auto_class, texts):
    # of two ranks the first repeats nothing, and would wait for the other in a collective
    run = DistillTrainer(
        model(auto_class, tokenizers[0]),
        DistillConfig(output_dir=str(tmp_path), kind="classifier", per_device_eval_batch_size=2),
        model(auto_class, tokenizers[0], seed=1),
        texts,
        data_collator=TaskTextCollator(tokenizers[0]),
    )
    monkeypatch.setattr(DistillConfig, "world_size", 2)
    batch = run.data_collator(list(texts))
    whole = SimpleNamespace(end_of_dataloader=True, remainder=0)
    assert without_repeated_samples(batch, run.args, whole, False) == batch
    for rank in (0, 1):
        monkeypatch.setattr(DistillConfig, "process_index", rank)
        state = SimpleNamespace(end_of_dataloader=True, remainder=3)
        with pytest.raises(ValueError, match="rows of classifiers cannot be left out"):
            without_repeated_samples(batch, run.args, state, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("bf16_full_eval", True),
        ("save_only_model", True),
        ("average_tokens_across_devices", False),
        ("gradient_accumulation_steps", 0),
    ],
)
def test_what_the_engine_cannot_honour_is_told_before_any_work(field, value):
    with pytest.raises(ConfigError, match=rf"transfer\.refine\.training: {field}: expected"):
        check_distillation({field: value}, "transfer.refine.training")


@pytest.mark.parametrize("task", ["tokens", "sequences"])
def test_a_step_never_waits_for_the_device(tmp_path, monkeypatch, tokenizers, task):
    # tensors on the meta device have no values: whoever asks for one, or for how many there are
    # of some kind, as a GPU would have to tell the host, raises
    def on_meta(value):
        if isinstance(value, dict):
            return {name: on_meta(each) for name, each in value.items()}
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    # transformers itself asks whether a mask is all ones
    ask = "transformers.masking_utils._ignore_bidirectional_mask_sdpa"
    monkeypatch.setattr(ask, lambda *args, **kwargs: False)
    auto_class, texts = {
        "tokens": (AutoModelForTokenClassification, sentences(3)),
        "sequences": (AutoModelForSequenceClassification, pairs(3)),
    }[task]
    labelled = [
        text | ({"tags": [1] * len(text["words"])} if task == "tokens" else {"label": 2})
        for text in texts
    ]
    theirs = tokenizers[1] if task == "tokens" else None
    run = DistillTrainer(
        model(auto_class, tokenizers[0]),
        DistillConfig(
            output_dir=str(tmp_path),
            report_to="none",
            kind="classifier",
            ce_weight=0.5,
            hidden_states={"layers": {1: 2}},
        ),
        model(auto_class, theirs or tokenizers[0], 48, 3, seed=1),
        texts,
        data_collator=TaskTextCollator(tokenizers[0], theirs),
    )
    batch = on_meta(run.data_collator(labelled))
    module = run.model.to("meta").train()
    run.model.teacher.to("meta")
    run._get_num_items_in_batch([batch, batch], torch.device("meta"))
    assert set(run._in_batch) == {f"num_{name}_in_batch" for name in ("rows", "items", "tokens")}
    loss = run.compute_loss(module, batch)
    loss.backward()
    assert all(param.grad is not None for param in module.parameters())
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        loss.item()


@pytest.mark.parametrize("task", ["tokens", "sequences"])
@pytest.mark.parametrize("hidden", [None, {"layers": {1: 1}}], ids=["logits", "hidden"])
def test_rows_are_looked_for_where_something_reads_them(tmp_path, tokenizers, task, hidden):
    auto_class = {
        "tokens": AutoModelForTokenClassification,
        "sequences": AutoModelForSequenceClassification,
    }[task]
    run = DistillTrainer(
        model(auto_class, tokenizers[0]),
        DistillConfig(output_dir=str(tmp_path), kind="classifier", hidden_states=hidden),
        model(auto_class, tokenizers[0], seed=1),
        data_collator=lambda texts: dict(tokenizers[0](texts, padding=True, return_tensors="pt")),
    )
    batch = run.data_collator(["paris is old", "anna"])
    assert batch["num_tokens"] == batch["attention_mask"].sum()
    if task == "tokens" or hidden is not None:
        assert torch.equal(batch["rows"], batch["attention_mask"].flatten().nonzero().flatten())
    else:
        assert "rows" not in batch
    assert run.model(**batch)["loss"].isfinite()


def test_updates_that_are_not_finite_are_left_out(tmp_path, tokenizers):
    student = model(AutoModelForTokenClassification, tokenizers[0])
    teacher = model(AutoModelForTokenClassification, tokenizers[0], seed=1)
    calls = []

    def poison(module, args, output):
        calls.append(0)
        return output * float("nan") if len(calls) == 2 else output

    student.classifier.register_forward_hook(poison)
    collator = TaskTextCollator(tokenizers[0])
    log = distil_task(student, teacher, sentences(12), collator, ARGS, seed=0, output_dir=tmp_path)
    assert [entry.get("skipped_steps") for entry in log if "loss" in entry] == [None, 1, 1, 1]
    assert all(param.isfinite().all() for param in student.parameters())
