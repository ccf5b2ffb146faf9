"""Would it load? The rules by which ComfyUI, A1111, Forge and diffusers read a LoRA file, applied to a file.

Facts, not code, of: ComfyUI comfy/lora.py and comfy/weight_adapter/lora.py; A1111 extensions-builtin/Lora/networks.py
and network.py; Forge extensions-builtin/sd_forge_lora/network.py, which reads keys as ComfyUI does. diffusers is asked
itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isclose, prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from craft_fast.errors import CraftError, IntegrityError
from craft_fast.lora.adapter import COMPONENTS, Adapter, LoraLayer
from craft_fast.lora.keys import TE1, TE2, UNET, Layers, layers
from craft_fast.lora.reading import DIFFUSERS_METADATA, Patterns, adapter_of, read_adapter, refuse_other_kinds
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
    "A1111": ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")),
}  # fmt: skip
SDXL_ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"
OFF_STRENGTH = "layers at another strength than the file says"
"""In a problem's words: matrices are loaded, but not multiplied with ``alpha / rank``."""


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
    if expected is not None and len({layer.alpha for layer in expected.layers.values()}) > 1:
        # Of kohya's keys diffusers reads one alpha for all attention layers; nothing in a file can change that.
        problems = [problem for problem in problems if OFF_STRENGTH not in problem]
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
    # An alpha that float32 cannot hold is stored as the nearest one that it can.
    alphas = [torch.tensor(layer.scale * layer.rank, dtype=torch.float32) for layer in (ours, theirs)]
    same = [torch.equal(a.to("cpu"), b.to("cpu")) for a, b in ((ours.down, theirs.down), (ours.up, theirs.up))]
    return all(same) and torch.equal(*alphas)


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
        found = header.shapes[partner]
        if not _fits(shape, found, known.shapes[name] if name in known.sized else None):
            problems.append(f"{key} is {shape}, {partner} {found}, for a weight of {known.shapes[name]}")
        used |= {key, partner, f"{stem}.alpha"}
        loaded += 1
    unused = sorted(header.shapes.keys() - used)
    total = loaded + len({_stem(key) for key in unused})
    if unused:
        problems.insert(0, f"{len(unused)} keys are not loaded: {', '.join(unused[:3])}")
    return Finding(program, loaded, total, (*problems, *_listing(program, header.metadata)))


def _fits(down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...] | None) -> bool:
    """Whether ``up @ down``, each flattened to two axes, has as many numbers as the weight: the programs reshape it."""
    if min(len(down), len(up)) < 2 or prod(up[1:]) != down[0]:
        return False
    return weight is None or (up[0] == weight[0] and prod(down[1:]) == prod(weight[1:]))


def _stem(key: str) -> str:
    return re.sub(r"\.(alpha|lora_\w+(\.default)?\.weight)$|[._]lora(_linear_layer)?\.(down|up)\.weight$", "", key)


def _comfy_layer(stem: str, known: Layers) -> str | None:
    """Kohya's names with sgm or diffusers blocks, dotted sgm, and the names of diffusers' old attention processors."""
    if stem.startswith("lora_te_"):
        stem = TE1 + stem.removeprefix("lora_te_")
    if stem.startswith((UNET, TE1, TE2)):
        return known.by_kohya.get(stem)
    if stem.startswith("lycoris_"):
        return known.by_kohya.get(UNET + stem.removeprefix("lycoris_"))
    if stem.startswith("diffusion_model."):
        return known.by_dotted.get(stem.removeprefix("diffusion_model."))
    if stem.startswith("text_encoders.clip_"):
        stem = stem.replace("text_encoders.clip_l.transformer", "text_encoder")
        stem = stem.replace("text_encoders.clip_g.transformer", "text_encoder_2")
    if stem.startswith("text_encoder"):
        return stem if stem in known.shapes and not stem.endswith("text_projection") else None
    name = "unet." + stem.removeprefix("unet.").replace(".processor.to_", ".to_")
    name += ".0" if name.endswith(".to_out") else ""
    # Only with the processor in it; a layer that has no "to_" in its name is known by its plain one.
    plain = ".to_" in name and ".processor." not in stem
    return name if name in known.shapes and not plain else None


