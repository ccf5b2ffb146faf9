"""One ``.safetensors`` file with a whole SDXL, as people download them: SDXL base, Pony, Illustrious, NoobAI.

Names are those of the original training code (``model.diffusion_model.*``, ``first_stage_model.*``,
``conditioner.embedders.N.*``); diffusers' own functions turn them into diffusers' names. Of the file only the tensors
of the wanted part are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_fast.errors import EnvironmentProblem
from craft_fast.quiet import import_bitsandbytes
from craft_fast.sdxl.identify import TEXT_2_PREFIX, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, Header
from craft_fast.sdxl.weights import (
    assemble,
    expected_shapes,
    guarded,
    new_vae_names,
    refuse_non_finite,
    require_same,
)

PREFIXES = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX, "text_encoder_2": TEXT_2_PREFIX}
# What files hold beside the weights of the four networks, none of it used for inference: averaged copies, the noise
# schedule's tables, markers, and heads of the text encoders that SDXL does not read.
_HARMLESS = re.compile(
    r"model_ema\.|loss\.|first_stage_model\.(loss|model_ema)\.|.*\.position_ids$"
    r"|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|logvar|lvlb_weights"
    r"|scale_factor|global_step|v_pred|ztsnr|denoiser\.(log_)?sigmas)$"
    r"|conditioner\.embedders\.0\.(logit_scale|text_projection|transformer\.text_projection\.weight)$"
    r"|conditioner\.embedders\.1\.(model\.)?(logit_scale|attn_mask)$"
)


def part_names(header: Header, part: str) -> list[str]:
    """Names of one part's tensors in a file; of a VAE alone, those of the whole file."""
    prefix = PREFIXES[part]
    if part == "vae" and not header.has(prefix):
        prefix = ""
    return sorted(name for name in header.shapes if name.startswith(prefix) and not _HARMLESS.match(name))


def refuse_unknown(header: Header) -> None:
    """Refuse a whole model's file with tensors that belong to no part: something of it would be left out in silence.

    Raises:
        EnvironmentProblem: with their names.
    """
    known = tuple(PREFIXES.values())
    unknown = sorted(name for name in header.shapes if not name.startswith(known) and not _HARMLESS.match(name))
    if unknown:
        raise EnvironmentProblem(
            "A model file holds tensors that an SDXL has not",
            where=str(header.path),
            why=f"{len(unknown)} of {len(header.shapes)}, such as {', '.join(unknown[:3])}",
            hint="the file may hold an adapter or another model besides; get its plain version",
        )


def check_part(header: Header, part: str, config: Mapping[str, Any]) -> None:
    """Compare a part's names and shapes with its configuration; nothing is read but the header.

    Raises:
        IntegrityError: they differ.
    """
    tensors = {name: torch.empty(header.shapes[name], device="meta") for name in part_names(header, part)}
    where = f"{header.path} ({part})"
    found = _converted(part, tensors, config, header.path)
    require_same({name: tuple(value.shape) for name, value in found.items()}, expected_shapes(part, config), where)
    unused = _unused(part, tensors, found)
    require_same(dict.fromkeys(unused, ()), {}, where)


def load_part(header: Header, part: str, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """One network of the file, in eval mode, without gradients, its weights checked.

    Args:
        header: of the file.
        part: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.
        config: its configuration.
        device: where it goes, tensor by tensor.
        dtype: of its weights there.

    Raises:
        IntegrityError: damaged, not as the configuration says, or not finite; ResourceError: it does not fit.
    """
    tensors = guarded(header.path, lambda: _read(header, part, device, dtype))
    converted = _converted(part, tensors, config, header.path)
    # The fused attention projections of the second text encoder are cut into three; the whole ones go now.
    tensors.clear()
    module = assemble(part, config, converted, header.path)
    refuse_non_finite(module, Path(f"{header.path} ({part})"), [header.path])
    return module


def _read(header: Header, part: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(header.path, "pt") as file:
        # A copy: what safe_open gives is the mapped file itself, which another program may change or cut.
        return {name: file.get_tensor(name).to(device, dtype, copy=True) for name in part_names(header, part)}


def _converted(part: str, tensors: dict[str, Tensor], config: Mapping[str, Any], where: Path) -> dict[str, Tensor]:
    """The part's tensors under diffusers' names."""
    import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
    return guarded(where, lambda: _CONVERT[part](dict(tensors), dict(config)))


def _unet(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return dict(convert_ldm_unet_checkpoint(tensors, config))


def _vae(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in tensors):
        return new_vae_names(tensors)
    return dict(convert_ldm_vae_checkpoint(tensors, config))


def _text(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    return _text_names("text_encoder", dict(convert_ldm_clip_checkpoint(tensors)), config)


def _text_2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    # The function reads a width off its first argument only where the file has no projection; ours must have one.
    if TEXT_2_PREFIX + "text_projection" not in tensors:
        raise KeyError(f"no {TEXT_2_PREFIX}text_projection")
    converted = convert_open_clip_checkpoint(None, tensors, prefix=TEXT_2_PREFIX)
    return _text_names("text_encoder_2", dict(converted), config)


def _text_names(part: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    # transformers 5.6 took the wrapper "text_model." off CLIPTextModel; older ones have it.
    if any(name.startswith("text_model.") for name in expected_shapes(part, config)):
        return tensors
    return {name.removeprefix("text_model."): value for name, value in tensors.items()}


_CONVERT = {"unet": _unet, "vae": _vae, "text_encoder": _text, "text_encoder_2": _text_2}
# These are cut or reshaped on the way; what becomes of them is compared by name.
_RESHAPED = re.compile(r".*\.(in_proj_weight|in_proj_bias|text_projection)$|(.*\.)?(en|de)coder\.mid(_block)?\.att")


def _unused(part: str, source: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> Sequence[str]:
    used = {id(value) for value in converted.values()}
    return [name for name, value in source.items() if id(value) not in used and not _RESHAPED.match(name)]
