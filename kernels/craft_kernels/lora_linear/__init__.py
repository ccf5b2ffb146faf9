"""A frozen linear layer, dense or NF4, with a trainable low-rank update: few launches, few saved tensors."""

from craft_kernels.lora_linear.op import lora_linear

__all__ = ["lora_linear"]
