from modxfer_fast.kernels.kd_loss.op import kd_loss
