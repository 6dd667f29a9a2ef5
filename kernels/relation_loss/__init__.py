from modxfer_fast.kernels.relation_loss.op import minilm_loss, minilmv2_loss, relation_loss

__all__ = ["minilm_loss", "minilmv2_loss", "relation_loss"]
