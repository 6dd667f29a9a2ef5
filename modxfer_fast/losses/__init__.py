from modxfer_fast.losses.hidden_states import HiddenStateLoss
from modxfer_fast.losses.layer_pairs import HiddenTerms
from modxfer_fast.losses.linear_kd import LinearKDLoss
from modxfer_fast.losses.relations import AttentionRelationLoss

__all__ = ["AttentionRelationLoss", "HiddenStateLoss", "HiddenTerms", "LinearKDLoss"]
