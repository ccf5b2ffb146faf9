"""Names of the official files' tensors, and which of them a network's own tensors are made of.

No rule guesses: a name that none knows is an error, and so is one that a network needs and no rule made.
Names and shapes of the official files at full size are listed in tests/unit/facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from craft_fast.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

# open_clip: HPSv2's file; clip: a transformers CLIPModel; tower: its image half with the projection alone; blip:
# ImageReward.pt; mps: RE-N-Y/mpsv1; own: what save_folder wrote, names as in the network.
Layout = Literal["open_clip", "clip", "tower", "blip", "mps", "own"]


@dataclass(frozen=True)
class Piece:
    """A tensor of a network, made of one of a file.

    Attributes:
        source: name in the file.
        transpose: the file's matrix is the other way round.
        third: 0, 1 or 2: this third of its rows alone; None: all of it.
    """

    source: str
    transpose: bool = False
    third: int | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """The piece of ``tensor``, a view of it."""
        if self.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[self.third * rows : (self.third + 1) * rows]
        return tensor.T if self.transpose else tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What shape the piece of a tensor of ``shape`` has."""
        if self.third is not None and shape:
            shape = (shape[0] // 3 if shape[0] % 3 == 0 else 0, *shape[1:])
        return shape[::-1] if self.transpose else shape


# A rule: pattern of the file's name, and templates of the network's names with how each is made. Nothing: dropped.
Rule = tuple[str, tuple[tuple[str, str], ...]]
_QKV = ("q", "k", "v")


def _same(pattern: str, template: str) -> Rule:
    return pattern, ((template, ""),)


def _open_clip_tower(theirs: str, ours: str) -> list[Rule]:
    block, layer = rf"{theirs}transformer\.resblocks\.(\d+)\.", rf"{ours}.encoder.layers.\1."
    rules = [
        (rf"{block}attn\.in_proj_(weight|bias)", tuple((rf"{layer}self_attn.{p}_proj.\2", p) for p in _QKV)),
        _same(rf"{block}attn\.out_proj\.(weight|bias)", rf"{layer}self_attn.out_proj.\2"),
        _same(rf"{block}ln_([12])\.(weight|bias)", rf"{layer}layer_norm\2.\3"),
        _same(rf"{block}mlp\.c_fc\.(weight|bias)", rf"{layer}mlp.fc1.\2"),
        _same(rf"{block}mlp\.c_proj\.(weight|bias)", rf"{layer}mlp.fc2.\2"),
    ]
    return rules


_OPEN_CLIP: list[Rule] = [
    *_open_clip_tower(r"visual\.", "vision_model"),
    *_open_clip_tower("", "text_model"),
    _same("logit_scale", "logit_scale"),
    _same("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    _same(r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    _same(r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    ("text_projection", (("text_projection.weight", "T"),)),
    _same(r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    _same(r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    _same(r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    _same(r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    _same(r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", (("visual_projection.weight", "T"),)),
    ("attn_mask", ()),  # a constant, in files of open_clip before 2.20
]
# Older files carry position ids, which are constants that transformers now builds itself.
_CLIP_TENSORS = r"(logit_scale|(?:text|vision)_model\..+|(?:text|visual)_projection\.weight)"
_POSITION_IDS: Rule = (r"(?:.+\.)?position_ids", ())
_CLIP: list[Rule] = [_POSITION_IDS, _same(_CLIP_TENSORS, r"\1")]
_TOWER: list[Rule] = [
    _POSITION_IDS,
    _same(r"(vision_model\..+|visual_projection\.weight)", r"\1"),
    (r"text_model\..+|text_projection\.weight|logit_scale", ()),  # the text half, which nobody asks
]
_VIT = r"blip\.visual_encoder\."
_VIT_BLOCK, _VIT_LAYER = rf"{_VIT}blocks\.(\d+)\.", r"visual_encoder.encoder.layers.\1."
_BLIP: list[Rule] = [
    _POSITION_IDS,
    _same(rf"{_VIT}cls_token", "visual_encoder.embeddings.class_embedding"),
    _same(rf"{_VIT}pos_embed", "visual_encoder.embeddings.position_embedding"),
    _same(rf"{_VIT}patch_embed\.proj\.(weight|bias)", r"visual_encoder.embeddings.patch_embedding.\1"),
    _same(rf"{_VIT}norm\.(weight|bias)", r"visual_encoder.post_layernorm.\1"),
    _same(rf"{_VIT_BLOCK}norm([12])\.(weight|bias)", rf"{_VIT_LAYER}layer_norm\2.\3"),
    _same(rf"{_VIT_BLOCK}attn\.qkv\.(weight|bias)", rf"{_VIT_LAYER}self_attn.qkv.\2"),
    _same(rf"{_VIT_BLOCK}attn\.proj\.(weight|bias)", rf"{_VIT_LAYER}self_attn.projection.\2"),
    _same(rf"{_VIT_BLOCK}mlp\.fc([12])\.(weight|bias)", rf"{_VIT_LAYER}mlp.fc\2.\3"),
    _same(r"blip\.(text_encoder\..+)", r"\1"),
    _same(r"(mlp\.layers\.\d+\.(?:weight|bias))", r"\1"),
    (r"blip\.(?:vision|text)_proj\.(?:weight|bias)", ()),  # of BLIP's training, not used by the score
]
_MPS_LAYER, _OUR_LAYER = r"mps\.cross_model\.layers\.(\d+)\.", r"cross.layers.\1."
_MPS: list[Rule] = [
    _POSITION_IDS,
    _same(rf"mps\.model\.{_CLIP_TENSORS}", r"clip.\1"),
    _same(rf"{_MPS_LAYER}0\.fn\.norm\.(weight|bias)", rf"{_OUR_LAYER}attend.norm.\2"),
    _same(rf"{_MPS_LAYER}0\.fn\.(to_q|to_kv|to_out)\.weight", rf"{_OUR_LAYER}attend.\2.weight"),
    _same(rf"{_MPS_LAYER}0\.fn\.ff\.0\.weight", rf"{_OUR_LAYER}attend.ff_in.weight"),
    _same(rf"{_MPS_LAYER}0\.fn\.ff\.2\.weight", rf"{_OUR_LAYER}attend.ff_out.weight"),
    _same(rf"{_MPS_LAYER}1\.fn\.norm\.(weight|bias)", rf"{_OUR_LAYER}block.norm.\2"),
    _same(rf"{_MPS_LAYER}1\.fn\.fused_attn_ff_proj\.weight", rf"{_OUR_LAYER}block.fused.weight"),
    _same(rf"{_MPS_LAYER}1\.fn\.attn_out\.weight", rf"{_OUR_LAYER}block.attn_out.weight"),
    _same(rf"{_MPS_LAYER}1\.fn\.ff_out\.1\.weight", rf"{_OUR_LAYER}block.ff_out.weight"),
    (rf"{_MPS_LAYER}1\.fn\.rotary_emb\.inv_freq", ()),  # a constant
]
_RULES: dict[Layout, list[Rule]] = {
    "open_clip": _OPEN_CLIP,
    "clip": _CLIP,
    "tower": _TOWER,
    "blip": _BLIP,
    "mps": _MPS,
    "own": [_POSITION_IDS, _same(r"(.+)", r"\1")],
}


def recognise(names: Iterable[str], family: str) -> Layout:
    """Which layout a file has, by the names of its tensors.

    Args:
        names: of the tensors.
        family: of the network that is to be made.

    Returns:
        The layout; ``own`` where names are those of the network, or of nothing known: then ``pieces`` or ``fill`` say
        what does not fit.
    """
    known = set(names)
    if family == "clip":
        return "open_clip" if "visual.conv1.weight" in known or "visual.proj" in known else "clip"
    if family == "aesthetic":
        return "tower"
    prefix: Layout = "blip" if family == "image_reward" else "mps"
    return prefix if any(name.startswith(f"{prefix}.") for name in known) else "own"


def pieces(layout: Layout, names: Iterable[str], where: Path | str = "") -> dict[str, Piece]:
    """What a network's tensors are made of.

    Args:
        layout: of the file.
        names: of its tensors.
        where: the file, told in errors.

    Returns:
        Name in the network to piece of the file.

    Raises:
        IntegrityError: a name that the layout does not know.
    """
    rules = [(re.compile(pattern), targets) for pattern, targets in _RULES[layout]]
    made: dict[str, Piece] = {}
    unknown: list[str] = []
    for name in sorted(names):
        match, targets = next(((m, t) for rule, t in rules if (m := rule.fullmatch(name))), (None, ()))
        if match is None:
            unknown.append(name)
            continue
        for template, how in targets:
            third = _QKV.index(how) if how in _QKV else None
            made[match.expand(template)] = Piece(name, transpose=how == "T", third=third)
    if unknown:
        raise IntegrityError(
            "A reward's file holds tensors that its model does not have.",
            where=str(where),
            why=f"taken for the layout {layout}; {len(unknown)} unexpected keys, such as {unknown[:5]}",
            hint="use the file that the model was published with: craft-fast rewards list",
        )
    return made


def identity(names: Iterable[str]) -> dict[str, Piece]:
    """Every tensor as it is, position ids left out."""
    return pieces("own", names)
