"""SDXL base 1.0 as published: its configurations, and networks of its full size with random weights.

Cost and memory of a network do not depend on its values, so what is measured on these holds for the real weights.
Configurations: https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, the config.json of each folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from craft_fast.quiet import import_bitsandbytes, quiet_third_party

quiet_third_party()

UNET_PARAMETERS = 2_567_463_684
VAE_PARAMETERS = 83_653_863
TEXT_ENCODER_PARAMETERS = 123_060_480
TEXT_ENCODER_2_PARAMETERS = 694_659_840

UNET: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
# eos_token_id 2 is no token's id: it tells transformers to pool at the highest id, as these were trained.
_TEXT: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
TEXT_ENCODER: dict[str, Any] = {
    **_TEXT,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
TEXT_ENCODER_2: dict[str, Any] = {
    **_TEXT,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


def empty(part: str, config: Mapping[str, Any]) -> Any:
    """A network without weights, on the meta device, in eval mode and without gradients.

    Args:
        part: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.
        config: as in this module's dicts; keys that start with ``_`` are passed over.
    """
    import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
    import diffusers
    import transformers

    values = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        if part in ("unet", "vae"):
            cls = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
            module = cls.from_config(values)
        else:
            text_config = transformers.CLIPTextConfig(**values)
            projected = part == "text_encoder_2"
            module = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(
                text_config
            )
    return module.eval().requires_grad_(False)


def materialize(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a network from ``empty`` memory on ``device``; weights hold nothing yet, buffers what they must.

    Raises:
        TypeError: the network has a buffer whose content is not known here.
    """
    module.to(dtype)
    if torch.device(device).type == "meta":
        return
    # Refused before memory is taken for it.
    _buffer_content(module, "meta")
    module.to_empty(device=device)
    fill_buffers(module, device)


def fill_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Put a network's buffers, which no file holds, on ``device``.

    Raises:
        TypeError: the network has a buffer whose content is not known here.
    """
    for owner, name, value in _buffer_content(module, device):
        owner._buffers[name] = value


def _buffer_content(module: nn.Module, device: torch.device | str) -> list[tuple[nn.Module, str, torch.Tensor]]:
    content = []
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name != "position_ids":
                raise TypeError(f"buffer {path}.{name}: what is in it?")
            content.append((owner, name, torch.arange(buffer.shape[-1], device=device).expand(1, -1)))
    return content


def _random(part: str, config: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype, seed: int) -> Any:
    module = empty(part, config)
    materialize(module, device, dtype)
    if torch.device(device).type != "meta":
        _fill(module, torch.Generator(device).manual_seed(seed))
    return module


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of standard deviation fan_in ** -0.5, in place: activations keep their size, so all stays finite."""
    for layer in module.modules():
        norm = isinstance(layer, nn.GroupNorm | nn.LayerNorm)
        for name, parameter in layer.named_parameters(recurse=False):
            if norm and name == "weight":
                parameter.fill_(1.0)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                fan_in = parameter.shape[1:].numel()
                parameter.normal_(0.0, float(fan_in) ** -0.5, generator=generator)


def random_unet(
    *, device: torch.device | str, dtype: torch.dtype, seed: int = 0, config: Mapping[str, Any] = UNET
) -> Any:
    """SDXL's ``UNet2DConditionModel`` with random weights, made in place on ``device``: no copy, no other dtype.

    Equal seeds, devices and dtypes give equal weights.

    Args:
        device: where; ``meta`` gives shapes without memory.
        dtype: of all weights.
        seed: of the weights.
        config: another configuration, such as a small one.

    Returns:
        The network, in eval mode and without gradients.
    """
    return _random("unet", config, device, dtype, seed)


def random_vae(
    *, device: torch.device | str, dtype: torch.dtype, seed: int = 0, config: Mapping[str, Any] = VAE
) -> Any:
    """SDXL's ``AutoencoderKL`` likewise."""
    return _random("vae", config, device, dtype, seed)


def random_text_encoders(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    config: Mapping[str, Any] = TEXT_ENCODER,
    config_2: Mapping[str, Any] = TEXT_ENCODER_2,
) -> tuple[Any, Any]:
    """SDXL's ``CLIPTextModel`` and ``CLIPTextModelWithProjection`` likewise."""
    first = _random("text_encoder", config, device, dtype, seed)
    return first, _random("text_encoder_2", config_2, device, dtype, seed + 1)
