"""Weights from a file into a network, tensor by tensor: at no time is a tower in memory twice.

A network is made without memory (on the meta device); each of its tensors is then made from the file's, which is
mapped and not read as a whole, cut, turned and cast as its ``Piece`` says, checked, and put in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from craft_fast.errors import EnvironmentProblem, IntegrityError
from craft_fast.rewards.keys import Piece, identity
from craft_fast.sdxl.published import fill_buffers
from craft_fast.store.official import read_official
from craft_fast.store.safe_load import check_header

_OFFICIAL = {".pt", ".pth", ".bin", ".ckpt"}


@dataclass(frozen=True)
class TensorFile:
    """A file of named tensors that are read one at a time.

    Attributes:
        path: the file.
        shapes: name to shape.
        get: the tensor of a name, as stored; its bytes may be the file's, mapped.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    get: Callable[[str], Tensor]


def read_tensors(path: Path) -> TensorFile:
    """Open a safetensors file, or an official pickle of tensors, by its content and not by its name.

    Raises:
        EnvironmentProblem: there is no such file.
        IntegrityError: damaged, of another format, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise EnvironmentProblem("A reward's file is missing.", where=str(path))
    if path.suffix in _OFFICIAL:
        tensors = read_official(path, check_finite=False)
        return TensorFile(path, {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__)
    return _safetensors(path)


def _safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    check_header(path)
    try:
        file: Any = safe_open(path, framework="pt")
        names: list[str] = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, ValueError, OSError) as error:
        raise IntegrityError(
            "A reward's weights are damaged.", where=str(path), why=str(error), hint="get the file again"
        ) from error
    return TensorFile(path, shapes, file.get_tensor)


def unfilled(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A network whose weights a file will fill, without drawing random ones first: 6 s for CLIP ViT-L on one core."""
    with torch.device("meta"):
        network = make()
    return network.to(dtype)


@torch.no_grad()
def fill(module: nn.Module, file: TensorFile, dtype: torch.dtype, pieces: Mapping[str, Piece] | None = None) -> None:
    """Give a network from ``unfilled`` its weights, in eval mode and without gradients.

    Args:
        module: on the meta device.
        file: of the weights.
        dtype: of the weights; single numbers (a logit scale) stay as precise as they are stored.
        pieces: name in ``module`` to the file's tensor it is made of; None: names are equal.

    Raises:
        IntegrityError: keys missing or left over, shapes that differ, values that are not finite.
    """
    pieces = identity(file.shapes) if pieces is None else pieces
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check_fit(wanted, pieces, file.shapes, file.path)
    filled = {name: _made(file, piece, name, dtype) for name, piece in pieces.items()}
    module.load_state_dict(filled, strict=True, assign=True)
    fill_buffers(module, "cpu")
    module.eval().requires_grad_(False)


def check_fit(
    wanted: Mapping[str, tuple[int, ...]],
    pieces: Mapping[str, Piece],
    shapes: Mapping[str, tuple[int, ...]],
    where: Path,
) -> None:
    """Compare a network's names and shapes with what a file gives.

    Raises:
        IntegrityError: keys missing or left over, or shapes that differ.
    """
    missing, unexpected = sorted(wanted.keys() - pieces.keys()), sorted(pieces.keys() - wanted.keys())
    if missing or unexpected:
        raise IntegrityError(
            "The reward's weights do not fit its configuration.",
            where=str(where),
            why=f"missing keys: {missing[:5]}, unexpected keys: {[pieces[name].source for name in unexpected[:5]]}",
            hint="use the checkpoint that belongs to this configuration",
        )
    for name, piece in pieces.items():
        if piece.shape(shapes[piece.source]) != wanted[name]:
            raise IntegrityError(
                "The reward's weights do not fit its configuration.",
                where=f"{where} ({piece.source})",
                why=f"its shape is {list(shapes[piece.source])}, which does not give {name} {list(wanted[name])}",
                hint="use the checkpoint that belongs to this configuration",
            )


def _made(file: TensorFile, piece: Piece, name: str, dtype: torch.dtype) -> Tensor:
    source = file.get(piece.source)
    if not source.is_floating_point():
        raise IntegrityError("A reward's weight is not a number with a fraction.", where=f"{file.path} ({name})")
    kept = torch.float32 if source.ndim == 0 else dtype
    made = piece.apply(source).to(kept, copy=True, memory_format=torch.contiguous_format)
    if not finite(made):
        overflow = finite(source)
        raise IntegrityError(
            f"A weight is too large for {dtype}." if overflow else "A tensor holds NaN or infinity.",
            where=f"{file.path} ({piece.source})",
            why=f"its largest value is {float(source.abs().max())}" if overflow else "the file is damaged",
            hint="set score.dtype: float32" if overflow else "get the file again; it is not used",
        )
    return made


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; by a sum first, which costs a tenth of looking at every value."""
    flat = tensor.reshape(-1)
    if math.isfinite(float(flat.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(flat).all())
