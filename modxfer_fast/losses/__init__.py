from .hidden_states import HiddenStateLoss, HiddenTerms
from .linear_kd import LinearKDLoss
from .relations import AttentionRelationLoss

__all__ = ["AttentionRelationLoss", "HiddenStateLoss", "HiddenTerms", "LinearKDLoss"]
