from modxfer_fast.kernels.names import LOSSES, NORMS
from modxfer_fast.kernels.projection_loss.op import projection_loss

__all__ = ["LOSSES", "NORMS", "projection_loss"]
