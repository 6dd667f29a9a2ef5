from modxfer_fast.kernels.common.autocast import cast_for_autocast, has_autocast, without_autocast
from modxfer_fast.kernels.common.backward import (
    refuse_batched_gradients,
    refuse_double_backward,
    refuse_transforms,
    saved_dtype,
    scaled,
)
from modxfer_fast.kernels.common.bend import Bend
from modxfer_fast.kernels.common.checks import (
    check_constant,
    check_float,
    check_label_values,
    check_labels,
    check_num_valid,
    check_row_tensor,
    check_same_device,
    check_temperatures,
    check_tensor,
    check_tensors,
    debug_check_finite,
)
from modxfer_fast.kernels.common.reduction import (
    check_reduction,
    combine_row_weights,
    counted_rows,
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
from modxfer_fast.kernels.common.spec import KDSpec
