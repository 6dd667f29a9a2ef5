from modxfer_fast.kernels.projection_loss.op import projection_loss
from modxfer_fast.kernels.projection_loss.spec import LOSSES, NORMS

__all__ = ["LOSSES", "NORMS", "projection_loss"]
