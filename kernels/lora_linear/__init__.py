from .op import LoraTarget, lora_linear, lora_linear_group

__all__ = ["LoraTarget", "lora_linear", "lora_linear_group"]
