from .linear_kd import LinearKDLoss

__all__ = ["LinearKDLoss"]
