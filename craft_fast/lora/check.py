"""Would it load? The rules by which ComfyUI, A1111, Forge and diffusers read a LoRA file, applied to a file.

Facts, not code, of: ComfyUI comfy/lora.py and comfy/weight_adapter/lora.py; A1111 extensions-builtin/Lora/networks.py
and network.py; Forge extensions-builtin/sd_forge_lora/network.py, which reads keys as ComfyUI does. diffusers is asked
itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from craft_fast.errors import CraftError, IntegrityError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.keys import TE1, TE2, UNET, Layers, layers
from craft_fast.lora.reading import read_adapter, refuse_other_kinds
from craft_fast.quiet import import_bitsandbytes
from craft_fast.sdxl import published
from craft_fast.sdxl.identify import Header, read_header
from craft_fast.store.safe_load import load_safetensors

Program = Literal["diffusers", "ComfyUI", "A1111", "Forge"]
PROGRAMS: tuple[Program, ...] = ("diffusers", "ComfyUI", "A1111", "Forge")
# Endings by which a program tells the two matrices; alpha is ".alpha" for all.
_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "ComfyUI": (
        (".lora_down.weight", ".lora_up.weight"), ("_lora.down.weight", "_lora.up.weight"),
        (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
    ),
    "A1111": ((".lora_down.weight", ".lora_up.weight"),),
}  # fmt: skip
SDXL_ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one program makes of a file.

    Attributes:
        program: its name.
        loaded: layers that it loads.
        total: layers in the file.
        problems: in words, keys named; empty: it loads all, and lists it under SDXL.
    """

    program: Program
    loaded: int
    total: int
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is amiss."""
        return not self.problems


def check_file(path: Path, unet_config: Mapping[str, Any] | None = None) -> list[Finding]:
    """What diffusers, ComfyUI, A1111 and Forge make of a LoRA file.

    Args:
        path: the file.
        unet_config: of diffusers; None: SDXL's.

    Returns:
        One finding a program, in the order of ``PROGRAMS``.

    Raises:
        EnvironmentProblem: no such file. IntegrityError: not safetensors, damaged, or another kind of adapter.
    """
    header = read_header(path)
    refuse_other_kinds(header.shapes, where=str(path))
    known = layers(unet_config)
    return [_diffusers(path, header, unet_config), *(_by_rules(program, header, known) for program in PROGRAMS[1:])]


def require_loads(
    path: Path,
    *,
    format: Literal["kohya", "diffusers"] = "kohya",
    unet_config: Mapping[str, Any] | None = None,
    expected: Adapter | None = None,
) -> None:
    """Refuse a file that was written and that a program would not load as it should.

    Args:
        path: the file.
        format: a file in diffusers' names is held against diffusers alone.
        unet_config: of diffusers; None: SDXL's.
        expected: the layers that the file must say, to the bit of ``LoraLayer.delta``.

    Raises:
        IntegrityError: with program and keys.
    """
    findings = [found for found in check_file(path, unet_config) if format == "kohya" or found.program == "diffusers"]
    problems = [f"{found.program}: {problem}" for found in findings for problem in found.problems]
    if not problems and expected is not None:
        problems = differences(read_adapter(path, unet_config), expected)
    if problems:
        raise IntegrityError(
            "The LoRA that was written does not load as it should",
            where=str(path),
            why="; ".join(problems[:6]),
            hint="check the disk and type the same command again; if it stays, please report it with these keys",
        )


def differences(found: Adapter, expected: Adapter) -> list[str]:
    """Layers that are missing, too many, or add something else, in words; equal means equal bits."""
    names = sorted({*found.layers, *expected.layers})
    problems = []
    for name in names:
        ours, theirs = expected.layers.get(name), found.layers.get(name)
        if ours is None or theirs is None:
            problems.append(f"{name} is {'missing' if theirs is None else 'not expected'}")
        elif not _same(ours, theirs):
            problems.append(f"{name} reads back differently")
    return problems


def _same(ours: LoraLayer, theirs: LoraLayer) -> bool:
    # A scale that float32 cannot hold is stored as the nearest one it can.
    scales = [torch.tensor(layer.scale, dtype=torch.float32) for layer in (ours, theirs)]
    same = [torch.equal(a.to("cpu"), b.to("cpu")) for a, b in ((ours.down, theirs.down), (ours.up, theirs.up))]
    return all(same) and bool(torch.isclose(scales[0], scales[1], rtol=1e-7, atol=0.0))


# ---- ComfyUI, A1111, Forge: their rules


def _by_rules(program: Program, header: Header, known: Layers) -> Finding:
    endings = _ENDINGS.get(program, _ENDINGS["ComfyUI"])
    place = _a1111_layer if program == "A1111" else _comfy_layer
    used: set[str] = set()
    loaded = 0
    problems = []
    for key, shape in header.shapes.items():
        down, up = next(((d, u) for d, u in endings if key.endswith(d)), ("", ""))
        if not down:
            continue
        stem = key.removesuffix(down)
        name, partner = place(stem, known), stem + up
        if name is None or partner not in header.shapes:
            continue
        wanted, found = known.shapes[name], header.shapes[partner]
        if (found[0], *shape[1:2]) != wanted[:2] or found[1] != shape[0] or len(shape) != len(wanted):
            problems.append(f"{key} is {shape} for a weight of {wanted}")
        used |= {key, partner, f"{stem}.alpha"}
        loaded += 1
    unused = sorted(header.shapes.keys() - used)
    total = loaded + len({_stem(key) for key in unused})
    if unused:
        problems.insert(0, f"{len(unused)} keys are not loaded: {', '.join(unused[:3])}")
    return Finding(program, loaded, total, (*problems, *_listing(program, header.metadata)))


def _stem(key: str) -> str:
    return re.sub(r"\.(alpha|lora_\w+\.weight|lora_\w+\.default\.weight)$|_lora\.(down|up)\.weight$", "", key)


def _comfy_layer(stem: str, known: Layers) -> str | None:
    """Kohya's names with sgm or diffusers blocks, dotted sgm, and the names of diffusers' old attention processors."""
    if stem.startswith((TE1, TE2)):
        return None if stem.endswith("text_projection") else known.by_kohya.get(stem)
    if stem.startswith(UNET):
        return known.by_kohya.get(stem)
    if stem.startswith("lycoris_"):
        return known.by_kohya.get(UNET + stem.removeprefix("lycoris_"))
    if stem.startswith("diffusion_model."):
        return known.by_dotted.get(stem.removeprefix("diffusion_model."))
    if stem.startswith("text_encoder"):
        return stem if stem in known.shapes and not stem.endswith("text_projection") else None
    name = "unet." + stem.removeprefix("unet.").replace(".processor.to_", ".to_")
    name += ".0" if name.endswith(".to_out") else ""
    # Only with the processor in it; a layer that has no "to_" in its name is known by its plain one.
    plain = ".to_" in name and ".processor." not in stem
    return name if name in known.shapes and not plain else None


def _a1111_layer(stem: str, known: Layers) -> str | None:
    """Kohya's names; blocks by diffusers' names are counted by three, and an upsampler of block 0 is sought wrongly."""
    if re.fullmatch(r"lora_unet_up_blocks_0_upsamplers_0_conv", stem):
        return None
    if stem.startswith(UNET + "add_embedding"):
        return None
    return known.by_kohya.get(stem) if stem.startswith((UNET, TE1, TE2)) else None


def _listing(program: Program, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Whether the program's list would show the file while an SDXL is loaded."""
    base = metadata.get("ss_base_model_version", "")
    if program == "A1111" and metadata and not base.startswith("sdxl_"):
        kind = "Stable Diffusion 2" if metadata.get("ss_v2") == "True" else "Stable Diffusion 1"
        return (f"hidden: taken for {kind}, as ss_base_model_version is {base or 'missing'!r} and not sdxl_...",)
    shown = metadata.get("modelspec.architecture") == SDXL_ARCHITECTURE or base.startswith("sdxl_")
    if program == "Forge" and metadata and not shown:
        return ("listed as of unknown base: neither modelspec.architecture nor ss_base_model_version says SDXL",)
    return ()


