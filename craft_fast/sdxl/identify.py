"""What a model file or folder is, told from names and shapes alone: nothing of it is loaded.

A file's header lists every tensor's name, dtype and shape; a folder's JSON files name its classes. That is enough
to tell an SDXL from what people confuse with it, and to say what to do instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError
from craft_fast.store.safe_load import check_header

# Folders of a model in diffusers' layout, and those of them that hold weights or tokenizers.
PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")
WEIGHTED = ("text_encoder", "text_encoder_2", "unet", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2")
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "conditioner.embedders.0.transformer."
TEXT_2_PREFIX = "conditioner.embedders.1.model."
_GET_SDXL = "set model.path to a whole SDXL: one .safetensors file, a folder in diffusers' layout, or a hub id"
_ONLY = "only SDXL is aligned here: " + _GET_SDXL
_MERGE_LORA = (
    "set model.path to the base model; to go on from this LoRA, put it into a copy of that first: "
    "craft-fast lora apply FILE --model BASE -o merged.safetensors"
)
_GET_VAE = "set model.path to a whole SDXL, and model.vae to this file"


@dataclass(frozen=True)
class Header:
    """A safetensors file's table of contents.

    Attributes:
        path: the file.
        shapes: tensor name to shape.
        metadata: text to text, as the file's maker wrote it.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def has(self, *starts: str) -> bool:
        """Whether a tensor's name starts with one of ``starts``."""
        return any(name.startswith(starts) for name in self.shapes)

    def contains(self, *words: str) -> bool:
        """Whether a tensor's name contains one of ``words``."""
        return any(word in name for name in self.shapes for word in words)

    def width(self, name: str, axis: int = 1) -> int | None:
        """A tensor's size along ``axis``; None where there is none."""
        shape = self.shapes.get(name, ())
        return shape[axis] if len(shape) > axis else None


def read_header(path: Path) -> Header:
    """Read a safetensors file's header.

    Raises:
        EnvironmentProblem: no such file; IntegrityError: a pickle, another format, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise EnvironmentProblem("There is no such model file", where=str(path), hint="check model.path")
    check_header(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return Header(path, shapes, dict(file.metadata() or {}))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> CraftError:
    promised = _promised_bytes(path)
    size = path.stat().st_size
    if promised is not None and size < promised:
        return IntegrityError(
            "A model file is cut off",
            where=str(path),
            why=f"its header promises {promised:,} bytes, the file has {size:,}",
            hint="the download or the copy ended early: get the file again and compare its size",
        )
    return IntegrityError("A model file is damaged", where=str(path), why=why, hint="get the file again")


def _promised_bytes(path: Path) -> int | None:
    """Where the header says the last tensor ends; None when the header cannot be read."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        return 8 + length + int(max(ends))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return None


# ---- kinds of files, the first that fits: (test, what it is, what to do)

Kind = tuple[Callable[[Header], bool], str, str]


def _context(header: Header) -> int | None:
    """Width of the text conditioning that the UNet reads, whatever the file's naming."""
    for name, shape in header.shapes.items():
        if name.endswith("attn2.to_k.weight") and len(shape) == 2:
            return shape[1]
    return None


def _label(header: Header) -> int | None:
    return header.width(UNET_PREFIX + "label_emb.0.0.weight") or header.width("label_emb.0.0.weight")


def _ldm_unet(header: Header) -> bool:
    return header.has(UNET_PREFIX + "input_blocks.", "input_blocks.")


def _is_vae(header: Header) -> bool:
    return header.has(VAE_PREFIX) or (header.has("encoder.") and header.has("decoder."))


_KINDS: tuple[Kind, ...] = (
    (
        lambda h: h.contains(
            ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", ".hada_w1", ".lokr_w",
            ".oft_", "lora_unet_", "lora_te",
        ),
        "a LoRA or another adapter, not a model", _MERGE_LORA,
    ),
    (
        lambda h: len(h.shapes) <= 8
        and bool({"emb_params", "clip_l", "clip_g", "string_to_param"} & set(h.shapes) or h.has("<")),
        "a textual inversion (an embedding of some tokens), not a model", _GET_SDXL,
    ),
    (
        lambda h: h.has("control_model.", "controlnet_", "input_hint_block.") or h.contains("controlnet_down_blocks"),
        "a ControlNet, not a model", _GET_SDXL,
    ),
    (lambda h: h.contains("joint_blocks.0."), "Stable Diffusion 3", _ONLY),
    (
        lambda h: h.contains("double_blocks.0.", "single_blocks.0.", "single_transformer_blocks.0."),
        "FLUX or one of its family", _ONLY,
    ),
    (
        lambda h: h.contains("adaln_single.", "caption_projection.", "y_embedder.", "t_block.1.") and not _ldm_unet(h),
        "PixArt or another diffusion transformer", _ONLY,
    ),
    (
        lambda h: h.contains(".absmax", ".quant_state", ".scale_weight", "scaled_fp8", ".weight_scale"),
        "a model whose weights are already quantised", "get its float16 or float32 file; craft-fast quantises itself",
    ),
    (
        lambda h: {"edm_mean", "edm_vpred.sigma_max"} & set(h.shapes) != set(),
        "an SDXL of the EDM kind (Playground v2.5, CosXL), whose noise schedule is another",
        "use an SDXL that predicts epsilon or v",
    ),
    (
        lambda h: h.width(UNET_PREFIX + "input_blocks.0.0.weight") == 9,
        "an inpainting model: its UNet has 9 input channels", "use the model it was made from",
    ),
    (
        lambda h: h.width(UNET_PREFIX + "input_blocks.0.0.weight") not in (4, None),
        "an image-editing or depth model: its UNet takes more than the 4 latent channels",
        "use the model it was made from",
    ),
    (
        lambda h: not h.has(TEXT_2_PREFIX)
        and (h.has("conditioner.embedders.0.model.") or (_ldm_unet(h) and (_context(h), _label(h)) == (1280, 2560))),
        "the SDXL refiner", "it only finishes what the base model began: set model.path to SDXL base or one of its kin",
    ),
    (
        lambda h: h.has("cond_stage_model.model.")
        or (_ldm_unet(h) and _context(h) == 1024 and _label(h) is None),
        "Stable Diffusion 2", _ONLY,
    ),
    (
        lambda h: h.has("cond_stage_model.") or (_ldm_unet(h) and _context(h) == 768 and _label(h) is None),
        "Stable Diffusion 1", _ONLY,
    ),
    (
        lambda h: _ldm_unet(h) and not (h.has(TEXT_PREFIX) and h.has(TEXT_2_PREFIX)),
        "an SDXL UNet without its text encoders",
        "get the file of the whole model; UNet-only files are for tools that hold the other parts already",
    ),
    (
        lambda h: h.has("down_blocks.") and h.has("up_blocks.") and not _is_vae(h),
        "a UNet in diffusers' naming, alone",
        "set model.path to the folder that holds unet, vae, text encoders, tokenizers and scheduler",
    ),
    (lambda h: _is_vae(h) and not _ldm_unet(h), "a VAE alone", _GET_VAE),
    (lambda h: h.has("text_model.", "transformer.resblocks."), "a text encoder alone", _GET_SDXL),
)  # fmt: skip


def kind_of(header: Header) -> tuple[str, str]:
    """What the file is and, where it is no whole SDXL, what to do; ``("SDXL", "")`` where it is one."""
    for fits, kind, advice in _KINDS:
        if fits(header):
            return kind, advice
    if _ldm_unet(header):
        return "SDXL", ""
    return f"something else: its {len(header.shapes)} tensors have names that are not known here", _GET_SDXL


def require_sdxl(header: Header) -> None:
    """Refuse a file that is no whole SDXL in the layout people download.

    Raises:
        EnvironmentProblem: with what it is and what to do.
    """
    kind, advice = kind_of(header)
    if kind != "SDXL":
        some = ", ".join(sorted(header.shapes)[:2])
        raise EnvironmentProblem(
            "Not a whole SDXL", where=str(header.path), why=f"this is {kind} (tensors: {some}, ...)", hint=advice
        )


# ---- folders

_CLASSES = {
    "StableDiffusionPipeline": "Stable Diffusion 1 or 2",
    "StableDiffusionInpaintPipeline": "Stable Diffusion 1 or 2, inpainting",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "FLUX",
    "PixArtAlphaPipeline": "PixArt",
    "PixArtSigmaPipeline": "PixArt",
}


def require_sdxl_folder(folder: Path) -> None:
    """Refuse a folder that holds another pipeline, or not all of ``PARTS``.

    Raises:
        EnvironmentProblem: with what it is and what to do; IntegrityError: a JSON file that is none.
    """
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    kind = _folder_kind(index)
    if kind is None and not missing:
        kind = _unet_kind(read_json(folder / "unet" / "config.json"))
    if kind is not None:
        raise EnvironmentProblem("Not an SDXL folder", where=str(folder), why=f"this is {kind}", hint=_ONLY)
    if missing:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        raise EnvironmentProblem(
            "Not an SDXL folder in diffusers' layout",
            where=str(folder),
            why=f"missing: {', '.join(missing)}",
            hint=f"the folder holds {files[0]}: set model.path to that file"
            if files
            else "set model.path to a folder that StableDiffusionXLPipeline.from_pretrained opens",
        )


def _folder_kind(index: Mapping[str, Any]) -> str | None:
    name = index.get("_class_name", "StableDiffusionXLPipeline")
    if index.get("requires_aesthetics_score") is True or index.get("text_encoder", "") == [None, None]:
        return "the SDXL refiner"
    if isinstance(name, str) and name.startswith("StableDiffusionXL"):
        return None
    return f"{_CLASSES.get(str(name), 'another model')} ({name} in model_index.json)"


def _unet_kind(config: Mapping[str, Any]) -> str | None:
    channels = config.get("in_channels", 4)
    if channels == 9:
        return "an inpainting model: its UNet has 9 input channels"
    if channels != 4:
        return f"a UNet with {channels} input channels"
    if config.get("cross_attention_dim") == 1280:
        return "the SDXL refiner"
    if config.get("addition_embed_type") != "text_time":
        return "Stable Diffusion 1 or 2: its UNet takes no size and crop conditioning"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        IntegrityError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(
            "A model's JSON file cannot be read", where=str(path), why=str(error), hint="get the model again"
        ) from error
    if not isinstance(value, dict):
        raise IntegrityError("A model's JSON file is not an object", where=str(path), hint="get the model again")
    return value
