from .op import KDTerms, linear_kd_loss, linear_kd_loss_terms

__all__ = ["KDTerms", "linear_kd_loss", "linear_kd_loss_terms"]
