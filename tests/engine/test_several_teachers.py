"""Several teachers, mixed or routed by the data, against the loss of each document by hand."""

import pytest
import torch

from modxfer_fast.data import CausalCollator
from modxfer_fast.data.facts import TEACHER
from modxfer_fast.engine import (
    DistillModule,
    DistillTrainer,
    Objective,
    SelfDistillation,
    SeveralTeachers,
    Teacher,
    nonfinite,
)
from modxfer_fast.engine.batch import Answer
from modxfer_fast.engine.teachers.several import INDEX, ROWS
from modxfer_fast.kernels.linear_kd_loss import TeacherHead, TeacherMixture
from modxfer_fast.models import ModelError
from tests.support.models import tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.several_teachers import (
    CE_WEIGHT,
    KD_WEIGHT,
    NAMES,
    TEMPERATURE,
    WEIGHTS,
    RoutedRows,
    distance_of,
    loss_of_document,
    teacher_models,
    train_by_hand,
    with_adapters,
)

STEPS, ACCUMULATION, BATCH = 2, 2, 2
OPTIONS = {"kd_weight": KD_WEIGHT, "ce_weight": CE_WEIGHT, "temperature": TEMPERATURE}
ROUTED = RoutedRows(STEPS * ACCUMULATION * BATCH)


def several(of: str) -> SeveralTeachers:
    return SeveralTeachers(teacher_models(), None if of == "route" else WEIGHTS, of)


def trainer(folder, teacher, packed=True, rollouts=None, student=None, **options) -> DistillTrainer:
    args = plain_sgd(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=ACCUMULATION,
        **{**OPTIONS, **options},
    )
    return DistillTrainer(
        student or tiny_llama(),
        args,
        teacher,
        ROUTED,
        RoutedRows(5),
        data_collator=CausalCollator(0, packed=packed),
        rollouts=rollouts,
    )


@pytest.mark.parametrize("of", ["route", "probabilities", "losses"])
def test_weights_are_those_of_the_loss_by_hand(tmp_path, of):
    truth, yardstick = (
        train_by_hand(ROUTED, ACCUMULATION * BATCH, of, 0.5, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    start = tiny_llama().state_dict()
    moved = torch.cat([(truth[k] - start[k]).flatten() for k in truth]).norm()

    def distance(state):
        return torch.cat([(truth[k] - state[k].double()).flatten() for k in truth]).norm() / moved

    trained = trainer(tmp_path, several(of))
    trained.train()
    assert distance(trained.student.state_dict()) <= 2 * distance(yardstick) + 1e-6


@pytest.mark.parametrize(
    ("of", "sources"), [("route", ("base", "start")), ("probabilities", ("base",))]
)
def test_the_student_itself_is_a_teacher_like_others(tmp_path, of, sources):
    given: dict = teacher_models()
    models = list(given.values())
    for number, source in enumerate(sources):
        given[NAMES[number]] = SelfDistillation(source)
        models[number] = tiny_llama() if source == "base" else with_adapters()
    truth, yardstick = (
        train_by_hand(ROUTED, ACCUMULATION * BATCH, of, 0.5, dtype, with_adapters(), models)
        for dtype in (torch.float64, torch.float32)
    )
    teachers = SeveralTeachers(given, None if of == "route" else WEIGHTS, of)
    trained = trainer(tmp_path, teachers, student=with_adapters())
    trained.train()
    start = with_adapters().state_dict()
    got = distance_of(trained.student.state_dict(), truth, start)
    assert got <= 2 * distance_of(yardstick, truth, start) + 1e-6
    assert isinstance(teachers.teachers["code"], SelfDistillation)  # of the next student too
    trained.save_model(str(tmp_path / "model"))
    kept = [file.name for file in (tmp_path / "model").glob("self_teacher*")]
    assert kept == (["self_teacher-chat.safetensors"] if "start" in sources else [])


@pytest.mark.parametrize("of", ["route", "probabilities", "losses"])
def test_held_out_figures(tmp_path, of):
    """In which each token counts once, with the teacher, or the mixture, that it has."""
    got = trainer(tmp_path, several(of), kd_weight=1.0, ce_weight=0.0).evaluate()
    student, teachers = tiny_llama().double(), [m.double() for m in teacher_models().values()]
    documents = [pair for row in RoutedRows(5).documents for pair in row]
    with torch.no_grad():
        sums = [loss_of_document(student, teachers, *pair, of) for pair in documents]
    expected = (sum(sums) / sum(len(ids) - 1 for ids, _ in documents)).item()
    measured = KD_WEIGHT * got["eval_kd"] + CE_WEIGHT * got["eval_ce"]
    assert measured == pytest.approx(expected, rel=1e-5)


def seen_by(teachers: SeveralTeachers) -> dict[str, list]:
    """Filled with the input ids of each call of each teacher."""
    seen = {name: [] for name in teachers.teachers}
    for name, teacher in teachers.teachers.items():
        teacher.model.model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(kwargs["input_ids"].tolist()),
            with_kwargs=True,
        )
    return seen


def module_of(teacher) -> DistillModule:
    return DistillModule(tiny_llama(), teacher, Objective(**OPTIONS))


def test_a_teacher_reads_its_own_rows_alone():
    teachers = several("route")
    seen = seen_by(teachers)
    module = module_of(teachers)
    rows = [RoutedRows(4)[i] for i in (0, 1, 3)]
    batch = module.collator(CausalCollator(0))(rows)
    module(**batch)["loss"].backward()
    ids = batch["input_ids"].tolist()
    assert seen == {"code": [[ids[0], ids[1]]], "chat": [[ids[1], ids[2]]], "rare": [[ids[2]]]}


class Fixed:
    """Writes two tokens behind each prompt."""

    def generate(self, prompts, sampling, *, seed, step):
        return [[4, 5] for _ in prompts]


def test_what_a_student_writes_has_the_teacher_of_its_prompt(tmp_path):
    of_policy = trainer(tmp_path, several("route"), False, Fixed(), on_policy={"fraction": 1.0})
    rows = [
        {"input_ids": [6, 7, 8], "is_target": [False, False, True], "lengths": [3], TEACHER: [n]}
        for n in (2, 0)
    ]
    (written,) = of_policy.on_policy.mixed([of_policy.data_collator(rows)], step=0)
    assert written["input_ids"].tolist() == [[6, 7, 4, 5]] * 2
    assert written[INDEX].tolist() == [[2] * 4, [0] * 4]
    assert [found.tolist() for found in written[ROWS]] == [[1], [], [0]]


def test_one_teacher_in_a_batch_is_as_that_teacher_alone():
    teachers, row = several("route"), RoutedRows(1)[0]
    batch = module_of(teachers).collator(CausalCollator(0))([row])
    alone = {key: value for key, value in batch.items() if key not in (INDEX, ROWS)}
    expected = module_of(Teacher(teacher_models()["code"]))(**alone)["loss"]
    assert torch.equal(module_of(teachers)(**batch)["loss"], expected)


@pytest.mark.parametrize(
    ("of", "broken", "is_told"),
    [("route", "chat", False), ("route", "code", True), ("probabilities", "chat", True)],
)
def test_a_broken_teacher_is_told_where_it_is_asked(of, broken, is_told):
    teachers, row = several(of), RoutedRows(1)[0]  # of "code"
    module = module_of(teachers)
    batch = module.collator(CausalCollator(0))([row])
    teachers.teachers[broken].model.model.norm.weight.data.fill_(float("nan"))
    module(**batch)
    sums = module.meter.totals(lambda tensor: tensor, torch.device("cpu"))
    assert (sums["nonfinite_teacher"] > 0) is is_told


def test_a_token_is_told_by_its_own_teacher():
    whole, broken = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    broken[0, 1] = float("nan")
    heads = [TeacherHead(hidden, torch.zeros(5, 4)) for hidden in (whole, broken)]
    for numbers, expected in (([1, 0, 1], True), ([0, 1, 0], False)):
        mixture = TeacherMixture(heads, route=torch.tensor([numbers]))
        assert Answer(whole, mixture=mixture).is_finite().tolist() == [[True, expected, True]]
    mixture = TeacherMixture(heads, [0.5, 0.5])
    assert Answer(whole, mixture=mixture).is_finite().tolist() == [[True, False, True]]


def test_weights_that_are_not_finite_are_named(tmp_path):
    teachers = several("route")
    teachers.teachers["chat"].model.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"teacher: expected weights .*chat\.lm_head\.weight"):
        trainer(tmp_path, teachers).train()
    assert set(nonfinite.models_of(module_of(teachers))) == {
        "student",
        *(f"teacher.{name}" for name in NAMES),
    }