# ---- diffusers: asked itself


def _diffusers(path: Path, header: Header, unet_config: Mapping[str, Any] | None) -> Finding:
    known, total = layers(unet_config), len({_stem(key) for key in header.shapes})
    try:
        state = diffusers_state(load_safetensors(path), unet_config)
        names = {_diffusers_name(key) for key in state}
    except CraftError:
        raise
    except Exception as error:  # whatever diffusers raises on keys it does not know
        return Finding("diffusers", 0, total, (str(error).strip().splitlines()[0][:300],))
    unknown = sorted(name for name in names if name not in known.shapes)
    problems = [f"{len(unknown)} layers are not the model's: {', '.join(unknown[:3])}"] if unknown else []
    for key, value in state.items():
        shape = known.shapes.get(_diffusers_name(key))
        if shape is not None and _misfits(key, tuple(value.shape), shape):
            problems.append(f"{key} is {tuple(value.shape)} for a weight of {shape}")
    return Finding("diffusers", len(names) - len(unknown), len(names), tuple(problems))


def _misfits(key: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    down = ".lora_A." in key or ".down." in key
    return shape[1] != weight[1] if down else shape[0] != weight[0]


def _diffusers_name(key: str) -> str:
    """The layer of a key that diffusers' own conversion gives."""
    stem = re.sub(r"\.lora_[AB](\.default)?\.weight$|(\.|_)lora(_linear_layer)?\.(down|up)\.weight$", "", key)
    stem = re.sub(r"\.processor\.(to_\w+)$", r".\1", stem)
    stem = re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", stem)
    stem = re.sub(r"self_attn\.to_([qkv])$", r"self_attn.\1_proj", stem)
    stem = re.sub(r"self_attn\.to_out$", r"self_attn.out_proj", stem)
    return stem + ".0" if stem.endswith(".to_out") else stem


def diffusers_state(state: Mapping[str, torch.Tensor], unet_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A file's tensors under the names that ``StableDiffusionXLPipeline.load_lora_weights`` gives them."""
    import_bitsandbytes()
    import diffusers

    config = SimpleNamespace(**dict(unet_config or published.UNET))
    converted, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=config)
    return dict(converted)
