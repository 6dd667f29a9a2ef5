"""Configuration of Compacter."""

from dataclasses import dataclass, field

from modxfer_fast.models.bottleneck.config import BottleneckConfig, is_integer, is_number
from modxfer_fast.models.errors import ModelError
from modxfer_fast.models.peft_types import peft_type


@dataclass
class CompacterConfig(BottleneckConfig):
    """Bottleneck adapters whose projections are sums of Kronecker products.

    Karimi Mahabadi et al. 2021. Placement houlsby is their Compacter, pfeiffer their Compacter++.

    Raises:
        ModelError: a value that is not allowed; the message names the field.
    """

    non_linearity: str = field(default="gelu", metadata={"help": "As for bottleneck adapters."})
    init_weights: str = field(
        default="glorot",
        metadata={
            "help": "glorot: all factors Glorot uniform; the small rule keeps the start near the "
            "model as it was. zero_up: the right factors of the up-projection are zero, so it "
            "starts exactly there."
        },
    )
    phm_dim: int = field(
        default=4,
        metadata={"help": "Kronecker terms; divides the hidden and the bottleneck width."},
    )
    phm_rank: int = field(default=1, metadata={"help": "Rank of every term."})
    shared_phm_rule: bool = field(
        default=True, metadata={"help": "One rule for all projections of the model, or one each."}
    )
    phm_init_range: float = field(
        default=1e-4, metadata={"help": "Standard deviation of fresh rules."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("COMPACTER")
        for name in ("phm_dim", "phm_rank"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ModelError(f"{name}: expected a positive integer, got {value!r}")
        if not isinstance(self.shared_phm_rule, bool):
            raise ModelError(
                f"shared_phm_rule: expected true or false, got {self.shared_phm_rule!r}"
            )
        if not is_number(self.phm_init_range) or self.phm_init_range <= 0:
            raise ModelError(
                f"phm_init_range: expected a positive number, got {self.phm_init_range!r}"
            )

    @classmethod
    def init_choices(cls) -> tuple[str, ...]:
        """Values of `init_weights`."""
        return ("glorot", "zero_up")
