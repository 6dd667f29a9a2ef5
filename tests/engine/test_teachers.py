"""A teacher is what answers as one: a cached one, which holds no model, trains the same student."""

from types import SimpleNamespace

import pytest
import torch

from modxfer_fast.config import HiddenStatesSection
from modxfer_fast.engine import DistillConfig, DistillModule, DistillTrainer, Objective, Teacher
from modxfer_fast.engine.batch import Batch
from modxfer_fast.engine.features.taps import LayerStates
from tests.support.models import TokenDataset, align_collate, tiny_llama

DATA = TokenDataset(6)
HIDDEN = HiddenStatesSection(layers={1: 1, 2: 3})


def teacher_model():
    return tiny_llama(48, 3, seed=1)


class CachedTeacher:
    """Answers what a model said before, found by the ids it is asked about."""

    kind = "causal_lm"
    num_tokens = None

    def __init__(self, model, batches: list[dict]):
        source = Teacher(model)
        self.classes = source.classes
        self._geometry = source.taps()
        self._geometry.hidden_layers = (1, 2, 3)
        self._answers = {}
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            answer = source.answer(Batch(inputs), self._geometry)
            self._answers[self._key(inputs)] = answer
        self.asked = 0

    @staticmethod
    def _key(inputs) -> bytes:
        return inputs["input_ids"].numpy().tobytes()

    def to(self, device):
        return self

    def nonfinite_parameters(self):
        return []

    def taps(self):
        facts = ("num_layers", "hidden_width")
        return SimpleNamespace(**{name: getattr(self._geometry, name) for name in facts})

    def answer(self, batch, taps=None):
        self.asked += 1
        answer = self._answers[self._key(batch.inputs)]
        layers = () if taps is None else taps.hidden_layers
        wanted = {layer: answer.states.hidden[layer] for layer in layers}
        return answer._replace(states=LayerStates(wanted))


def gradients(teacher, batches, hidden):
    module = DistillModule(tiny_llama(), teacher, Objective(ce_weight=0.3), hidden).train()
    for batch in batches:
        module(**batch)["loss"].backward()
    return {name: param.grad for name, param in module.named_parameters()}


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["logits", "hidden"])
def test_a_cached_teacher_gives_the_same_gradients(hidden):
    batches = [align_collate([DATA[i], DATA[i + 1]]) for i in (0, 2, 4)]
    cached = CachedTeacher(teacher_model(), batches)
    expected = gradients(Teacher(teacher_model()), batches, hidden)
    got = gradients(cached, batches, hidden)
    assert cached.asked == len(batches)
    assert any(grad.any() for grad in expected.values())
    assert all(torch.equal(got[name], grad) for name, grad in expected.items())


def test_the_trainer_takes_a_cached_teacher(tmp_path):
    args = DistillConfig(
        output_dir=str(tmp_path),
        report_to="none",
        max_steps=2,
        per_device_train_batch_size=3,
        train_sampling_strategy="sequential",
    )
    batches = [align_collate([DATA[i] for i in part]) for part in ((0, 1, 2), (3, 4, 5))]
    teachers = (teacher_model(), CachedTeacher(teacher_model(), batches))
    states = []
    for teacher in teachers:
        student = tiny_llama()
        run = DistillTrainer(
            student, args, teacher, DATA, [DATA[i] for i in range(3)], data_collator=align_collate
        )
        run.train()
        states.append((student.state_dict(), run.evaluate()["eval_loss"]))
    (one, loss), (other, other_loss) = states
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert loss == other_loss


def test_what_is_no_teacher_is_told(tmp_path):
    args = DistillConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(
        TypeError, match="teacher: expected a PreTrainedModel, PeftModel or Teacher"
    ):
        DistillTrainer(tiny_llama(), args, object(), DATA, data_collator=align_collate)
    cached = CachedTeacher(tiny_llama(48, vocab_size=50), [])
    with pytest.raises(ValueError, match="expected the student's 97 output classes, got 50"):
        DistillTrainer(tiny_llama(), args, cached, DATA, data_collator=align_collate)
