from modxfer_fast.kernels.common.autocast import cast_for_autocast, has_autocast, without_autocast
from modxfer_fast.kernels.common.backward import (
    refuse_batched_gradients,
    refuse_double_backward,
    saved_dtype,
    scaled,
)
from modxfer_fast.kernels.common.checks import (
    check_constant,
    check_float,
    check_label_values,
    check_labels,
    check_num_valid,
    check_row_tensor,
    check_same_device,
    check_tensor,
    check_tensors,
    debug_check_finite,
)
from modxfer_fast.kernels.common.kd_spec import KDSpec
from modxfer_fast.kernels.common.reduction import (
    check_reduction,
    combine_row_weights,
    denominator,
    valid_rows,
)
from modxfer_fast.kernels.common.scalars import (
    READS_NUMBERS,
    check_integer,
    check_number,
    check_workspace,
    is_finite,
    pack,
)
from modxfer_fast.kernels.common.transforms import refuse_transforms

__all__ = [
    "READS_NUMBERS",
    "KDSpec",
    "cast_for_autocast",
    "check_constant",
    "check_float",
    "check_integer",
    "check_label_values",
    "check_labels",
    "check_num_valid",
    "check_number",
    "check_reduction",
    "check_row_tensor",
    "check_same_device",
    "check_tensor",
    "check_tensors",
    "check_workspace",
    "combine_row_weights",
    "debug_check_finite",
    "denominator",
    "has_autocast",
    "is_finite",
    "pack",
    "refuse_batched_gradients",
    "refuse_double_backward",
    "refuse_transforms",
    "saved_dtype",
    "scaled",
    "valid_rows",
    "without_autocast",
]