def _a1111_layer(stem: str, known: Layers) -> str | None:
    """Kohya's names; of diffusers' blocks, the first upsampler is sought where Stable Diffusion 1 has it."""
    if stem == UNET + "up_blocks_0_upsamplers_0_conv" or stem.startswith(UNET + "add_embedding"):
        return None
    if stem == TE2 + "text_projection":
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
    tensors = load_safetensors(path)
    try:
        state, alphas = _converted(tensors, unet_config)
        parts = {component: _as_peft(state, component, tensors) for component in COMPONENTS}
        configs = {part: _peft_config(own, part, alphas, header.metadata) for part, own in parts.items() if own}
    except CraftError:
        raise
    except Exception as error:  # whatever diffusers raises on keys it does not know
        return Finding("diffusers", 0, total, ((str(error).strip().splitlines() or [repr(error)])[0][:300],))
    names = {_canonical(component, key) for component, own in parts.items() for key in own}
    names |= {key for key in state if not key.startswith(tuple(f"{component}." for component in COMPONENTS))}
    taken = _taken(tensors, unet_config, known) if names - known.shapes.keys() else {}
    said = "; ".join(f"{stem}, read as {name}" for stem, name in list(taken.items())[:3])
    problems = [f"{len(taken)} layers are not the model's: {said}"] if taken else []
    for component, own in parts.items():
        for key, value in own.items():
            name = _canonical(component, key)
            if name in known.sized and _misfits(key, tuple(value.shape), known.shapes[name]):
                problems.append(f"{name} is {tuple(value.shape)} for a weight of {known.shapes[name]}")
    if not problems:
        adapter = adapter_of(tensors, header.metadata, known, where=str(path))
        if dropped := sorted(adapter.layers.keys() - names):
            return Finding(
                "diffusers", total - len(dropped), total, (f"left out in silence: {', '.join(dropped[:3])}",)
            )
        problems += _off_strength(adapter, parts, configs)
    return Finding("diffusers", total - len(taken), total, tuple(problems))


