from modxfer_fast.kernels.kd_loss.op import kd_loss
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK

__all__ = ["TeacherTopK", "kd_loss"]
