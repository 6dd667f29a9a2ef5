from modxfer_fast.kernels.lora_linear.op import LoraTarget, lora_linear, lora_linear_group

__all__ = ["LoraTarget", "lora_linear", "lora_linear_group"]