def diffusers_state(state: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """A file's tensors under the names that ``StableDiffusionXLPipeline.load_lora_weights`` gives them.

    Raises:
        ValueError: diffusers does not know a key.
    """
    return _converted(state, unet_config)[0]


def _converted(
    state: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    import_bitsandbytes()
    import diffusers

    config = SimpleNamespace(**dict(unet_config or published.UNET))
    converted, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=config)
    return dict(converted), alphas


def _taken(tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None, known: Layers) -> dict[str, str]:
    """Keys of the file, without their endings, that diffusers takes for a layer which is not there, and for which."""
    by_stem: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        by_stem.setdefault(_stem(key), {})[key] = value
    found = {}
    for stem, own in by_stem.items():
        names = {_canonical(*key.partition(".")[::2]) for key in _converted(own, unet_config)[0]}
        if strange := sorted(names - known.shapes.keys()):
            found[stem] = strange[0]
    return found


def _as_peft(state: Mapping[str, Tensor], component: str, file: Iterable[str]) -> dict[str, Tensor]:
    """One component's tensors by PEFT's names, as diffusers' loaders (peft.py, lora_base.py) make them."""
    from diffusers.utils import state_dict_utils

    own = {key.removeprefix(f"{component}."): v for key, v in state.items() if key.startswith(f"{component}.")}
    if component != "unet" and own:
        try:
            own = state_dict_utils.convert_state_dict_to_peft(state_dict_utils.convert_state_dict_to_diffusers(own))
        except ValueError as error:
            marks = (
                ("lora_te2_", "text_encoder_2.") if component[-1] == "2" else ("lora_te_", "lora_te1_", "text_encoder.")
            )
            keys = [key for key in file if key.startswith(marks)]
            raise ValueError(f"{error} from {', '.join(keys[:3])}, without a layer's out_proj among them") from error
        if component == "text_encoder":
            # As transformers 5.6 took it off the modules of CLIPTextModel; alphas keep it, and fit no module then.
            own = {key.removeprefix("text_model."): value for key, value in own.items()}
    elif own and "lora_A" not in next(iter(own)):
        own = state_dict_utils.convert_unet_state_dict_to_peft(own)
    return own


def _peft_config(
    own: Mapping[str, Tensor], component: str, alphas: Mapping[str, float] | None, metadata: Mapping[str, str]
) -> Mapping[str, Any]:
    """What diffusers gives to ``peft.LoraConfig``: the header's word, else what it makes of ranks and alphas."""
    from diffusers.utils.peft_utils import get_peft_kwargs

    said = json.loads(metadata[DIFFUSERS_METADATA]) if DIFFUSERS_METADATA in metadata else None
    if said and alphas:
        raise ValueError(f"it refuses alphas beside {DIFFUSERS_METADATA} in the header")
    if said:
        return {k.removeprefix(f"{component}."): v for k, v in said.items() if k.startswith(f"{component}.")}
    prefix, mark = f"{component}.", "^" if component == "unet" else ""
    ranks = {f"{mark}{key}": value.shape[1] for key, value in own.items() if ".lora_B." in key}
    if component != "unet":
        ranks = {key: rank for key, rank in ranks.items() if "text_projection" not in key}
    if not ranks:
        raise ValueError(f"it does not load {', '.join(own)} alone")
    mine = {key.removeprefix(prefix): alpha for key, alpha in (alphas or {}).items() if key.startswith(prefix)}
    made: Mapping[str, Any] = get_peft_kwargs(ranks, mine, own, is_unet=component == "unet")
    return made


def _off_strength(
    adapter: Adapter, parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Layers that PEFT, told what diffusers tells it, makes of another rank, or multiplies with something else."""
    off, wrong = [], []
    for component, config in configs.items():
        ranks, alphas = Patterns(config.get("rank_pattern") or {}), Patterns(config.get("alpha_pattern") or {})
        for key in parts[component]:
            if ".lora_A." not in key:
                continue
            name, module = _canonical(component, key), _stem(key)
            layer, rank = adapter.layers[name], float(ranks.get([module], config["r"]))
            alpha = float(alphas.get([module], config["lora_alpha"]))
            if rank != layer.rank:
                wrong.append(f"{name} ({rank:g}, not {layer.rank})")
            elif not isclose(alpha / (rank**0.5 if config.get("use_rslora") else rank), layer.scale, rel_tol=1e-6):
                off.append(name)
    if wrong:
        yield f"the header names another rank for {len(wrong)} layers: {', '.join(wrong[:3])}"
    if off:
        yield f"{len(off)} {OFF_STRENGTH}: {', '.join(off[:3])}"


def _canonical(component: str, key: str) -> str:
    """The layer, named as in ``Adapter.layers``, of a key in PEFT's or diffusers' naming."""
    module = _stem(key)
    module = re.sub(r"\.processor\.(to_\w+)$", r".\1", module)
    if component == "unet" and module.endswith(".to_out"):
        module += ".0"
    module = re.sub(r"self_attn\.to_([qkv])$", r"self_attn.\1_proj", module)
    module = re.sub(r"self_attn\.to_out$", "self_attn.out_proj", module)
    if component != "unet" and module.startswith("encoder."):
        module = f"text_model.{module}"
    return f"{component}.{module}"


def _misfits(key: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """PEFT takes no other shape than the layer's own."""
    return shape[1:] != weight[1:] if ".lora_A." in key else (shape[0], len(shape)) != (weight[0], len(weight))
