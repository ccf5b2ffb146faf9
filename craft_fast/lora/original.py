"""Where each weight of an SDXL in diffusers' naming is in a file of the original layout, and what such a file is.

The other direction of ``sdxl.single_file``: one weight is a whole tensor there, a third of one (open_clip keeps
queries, keys and values in one matrix), or its transpose. Facts: Stability-AI/generative-models
sgm/modules/diffusionmodules/openaimodel.py, mlfoundations/open_clip src/open_clip/transformer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from craft_fast.lora.keys import to_sgm
from craft_fast.sdxl.identify import TEXT_2_PREFIX, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX

# A normalisation stands right before the convolution of the same number.
_NORMS = {"norm1": ("conv1", "in_layers.2", "in_layers.0"), "norm2": ("conv2", "out_layers.3", "out_layers.0")}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A weight's place in a file of the original layout.

    Attributes:
        name: of the tensor.
        third: 0, 1 or 2 where the weight is that third of the tensor's rows; None: all of it.
        transposed: whether the tensor is the weight's transpose.
    """

    name: str
    third: int | None = None
    transposed: bool = False

    def view(self, whole: Tensor) -> Tensor:
        """The weight as a view into the tensor it is in."""
        part = whole if self.third is None else whole.chunk(3)[self.third]
        return part.T if self.transposed else part


def plain(part: str, name: str) -> str:
    """A weight's name without the wrapper that only some versions of transformers have around a text encoder."""
    return name.removeprefix("text_model.") if part.startswith("text_encoder") else name


def piece_of(part: str, name: str, unet_config: Mapping[str, Any]) -> Piece:
    """Where a weight is.

    Args:
        part: ``unet``, ``text_encoder`` or ``text_encoder_2``; of a VAE see ``vae_tensors``.
        name: of the weight in diffusers' naming, such as ``mid_block.resnets.0.norm1.bias``.
        unet_config: numbers of blocks.

    Raises:
        KeyError: no weight of such a model.
    """
    if part == "unet":
        return Piece(UNET_PREFIX + _unet(name, unet_config))
    name = plain(part, name)
    if part == "text_encoder":
        return Piece(f"{TEXT_PREFIX}text_model.{name}")
    return _open_clip(name)


def _unet(name: str, config: Mapping[str, Any]) -> str:
    module, _, end = name.rpartition(".")
    if module == "conv_norm_out":
        return f"out.0.{end}"
    before, _, last = module.rpartition(".")
    if last in _NORMS and re.search(r"(^|\.)resnets\.\d+$", before):
        conv, its, own = _NORMS[last]
        return f"{to_sgm(f'{before}.{conv}', config).removesuffix(its)}{own}.{end}"
    return f"{to_sgm(module, config)}.{end}"


def _open_clip(name: str) -> Piece:
    outer = {
        "text_projection.weight": Piece(TEXT_2_PREFIX + "text_projection", transposed=True),
        "embeddings.position_embedding.weight": Piece(TEXT_2_PREFIX + "positional_embedding"),
        "embeddings.token_embedding.weight": Piece(TEXT_2_PREFIX + "token_embedding.weight"),
        "final_layer_norm.weight": Piece(TEXT_2_PREFIX + "ln_final.weight"),
        "final_layer_norm.bias": Piece(TEXT_2_PREFIX + "ln_final.bias"),
    }
    if name in outer:
        return outer[name]
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        raise KeyError(name)
    block = f"{TEXT_2_PREFIX}transformer.resblocks.{found[1]}."
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", found[2]):
        return Piece(f"{block}attn.in_proj_{found[3]}", third="qkv".index(fused[1]))
    return Piece(f"{block}{_OPEN_CLIP[found[2]]}.{found[3]}")


def vae_place(name: str, shape: tuple[int, ...], last: int) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a VAE's weight in the original layout; its bytes are the same.

    Args:
        name: in diffusers' naming of today, as ``new_vae_names`` gives it.
        shape: of the weight.
        last: number of the decoder's last block: they are counted from the other end there.
    """
    coder, dot, rest = name.partition(".")
    if coder not in ("encoder", "decoder"):  # quant_conv, post_quant_conv
        return VAE_PREFIX + name, shape
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest):
        # Attention's matrices are 1x1 convolutions there.
        shape = (*shape, 1, 1) if len(shape) == 2 else shape
        return f"{VAE_PREFIX}{coder}.mid.attn_1.{_VAE_ATTENTION[found[1]]}.{found[2]}", shape
    rest = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", rest)
    rest = re.sub(r"^down_blocks\.(\d+)\.resnets", r"down.\1.block", rest)
    rest = re.sub(r"^down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", rest)
    rest = re.sub(r"^up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", rest)
    rest = re.sub(r"^up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", rest)
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return f"{VAE_PREFIX}{coder}{dot}{rest}", shape


def last_block(names: Iterable[str]) -> int:
    """Number of a VAE's last decoder block."""
    return max(int(found[1]) for name in names if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))


def markers(prediction_type: str, *, zero_terminal_snr: bool) -> list[str]:
    """Names of the empty tensors by which readers of a file tell v-prediction and zero terminal SNR."""
    found = {"v_pred": prediction_type == "v_prediction", "ztsnr": zero_terminal_snr}
    return [name for name, is_so in found.items() if is_so]


def model_metadata(title: str, prediction_type: str) -> dict[str, str]:
    """What tools read of a whole SDXL's file (ModelSpec 1.0.0)."""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }
