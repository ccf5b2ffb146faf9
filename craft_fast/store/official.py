"""Published weights that exist only as a pickle: read without running anything the file says.

A pickle is a program. Before PyTorch sees the file, its opcodes are listed (``pickletools`` reads and never executes)
and every class or function it names must be on a short list of what a dictionary of tensors needs; then
``torch.load(weights_only=True)`` reads it, mapped into memory where the format allows.
Formats: PyTorch's zip archive (since 1.6) and the older one, a row of pickles with the numbers behind them.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_fast.errors import EnvironmentProblem, IntegrityError
from craft_fast.store.digest import sha256_file
from craft_fast.store.safe_load import describe

if TYPE_CHECKING:
    from torch import Tensor

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "UntypedStorage"),
        ("torch", "Size"),
        *(("torch", f"{kind}Storage") for kind in _STORAGES),
    }
)
# All that torch.save writes for tensors in dictionaries, lists and tuples; a subset of what weights_only=True knows.
_WRITTEN = (
    "PROTO STOP MARK NONE NEWFALSE NEWTRUE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT GLOBAL REDUCE BUILD BINPERSID"
)
_OPCODES = frozenset(_WRITTEN.split())
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5  # magic number, version, machine, the object, the storages' keys
MAX_PICKLE_BYTES = 16 * 1024**2  # that of CLIP ViT-H's 686 tensors is 88 kB
MAX_MEMBERS = 100_000
_LIMIT_NAMED = 4


def read_official(
    path: Path | str, *, expect_sha256: str | None = None, check_finite: bool = True
) -> dict[str, Tensor]:
    """Read the tensors of an official ``.pt`` or ``.pth`` onto the CPU.

    Args:
        path: the file.
        expect_sha256: hex digest that the content must have.
        check_finite: refuse NaN and infinity; reads every value.

    Returns:
        Name to tensor, as stored; of ``{"state_dict": ...}`` what is inside. From a zip archive the values are the
        file's own bytes, mapped: they take memory only while they are used.

    Raises:
        EnvironmentProblem: there is no such file.
        IntegrityError: not what it is said to be, altered, damaged, or a pickle of more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise EnvironmentProblem("A reward's file is missing.", where=str(path))
    if expect_sha256 is not None and (found := sha256_file(path)) != expect_sha256.lower():
        raise IntegrityError(
            "A file is not the published one.",
            where=str(path),
            why=f"its sha256 is {found}, the published one's is {expect_sha256}",
            hint="get it again: craft-fast rewards fetch",
        )
    sizes = inspect(path)
    tensors = _plain(path, _load(path, mapped=sizes is not None), sizes)
    if check_finite:
        _refuse_non_finite(path, tensors)
    return tensors


def inspect(path: Path | str) -> set[int] | None:
    """Refuse a file that is not a pickle of tensors alone; nothing of it is executed, and no tensor is read.

    Returns:
        Of a zip archive the sizes of its members, bytes; None for the older format.

    Raises:
        IntegrityError: with what the file is, and which class or function it names that is not allowed.
    """
    path = Path(path)
    if _kind(path) == "zip":
        data, sizes = _zip_pickle(path)
        _scan(path, [data])
        return sizes
    _scan(path, _legacy_pickles(path))
    return None


# ---- which format


def _kind(path: Path) -> str:
    kind = describe(path)
    if kind is None:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":
            raise IntegrityError(
                "This is a safetensors file under another name.",
                where=str(path),
                why="its name says that it is a pickle",
                hint=f"rename it: mv {path.name!r} {path.stem + '.safetensors'!r}",
            )
    if kind == "a PyTorch zip archive (pickle)":
        return "zip"
    if kind == "a pickle":
        return "legacy"
    raise IntegrityError(
        "Not a PyTorch file.", where=str(path), why=f"it is {kind or 'of an unknown format'}", hint="get it again"
    )


# ---- zip archives


