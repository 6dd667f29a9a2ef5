"""A causal language model as the fused loss needs it: backbone, linear head, and what bends logits.

    logits = cap tanh(scale (backbone(input_ids) @ weight.T + bias) / cap)

Scale and cap are those of the model's configuration, by the table of models/logits.py. Whether the
model is of this form is tried on its own head, not looked up by name: a stand-in replaces the
backbone, and the logits of the model's real `forward` are compared with the formula.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from modxfer_fast.data.collator import IGNORE_INDEX, VARLEN
from modxfer_fast.engine.batch import Answer, Batch, Share, Terms, TokenSet
from modxfer_fast.engine.deepspeed import gathered
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.labels import AlignedLabels
from modxfer_fast.engine.objective import Objective
from modxfer_fast.engine.students.text import TextModel, read_tokens
from modxfer_fast.kernels.common import Bend
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.linear_kd_loss.mixture import Mixture
from modxfer_fast.models.architecture import without_peft
from modxfer_fast.models.checks import has_values, true_shape
from modxfer_fast.models.logits import bends_of, entries_of


@dataclass(frozen=True)
class SplitCausalLM(TextModel):
    """Backbone and head of one model.

    Attributes:
        head: linear map to the vocabulary, weight [V, D], bias [V] or None.
        bend: what the model does to the logits that the head gives.
    """

    kind = "causal_lm"
    is_causal = True
    row = "output classes"

    head: nn.Linear
    bend: Bend

    @classmethod
    def of(cls, model: nn.Module, role: str) -> "SplitCausalLM":
        base = base_model(model, role)
        backbone = base.get_decoder()
        if backbone is base:
            raise TypeError(f"{role}: {type(base).__name__} has no backbone apart from its head")
        if getattr(base.config, "output_router_logits", False):
            raise ValueError(
                f"{role}: output_router_logits=True asks for the router's auxiliary loss, which is "
                "computed outside the backbone; set it to False"
            )
        head = _linear_head(base, role)
        return cls(backbone, head, _bend(base, backbone, head, role))

    def collator(self, collator: Callable[[list], dict], all_tokens: bool) -> AlignedLabels:
        return AlignedLabels(collator)

    def counts(self, batch: Mapping[str, Any], all_tokens: bool) -> dict[str, Tensor | int]:
        num_valid = batch.get("num_valid")
        if num_valid is None:
            num_valid = (batch["labels"] != IGNORE_INDEX).sum()
        return {"items": num_valid, **(super().counts(batch, all_tokens) if all_tokens else {})}

    def read(
        self,
        labels: Tensor,
        num_valid: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        token_weights: Tensor | None = None,
        teacher_inputs: Mapping[str, Tensor] | None = None,
        teacher_rows: Tensor | None = None,
        **tokens: Any,
    ) -> Batch:
        """Labels [B, T] beside what `read_tokens` takes; labels[t] is the target of position t.
        Of packed rows also what `CausalCollator` tells variable-length attention.

        Args:
            num_valid: number of labels other than -100, known on the host.
            token_weights: [B, T], the factor of the loss at each position.
            teacher_inputs: [B, T'] of the teacher's model, where it reads other prompts.
            teacher_rows: [B, T] int64, b * T' + t of the teacher's position with the same label.
        """
        labelled = TokenSet(labels != IGNORE_INDEX, num_valid, num_items_in_batch)
        documents = {name: tokens.pop(name) for name in VARLEN if name in tokens}
        batch = read_tokens(**tokens)
        batch = batch._replace(inputs={**batch.inputs, **documents})
        compared = labelled._replace(weights=token_weights)
        return batch._replace(
            compared=compared,
            labelled=labelled,
            labels=labels,
            teacher_inputs=teacher_inputs,
            teacher_rows=teacher_rows,
        )

    @cached_property
    def classes(self) -> int:
        return true_shape(self.head.weight)[0]

    def terms(
        self, objective: Objective, answer: Answer, target: Answer | None, batch: Batch
    ) -> Terms:
        assert answer.head is not None  # a causal language model has one
        if objective.kd_weight == 0.0:
            # of no width, so that its GEMM costs nothing; its divergence has weight 0
            nothing = answer.head[0].detach()[:, :0], None
            target = Answer(answer.output.detach()[..., :0], nothing)  # no bend: logits of 0
        assert target is not None
        if target.shares:
            return self._terms_of_shares(objective, answer, target.shares, batch)
        assert batch.labels is not None
        teacher: Head | TeacherTopK | Mixture
        if target.mixture is not None:
            teacher = target.mixture.kind()
        elif target.listed is not None:
            teacher = target.listed
        else:
            assert target.head is not None
            teacher = Head(target.output, *target.head)
        terms = objective.terms(
            Head(answer.output, *answer.head),
            teacher,
            batch.labels,
            batch.compared.normalizer,
            batch.compared.num_valid,
            token_weights=batch.compared.weights,
            bends=(answer.bend, target.bend),
        )
        count = batch.compared.number(terms.loss.device)
        means = {"kd": (terms.kd * count, count), "ce": (terms.ce * count, count)}
        return Terms(terms.loss, means)

    def _terms_of_shares(
        self, objective: Objective, answer: Answer, shares: Sequence[Share], batch: Batch
    ) -> Terms:
        """The sum of the losses of each share: of its own tokens, or of all by its weight, where
        labels count once."""
        compared, found = batch.compared, []
        normalizer = compared.normalizer
        if normalizer is None:
            normalizer = compared.number(answer.output.device).clamp(min=1)
        for number, share in enumerate(shares):
            own, labels = compared._replace(normalizer=normalizer), batch.labels
            assert labels is not None
            if share.tokens is not None:
                assert share.tokens.mask is not None
                mask = share.tokens.mask & (labels != IGNORE_INDEX)
                own = own._replace(mask=mask, num_valid=share.tokens.num_valid)
                labels = labels.masked_fill(~mask, IGNORE_INDEX)
            weighed = replace(objective, kd_weight=objective.kd_weight * share.weight)
            is_first = number == 0 or share.tokens is not None
            if not is_first:
                weighed = replace(weighed.without_labels(), z_loss_weight=0.0)
            part = batch._replace(compared=own, labels=labels)
            loss, sums = self.terms(weighed, answer, share.answer, part)
            kd, count = sums["kd"]
            sums["kd"] = kd * share.weight, count * is_first
            if not is_first:
                del sums["ce"]
            found.append(Terms(loss, sums))
        loss = sum((each.loss for each in found[1:]), start=found[0].loss)
        totals: dict[str, tuple[Tensor, Tensor]] = {}
        for each in found:
            for name, (value, count) in each.sums.items():
                before = totals.get(name)
                totals[name] = (
                    (value, count) if before is None else (before[0] + value, before[1] + count)
                )
        return Terms(loss, totals)

    def answer(
        self, inputs: Mapping[str, Any], rows: Tensor | None = None, taps: LayerTaps | None = None
    ) -> Answer:
        answer = super().answer(inputs, rows, taps)._replace(bend=self.bend)
        if rows is None:
            return answer
        return answer._replace(output=answer.output.flatten(0, 1)[rows])

    def uncalled_parameters(self) -> Iterable[nn.Parameter]:
        return self.head.parameters(recurse=False)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **documents: Any,
    ) -> Tensor:
        """Last hidden states [B, T, D].

        With `position_ids` they alone say what belongs together: transformers keeps documents of a
        packed row apart where positions restart, but only when it gets no 2-D mask. Padding
        stands right of what it pads, where causal attention never looks.
        """
        if position_ids is None:
            output = self.backbone(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
            return output[0]
        taken = inspect.signature(self.backbone.forward).parameters
        if "position_ids" not in taken:
            raise ValueError(
                f"position_ids: {type(self.backbone).__name__} takes none, so it cannot keep "
                "packed documents apart; use a collator that neither packs nor emits them"
            )
        shape = input_ids.shape
        is_flash = "flash" in (self.backbone.config._attn_implementation or "")
        if is_flash:
            # the variable-length kernels recognise packed documents in a single row only
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        # without `documents` each layer finds them in the positions, and waits for the device
        if not is_flash or not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            documents = {}
        output = self.backbone(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **documents
        )
        return output[0].reshape(*shape, -1)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Head tensors. Read them in a wrapped `forward`, where ZeRO-3 gathers what is read."""
        return self.head.weight, self.head.bias


def base_model(model: nn.Module, role: str) -> PreTrainedModel:
    """The PreTrainedModel inside a PeftModel, whose layers apply the adapters, or the model itself.

    Raises:
        TypeError: neither of the two.
        ValueError: the PEFT method acts outside the layers, so the backbone alone would skip it.
    """
    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            config = model.peft_config[name]
            if config.is_prompt_learning:
                raise ValueError(
                    f"{role}: PEFT method {config.peft_type.value} adds virtual tokens in front of "
                    "the backbone, which a call for hidden states skips; adapt layers instead"
                )
            if getattr(config, "alora_invocation_tokens", None):
                raise ValueError(
                    f"{role}: activated LoRA finds its invocation tokens in PeftModel.forward, "
                    "which a call for hidden states skips; use plain LoRA"
                )
    model = without_peft(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{role}: expected a PreTrainedModel or PeftModel, got {type(model).__name__}"
        )
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"{role}: expected a decoder-only model, or an encoder alone, "
            f"got {type(model).__name__}"
        )
    return model


