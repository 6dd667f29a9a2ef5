from .autocast import cast_for_autocast, without_autocast
from .backward import refuse_double_backward, saved_dtype, scaled
from .checks import (
    check_float,
    check_label_values,
    check_labels,
    check_num_valid,
    check_row_tensor,
    check_same_device,
    debug_check_finite,
)
from .kd_spec import DIVERGENCES, KDSpec
from .reduction import check_reduction, combine_row_weights, denominator, valid_rows

__all__ = [
    "DIVERGENCES",
    "KDSpec",
    "cast_for_autocast",
    "check_float",
    "check_label_values",
    "check_labels",
    "check_num_valid",
    "check_reduction",
    "check_row_tensor",
    "check_same_device",
    "combine_row_weights",
    "debug_check_finite",
    "denominator",
    "refuse_double_backward",
    "saved_dtype",
    "scaled",
    "valid_rows",
    "without_autocast",
]
