"""PEFT's LoRA layers on the fused op `lora_linear`, for new and for existing models.

`register_fused_lora(config)` makes PEFT create fused layers; `patch_peft_model(model)` changes the
layers of a model that has them, and lets those that share an input (q, k, v; gate, up) run as one
op. Either way names, checkpoints and the whole interface stay PEFT's, and whatever the op does not
cover runs in PEFT's own forward.
"""
