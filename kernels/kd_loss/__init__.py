from .op import kd_loss

__all__ = ["kd_loss"]
