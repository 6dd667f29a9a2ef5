"""PEFT types of our own, made known to PEFT under a name."""

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def peft_type(name: str) -> PeftType:
    """The member `name` of `peft.PeftType`, added where PEFT does not have it.

    PEFT registers only names of this enumeration, and asks configurations for
    `peft_type.value`: a plain string would not do.

    Args:
        name: upper case, which is also the value of the member.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # what `in` asks since Python 3.13
    getattr(PeftType, "_hashable_values_", []).append(name)
    # an enumeration refuses setattr; members are attributes of the class since Python 3.11
    type.__setattr__(PeftType, name, member)
    return member


def register_peft_type(
    name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]
) -> None:
    """Lets `get_peft_model` and `PeftModel.from_pretrained` find a type, once.

    Args:
        name: lower case; its parameters are named `<name>_...`.
    """
    if peft_type(name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class)