def test_classes_that_all_have_count():
    models = {"small": tiny_llama(seed=1), "padded": tiny_llama(seed=2, vocab_size=104)}
    teachers = SeveralTeachers(models)
    with pytest.raises(ValueError, match=r"teachers\.padded: teacher: expected the student's 97"):
        module_of(teachers)
    teachers.num_tokens = 97
    batch = CausalCollator(0)([RoutedRows(1)[0]])
    got = module_of(teachers)(**batch)["loss"]
    with torch.no_grad():
        cut = tiny_llama(seed=2)
        cut.load_state_dict(
            {
                name: value[: len(cut.get_parameter(name))]
                for name, value in models["padded"].state_dict().items()
            }
        )
    expected = module_of(SeveralTeachers({"small": models["small"], "cut": cut}))(**batch)["loss"]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": {}}, "teachers: expected at least one"),
        ({"of": "sum"}, "of: expected one of probabilities, losses, route"),
        ({"weights": {"cod": 1.0}}, "weights: expected names of code, chat, rare, got 'cod'"),
        ({"weights": {"code": 0.0}}, "weights: expected more than 0 of code, got 0.0"),
        ({"of": "route", "weights": {"code": 1.0}}, "weights: expected none with of='route'"),
    ],
)
def test_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        SeveralTeachers(**{"teachers": teacher_models(), **change})


def test_what_is_no_teacher():
    with pytest.raises(TypeError, match=r"teachers: expected causal language models.* got Several"):
        SeveralTeachers({"some": several("route")})


def test_batches_that_name_no_teacher():
    module, rows = module_of(several("route")), [RoutedRows(1)[0]]
    collator = module.collator(CausalCollator(0))
    with pytest.raises(ValueError, match="teacher: expected batches with teacher_index"):
        module(**CausalCollator(0)(rows))
    with pytest.raises(ValueError, match=r"teacher_index: expected numbers in \[0, 3\).* got 3"):
        collator([{**rows[0], TEACHER: [0, 3]}])
    del rows[0][TEACHER]
    with pytest.raises(ValueError, match="data_collator: expected teacher_index"):
        collator(rows)