def _zip_pickle(path: Path) -> tuple[bytes, set[int]]:
    """The one pickle of a zip archive and its members' sizes, after the archive itself was found to be in order."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = _checked_members(path, archive)
            return archive.read(name), {member.file_size for member in archive.infolist()}
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"as a zip archive it is broken: {error}") from error


def _checked_members(path: Path, archive: zipfile.ZipFile) -> str:
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(members) > MAX_MEMBERS:
        raise _odd(path, f"it has {len(members)} members")
    # PyTorch finds members without looking at upper and lower case.
    if len({name.lower() for name in names}) != len(names):
        raise _odd(path, "two of its members have one name")
    tops = {name.partition("/")[0] for name in names}
    if len(tops) != 1 or any(".." in name.split("/") or name.startswith("/") or "\\" in name for name in names):
        raise _odd(path, f"its members are not in one folder: {sorted(names)[:_LIMIT_NAMED]}")
    top = tops.pop()
    if any(name.startswith((f"{top}/code/", f"{top}/constants.pkl")) for name in names):
        raise _odd(path, "it is a TorchScript program, not a file of tensors")
    begin, size = 0, path.stat().st_size
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise _odd(path, f"{member.filename} is compressed; PyTorch writes its archives uncompressed")
        if member.header_offset < begin or member.header_offset + member.file_size > size:
            raise _odd(path, f"{member.filename} overlaps another member or the end of the file")
        begin = member.header_offset + member.file_size
    name = f"{top}/data.pkl"
    if name not in names:
        raise _odd(path, "it holds no data.pkl")
    if archive.getinfo(name).file_size > MAX_PICKLE_BYTES:
        raise _odd(path, f"its data.pkl is longer than {MAX_PICKLE_BYTES >> 20} MiB")
    return name


# ---- the older format


def _legacy_pickles(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    for number in range(_LEGACY_PICKLES):
        begin = head.tell()
        try:
            opcodes = [(opcode.name, arg) for opcode, arg, _ in pickletools.genops(head)]
        except Exception as error:  # whatever a broken stream makes of it
            raise _damaged(path, f"pickle {number + 1} of {_LEGACY_PICKLES} is broken: {error}") from error
        data = head.getbuffer()[begin : head.tell()].tobytes()
        if number == 0 and not any(arg == _LEGACY_MAGIC for _, arg in opcodes):
            _scan(path, [data])  # names what it holds, if that is more than plain values
            raise _odd(path, "it is a pickle, but not one that torch.save wrote")
        yield data


# ---- opcodes


def _scan(path: Path, pickles: Any) -> None:
    for data in pickles:
        try:
            opcodes = [(opcode.name, arg) for opcode, arg, _ in pickletools.genops(data)]
        except Exception as error:  # whatever a broken stream makes of it
            raise _damaged(path, f"its pickle is broken: {error}") from error
        foreign = sorted({name for name in _globals(opcodes) if name not in ALLOWED})
        if foreign:
            raise _foreign(path, foreign)
        strange = sorted({name for name, _ in opcodes} - _OPCODES)
        if strange:
            raise _odd(path, f"its pickle does what torch.save never does: {', '.join(strange[:_LIMIT_NAMED])}")


def _globals(opcodes: list[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Every class or function that a pickle names; ("?", "?") for one whose name the pickle puts together itself."""
    recent: list[str] = []  # texts that were pushed last, with nothing but their memoising in between
    for name, arg in opcodes:
        if name in ("GLOBAL", "INST"):
            module, _, attribute = str(arg).partition(" ")
            yield module, attribute
        elif name == "STACK_GLOBAL":
            yield (recent[-2], recent[-1]) if len(recent) >= 2 else ("?", "?")
        elif name in ("EXT1", "EXT2", "EXT4"):
            yield "copyreg", f"extension {arg}"
        if name.endswith(("UNICODE", "UNICODE8", "STRING")):
            recent.append(str(arg))
        elif name not in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            recent = []


def _foreign(path: Path, foreign: list[tuple[str, str]]) -> IntegrityError:
    shown = ", ".join(".".join(pair) for pair in foreign[:_LIMIT_NAMED])
    more = f" and {len(foreign) - _LIMIT_NAMED} more" if len(foreign) > _LIMIT_NAMED else ""
    packages = {module.partition(".")[0] for module, _ in foreign}
    if any(module.startswith("torch.nn.modules") for module, _ in foreign) or packages & {"transformers", "trainer"}:
        return IntegrityError(
            "A whole model as a pickle is refused: loading it runs the code of every class it names.",
            where=str(path),
            why=f"it names {shown}{more}, as these packages were when it was saved; they are not there today",
            hint="take the weights alone: of MPS, model.safetensors of the hub's RE-N-Y/mpsv1",
        )
    return IntegrityError(
        "A pickle that holds more than tensors is refused: loading it runs whatever it names.",
        where=str(path),
        why=f"it names {shown}{more}",
        hint="do not load it; get the published file again and compare its sha256: craft-fast rewards fetch",
    )


# ---- tensors


def _load(path: Path, *, mapped: bool) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of many kinds: unpickling, zip, storages, sizes
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _damaged(path, f"PyTorch cannot read it: {why[:300]}") from error


def _plain(path: Path, loaded: Any, sizes: set[int] | None) -> dict[str, Tensor]:
    """The tensors of what was loaded, after a look at their kind and size."""
    import torch

    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise _odd(path, f"it holds a {type(loaded).__name__}, not tensors by name")
    size = path.stat().st_size
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise _odd(path, f"{str(name)[:100]!r} is a {type(value).__name__}, not a tensor")
        # A stride of 0 makes a tensor of any size out of one number.
        if value.numel() * value.element_size() > size:
            raise _odd(path, f"{name[:100]!r} says that it is larger than the file: {list(value.shape)}")
        # Mapped numbers are cut from the file without a look at how long their member is.
        if sizes is not None and value.untyped_storage().nbytes() not in sizes:
            raise _damaged(path, f"{name[:100]!r} says that it is longer or shorter than its numbers")
        tensors[name] = value.detach()
    return tensors


def _refuse_non_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    import torch

    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise IntegrityError(
                "A tensor holds NaN or infinity.",
                where=f"{path} ({name})",
                why="the file is damaged",
                hint="get the file again; it is not used",
            )


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "A file of weights is damaged.", where=str(path), why=why, hint="get it again: craft-fast rewards fetch"
    )


def _odd(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "A file of weights is not what PyTorch writes.",
        where=str(path),
        why=why,
        hint="get the published file: craft-fast rewards fetch",
    )
