"""The types of PEFT modules that can be moved, one file each."""

from collections.abc import Mapping

from peft import PeftConfig

from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.kinds.base import PeftKind, Slot, Slots, Source
from modxfer_fast.transfer.kinds.bottleneck import Bottleneck
from modxfer_fast.transfer.kinds.compacter import Compacter
from modxfer_fast.transfer.kinds.ia3 import IA3
from modxfer_fast.transfer.kinds.lora import LoRA

KINDS: Mapping[str, PeftKind] = {
    kind.name: kind for kind in (LoRA(), IA3(), Bottleneck(), Compacter())
}


def kind_of(config: PeftConfig) -> PeftKind:
    """The kind of a configuration.

    Raises:
        TransferError: of none that can be moved.
    """
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    if peft_type.lower() not in KINDS:
        known = ", ".join(KINDS).upper()
        raise TransferError(f"peft_type: expected one of {known}, got {peft_type}")
    return KINDS[peft_type.lower()]


__all__ = ["KINDS", "PeftKind", "Slot", "Slots", "Source", "kind_of"]
