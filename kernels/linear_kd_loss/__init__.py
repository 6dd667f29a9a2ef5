from modxfer_fast.kernels.common.composed_head import LoraWeight, QuantizedWeight
from modxfer_fast.kernels.common.parallel_head import VocabParallelWeight
from modxfer_fast.kernels.common.scratch import release_workspace
from modxfer_fast.kernels.linear_kd_loss.cross_entropy import (
    LogProbTerms,
    linear_cross_entropy,
    linear_log_probs,
    linear_log_probs_terms,
)
from modxfer_fast.kernels.linear_kd_loss.mixture import TeacherHead, TeacherMixture
from modxfer_fast.kernels.linear_kd_loss.op import (
    ByProducts,
    KDTerms,
    linear_kd_loss,
    linear_kd_loss_terms,
    loss_alone,
    loss_of_heads,
)
from modxfer_fast.kernels.linear_kd_loss.teacher_topk import teacher_topk
from modxfer_fast.kernels.linear_kd_loss.teachers import (
    TeacherLogits,
    TeacherLogProbs,
    TeacherProbs,
)
