"""Block-wise 8-bit AdamW with global-norm clip over one flat buffer, two launches for all parameters."""

from craft_kernels.adamw8bit.flat import FlatAdamW8bit
from craft_kernels.adamw8bit.op import adamw8bit_
from craft_kernels.adamw8bit.state import AdamW8bitState, dynamic_map, new_state

__all__ = ["AdamW8bitState", "FlatAdamW8bit", "adamw8bit_", "dynamic_map", "new_state"]
