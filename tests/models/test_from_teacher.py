"""First weights of a student from its teacher."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

from modxfer_fast.models import ModelError, take_from_teacher, weights_digest
from modxfer_fast.models.from_teacher import principal_directions
from tests.encoder_models import tiny_encoder

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")
BLOCKS = {"distilbert": "transformer.layer"}


def teacher_model(family="bert", auto_class=AutoModel):
    return tiny_encoder(auto_class, family, 32, 5, seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_everything_else_are_copied(family):
    teacher, student = teacher_model(family), tiny_encoder(AutoModel, family, 32, 3)
    taken = take_from_teacher(student, teacher, layers=[0, 2, 4])
    source, blocks = teacher.state_dict(), BLOCKS.get(family, "encoder.layer")
    for name, value in student.state_dict().items():
        for ours, theirs in ((2, 4), (1, 2)):
            name = name.replace(f"{blocks}.{ours}.", f"{blocks}.{theirs}.")
        assert torch.equal(value, source[name]), name
    assert (taken.copied, taken.projected, taken.fresh) == (len(student.state_dict()), 0, [])


def test_all_blocks_make_the_teacher():
    teacher, student = teacher_model(), tiny_encoder(AutoModel, "bert", 32, 5)
    take_from_teacher(student, teacher, layers=[0, 1, 2, 3, 4])
    ids = torch.arange(5, 15)[None]
    outputs = [m.eval()(ids).last_hidden_state for m in (student, teacher)]
    assert torch.equal(*outputs)
    assert weights_digest(student) == weights_digest(teacher)
    with torch.no_grad():
        student.embeddings.word_embeddings.weight[3, 3] += 1e-4
    assert weights_digest(student) != weights_digest(teacher)


def test_blocks_alone_and_embeddings_alone():
    teacher = teacher_model()
    for layers, embeddings in (([4, 4], "none"), ([], "copy")):
        student = tiny_encoder(AutoModel, "bert", 32, 2)
        start = {name: value.clone() for name, value in student.state_dict().items()}
        taken = take_from_teacher(student, teacher, layers=layers, embeddings=embeddings)
        for name, value in student.state_dict().items():
            assert (name in taken.fresh) == (name.startswith("encoder.") != bool(layers)), name
            assert torch.equal(value, start[name]) or name not in taken.fresh


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_student_takes_principal_directions(family):
    teacher = tiny_encoder(AutoModel, family, 32, 2, seed=1)
    student = tiny_encoder(AutoModel, family, 16, 2)
    fresh_block = {n: p.clone() for n, p in student.state_dict().items() if "layer" in n}
    taken = take_from_teacher(student, teacher, layers=[], embeddings="pca")
    table = teacher.get_input_embeddings().weight.detach().double()
    _, values, directions = torch.linalg.svd(table, full_matrices=False)
    got = student.get_input_embeddings().weight.detach().double()
    # the best approximation of rank 16, whatever the signs of its directions
    best = table @ directions[:16].T @ directions[:16]
    basis, energy = principal_directions(table, 16)
    torch.testing.assert_close(got @ basis.T, best, rtol=0, atol=1e-5)
    assert energy == pytest.approx((values[:16] ** 2).sum().item() / (values**2).sum().item())
    assert taken.energy == pytest.approx(energy)
    positions = "embeddings.position_embeddings.weight"
    expected = teacher.state_dict()[positions].double() @ basis
    torch.testing.assert_close(
        student.state_dict()[positions].double(), expected, rtol=0, atol=1e-5
    )
    assert all(torch.equal(student.state_dict()[n], p) for n, p in fresh_block.items())
    assert taken.copied == 0
    assert {"embeddings.word_embeddings.weight", positions}.isdisjoint(taken.fresh)


def test_signs_do_not_depend_on_the_eigenvectors():
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    basis, energy = principal_directions(table, 6)
    assert energy == pytest.approx(1.0)
    flipped, _ = principal_directions(-table, 6)
    assert torch.equal(basis, flipped)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_tied_head_follows_the_embeddings():
    teacher = teacher_model(auto_class=AutoModelForMaskedLM)
    student = tiny_encoder(AutoModelForMaskedLM, "bert", 16, 2)
    taken = take_from_teacher(student, teacher, layers=[], embeddings="pca")
    head = student.get_output_embeddings().weight
    assert head is student.get_input_embeddings().weight
    assert "cls.predictions.decoder.weight" not in taken.fresh


def test_causal_models_and_shorter_tables():
    def llama(layers, seed):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
        return LlamaForCausalLM(config)

    teacher, student = llama(4, 0), llama(2, 1)
    take_from_teacher(student, teacher, layers=[1, 3])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    ours, theirs = student.model.layers[1].mlp.up_proj, teacher.model.layers[3].mlp.up_proj
    assert torch.equal(ours.weight, theirs.weight)

    short = tiny_encoder(AutoModel, "bert", 32, 2, max_position_embeddings=20)
    take_from_teacher(short, teacher_model(), layers=[])
    longer = teacher_model().embeddings.position_embeddings.weight
    assert torch.equal(short.embeddings.position_embeddings.weight, longer[:20])


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ({"hidden_size": 16}, {"layers": [0, 1]}, "expected the teacher's hidden_size 32"),
        ({"hidden_size": 16}, {"layers": []}, "can take embeddings: pca"),
        ({}, {"layers": [0]}, "for each of the student's 2, got 1"),
        ({}, {"layers": [0, 5]}, "expected blocks 0 to 4 of the teacher, got 5"),
        ({}, {"layers": [], "embeddings": "pca"}, "expected a student narrower than"),
        ({"family": "roberta"}, {"layers": []}, "of the teacher's architecture bert, got roberta"),
        ({"intermediate_size": 48}, {"layers": [0, 1]}, "intermediate.dense.weight with the"),
        ({"max_position_embeddings": 99}, {"layers": []}, "position_embeddings.weight with the"),
    ],
)
def test_what_does_not_fit_is_told(student, options, message):
    built = tiny_encoder(AutoModel, **{"family": "bert", "hidden_size": 32, **student})
    with pytest.raises(ModelError, match=f"from_teacher.*{message}"):
        take_from_teacher(built, teacher_model(), **options)
