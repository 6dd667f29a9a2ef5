from modxfer_fast.kernels.lora_projection_loss.op import LoraProjectionLoss, lora_projection_loss

__all__ = ["LoraProjectionLoss", "lora_projection_loss"]