def _linear_head(base: PreTrainedModel, role: str) -> nn.Linear:
    head = base.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        is_off = head.disable_adapters
        head = head.original_module if is_off else head.modules_to_save[head.active_adapters[0]]
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ValueError(
            f"{role}: expected an output head without an adapter, whose update is not in its "
            "weight; take the head out of target_modules, or train it whole with "
            "modules_to_save=['lm_head']"
        )
    if not isinstance(head, nn.Linear) or not head.weight.dtype.is_floating_point:
        raise TypeError(
            f"{role}: expected an nn.Linear output head with floating point weights, "
            f"got {type(head).__name__}"
        )
    return head


class _StandInOutput(BaseModelOutputWithPast):
    """Answers any further field that a `forward` may read from its backbone's output with None."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@torch.no_grad()
def _bend(base: PreTrainedModel, backbone: nn.Module, head: nn.Linear, role: str) -> Bend:
    """What is between head and logits, found on the head alone, whatever else is partitioned; the
    configuration's word where the head has a shape and no values."""
    if not has_values(head.weight):
        return next(bends_of(base.config))
    with gathered(head.parameters(recurse=False)):
        weight = head.weight
        hidden = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(weight)
        # rows of large logits, where a cap cannot pass for linear, and of small ones, where it is
        # still to be told from another cap
        hidden /= F.linear(hidden, weight).abs().amax(-1, keepdim=True).clamp(min=1e-3)
        hidden *= hidden.new_tensor([1000.0, 200.0, 40.0, 8.0])[:, None]
        linear = F.linear(hidden, weight, head.bias)
        dtype = torch.promote_types(linear.dtype, torch.float32)

        patched = backbone.__dict__.get("forward")
        backbone.forward = lambda *args, **kwargs: _StandInOutput(last_hidden_state=hidden)
        try:
            ids = torch.zeros(1, 4, dtype=torch.int64, device=weight.device)
            logits = base(input_ids=ids, use_cache=False).logits.to(dtype)
        finally:
            del backbone.forward
            if patched is not None:
                backbone.forward = patched

    if logits.shape == linear.shape:
        eps = torch.finfo(weight.dtype).eps
        for bend in bends_of(base.config):
            expected = bend.of(linear.to(dtype))
            band = 4 * eps * expected.abs().amax(-1, keepdim=True)
            if ((logits - expected).abs() <= band).all():
                return bend
    known = entries_of(base.config)
    raise ValueError(
        f"{role}: the logits of {type(base).__name__} are not its last hidden states times its "
        "head, nor scaled or capped by an entry of its configuration that is known"
        + (f" ({known})" if known else "")
        + ", so the fused linear loss would distil another function"
    )
