"""Reading tensors and pictures that may be corrupt or hostile.

safetensors only: a pickle runs code when it is loaded, whatever its name says, so it is refused and never opened.
Tensor values are checked for NaN and infinity, which the format itself does not do.
"""

from __future__ import annotations

import io
import json
import shlex
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_fast.errors import EnvironmentProblem, IntegrityError
from craft_fast.store.digest import sha256_bytes, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

MAX_HEADER_BYTES = 100_000_000
MAX_PIXELS = 64_000_000
_IN_MEMORY_BYTES = 256 * 1024 * 1024
_PICKLES = {"a PyTorch zip archive (pickle)", "a pickle"}


def describe(path: Path | str) -> str | None:
    """What a file that is not safetensors is, told from its first bytes; None when it could be safetensors."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "an empty file"
    for magic, name in (
        (b"PK\x03\x04", "a PyTorch zip archive (pickle)"),
        (b"\x89PNG", "a PNG image"),
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"GGUF", "a GGUF file"),
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
        (b"<", "an HTML or XML page"),
    ):
        if head.startswith(magic):
            return name
    # Pickle protocols 2 to 5 begin with 0x80 and the protocol's number; a safetensors header as long as that low
    # byte pattern would still have "{" at offset 8.
    if head[0] == 0x80 and len(head) > 1 and head[1] in (2, 3, 4, 5) and head[8:9] != b"{":
        return "a pickle"
    return None


def load_safetensors(
    path: Path | str, *, expect_sha256: str | None = None, check_finite: bool = True
) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Args:
        path: the file.
        expect_sha256: hex digest that the content must have.
        check_finite: refuse NaN and infinity in floating-point tensors.

    Returns:
        Name to tensor, as stored.

    Raises:
        IntegrityError: missing, altered, a pickle or another format, a broken header, or values that are not finite.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    path = Path(path)
    if not path.is_file():
        raise IntegrityError(
            "A tensor file is missing", where=str(path), hint="craft-fast verify lists what is missing"
        )
    size = path.stat().st_size
    data = path.read_bytes() if size <= _IN_MEMORY_BYTES else None
    if expect_sha256 is not None:
        found = sha256_bytes(data) if data is not None else sha256_file(path)
        if found != expect_sha256:
            raise IntegrityError(
                "A file is not what was written",
                where=str(path),
                why=f"sha256 is {found[:16]}..., its record says {expect_sha256[:16]}...",
                hint="the file was altered or damaged; the same command again rebuilds what can be rebuilt",
            )
    check_header(path)
    try:
        tensors = safetensors.torch.load(data) if data is not None else safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _not_safetensors(path, str(error)) from error
    if check_finite:
        _refuse_non_finite(path, tensors)
    return dict(tensors)


def check_header(path: Path | str) -> None:
    """Refuse what is not safetensors before a parser sees it: other formats, and a header longer than the file.

    Raises:
        IntegrityError: with what the file is and, for a pickle, the command that converts it.
    """
    path = Path(path)
    kind = describe(path)
    if kind in _PICKLES:
        raise IntegrityError(
            "A pickle is refused: loading one runs whatever code it holds",
            where=str(path),
            why=f"the file is {kind}, whatever its name says",
            hint="if you trust where it comes from, convert it with: " + conversion_command(path),
        )
    if kind is not None:
        raise IntegrityError("Not a safetensors file", where=str(path), why=f"the file is {kind}", hint="get it again")
    with open(path, "rb") as file:
        prefix = file.read(9)
        size = path.stat().st_size
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 9 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _not_safetensors(path, f"the header says {length} bytes, the file has {size}")
    if prefix[8:9] != b"{":
        raise _not_safetensors(path, "the header is not JSON")


def conversion_command(path: Path) -> str:
    """A shell command that turns a pickled state dict into safetensors without running its code."""
    source, target = str(path), str(path.with_suffix("")) + ".converted.safetensors"
    program = (
        "import torch, safetensors.torch as s; "
        f"d = torch.load(open({json.dumps(source)}, 'rb'), weights_only=True, map_location='cpu'); "
        "d = d.get('state_dict', d); "
        f"s.save_file({{k: v.contiguous() for k, v in d.items()}}, {json.dumps(target)})"
    )
    return "python -c " + shlex.quote(program)


def _not_safetensors(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "A safetensors file is damaged or not one",
        where=str(path),
        why=why,
        hint="get the file again; one that craft-fast made is rebuilt by the same command",
    )


def _refuse_non_finite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    import torch

    for name, tensor in tensors.items():
        # float8 types have no isfinite of their own.
        values = tensor.float() if tensor.dtype.is_floating_point and tensor.element_size() == 1 else tensor
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise IntegrityError(
                "A tensor holds NaN or infinity",
                where=f"{path} ({name})",
                why=f"{bad} of {values.numel()} values are not finite",
                hint="the file is not used; the same command again rebuilds what can be rebuilt",
            )


def read_image(path: Path | str) -> torch.Tensor:
    """Read a PNG, JPEG or WebP picture of at most 64 megapixels, turned as its EXIF data say.

    Alpha is dropped, not blended: the colours under it are taken, as every published reward does. Of 16 bits the upper
    8 are taken. Of an animation the first picture is taken.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        IntegrityError: another format, damaged, or too large.
        EnvironmentProblem: there is no such file.
    """
    import torch
    from PIL import Image

    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem("A picture cannot be read", where=str(path), why=str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a palette's transparency, unreadable EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                pixels = _upright(_rgb(image), image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise IntegrityError(
            "A picture is too large", where=str(path), why=f"{error}; allowed: 64 megapixels"
        ) from error
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, struct.error) as error:
        raise IntegrityError(
            "A picture is damaged or of a kind that is not read",
            where=str(path),
            why=str(error),
            hint="PNG, JPEG, WebP",
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _rgb(image: PIL.Image.Image) -> np.ndarray[Any, Any]:
    """Decoded pixels, uint8 [H, W, 3]."""
    import numpy as np

    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips in some versions
        grey = np.asarray(image).astype(np.int32) >> 8  # the upper byte, as Pillow takes of 16-bit colours
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _upright(pixels: np.ndarray[Any, Any], image: PIL.Image.Image) -> np.ndarray[Any, Any]:
    """Turned and mirrored by the EXIF orientation, 1 to 8; unreadable EXIF data are as if there were none."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, struct.error):
        orientation = 1
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels.copy()
