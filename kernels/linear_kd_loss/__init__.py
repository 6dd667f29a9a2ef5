from .op import KDTerms, linear_kd_loss, linear_kd_loss_terms
from .workspace import release_workspace

__all__ = ["KDTerms", "linear_kd_loss", "linear_kd_loss_terms", "release_workspace"]
