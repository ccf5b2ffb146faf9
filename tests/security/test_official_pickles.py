"""Hostile files in place of official weights: refused by name before anything of them runs."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from craft_fast.errors import ExitCode, IntegrityError
from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.networks.build import read_network
from craft_fast.store.official import MAX_PICKLE_BYTES, read_official


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *values: Any) -> None:
        self.function, self.values = function, values

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.values


class Tagged(torch.Tensor):
    """A tensor subclass, whose rebuilding is code of its own."""


def zipped(path: Path, data: bytes, **members: bytes) -> None:
    """A PyTorch archive around a pickle of our own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in members.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)


def legacy(path: Path, data: bytes) -> None:
    """The older format around a pickle of our own: magic number, version, machine, object, keys."""
    front = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in front) + data + pickle.dumps([], protocol=2))


WRAPS: dict[str, Callable[[Path, bytes], None]] = {"zip": zipped, "legacy": legacy}


def refused(path: Path) -> IntegrityError:
    with pytest.raises(IntegrityError) as caught:
        read_official(path)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert str(path) in caught.value.where
    return caught.value


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_system_call_is_named_and_never_made(wrap: str, protocol: int, tmp_path: Path) -> None:
    import os

    path, canary = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "canary"
    data = pickle.dumps({"w": Call(os.system, f"touch {canary}")}, protocol=protocol)
    WRAPS[wrap](path, data)
    assert "posix.system" in refused(path).why
    assert not canary.exists()
    pickle.loads(data)
    assert canary.exists(), "the canary must sing when it is really opened, or this test proves nothing"


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("function", "values", "name"),
    [
        (eval, ("1",), "builtins.eval"),
        (exec, ("1",), "builtins.exec"),
        (getattr, (1, "real"), "builtins.getattr"),
        (subprocess.Popen, (["true"],), "subprocess.Popen"),
        (torch.load, ("x",), "torch.serialization.load"),
        (__import__, ("os",), "builtins.__import__"),
    ],
)
def test_functions_are_named(wrap: str, function: Any, values: tuple[Any, ...], name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    WRAPS[wrap](path, pickle.dumps({"state_dict": [Call(function, *values)]}, protocol=4))
    error = refused(path)
    assert name in error.why
    assert "sha256" in error.hint


# Written by hand: texts, then what makes a function of them.
BY_HAND = {
    "STACK_GLOBAL of memoised texts": (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x01x\x85R.",
        "?.?",
    ),
    "STACK_GLOBAL put together": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", "os.system"),
    "INST": (b"(S'x'\nios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nS'x'\no.", "os.system"),
    "a name with a blank": (b"\x80\x02ctorch._utils _rebuild_tensor_v2\nx\n)R.", "torch._utils"),
    "an extension": (b"\x80\x02\x82\x01.", "extension 1"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "a text as persistent id": (b"\x80\x02Pstorage\n.", "PERSID"),
    "LONG4": (b"\x80\x02\x8b\x01\x00\x00\x00\x05.", "LONG4"),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("case", BY_HAND)
def test_opcodes_that_torch_never_writes_are_refused(wrap: str, case: str, tmp_path: Path) -> None:
    data, word = BY_HAND[case]
    WRAPS[wrap](tmp_path / "m.pt", data)
    assert word in refused(tmp_path / "m.pt").why


def test_a_pickle_without_torchs_magic_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"w": [1.0]}, protocol=2))
    assert "torch.save" in refused(path).why
    path.write_bytes(pickle.dumps(Call(eval, "1"), protocol=2))
    assert "__builtin__.eval" in refused(path).why


@pytest.mark.parametrize("kind", [True, False])
def test_a_tensor_subclass_is_refused(kind: bool, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2).as_subclass(Tagged)}, tmp_path / "m.pt", _use_new_zipfile_serialization=kind)
    assert "_rebuild_from_type_v2" in refused(tmp_path / "m.pt").why


@pytest.mark.parametrize("kind", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # the older format keeps a class's source
def test_a_whole_model_such_as_mps_is_refused_with_its_way_out(
    kind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("trainer.models.clip_model")
    model = type("CLIPModel", (nn.Module,), {"__module__": module.__name__})
    module.CLIPModel = model  # type: ignore[attr-defined]
    for name in ("trainer", "trainer.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    whole = model()
    whole.proj = nn.Linear(2, 2)
    path = tmp_path / "MPS_overall_checkpoint.pth"
    torch.save(whole, path, _use_new_zipfile_serialization=kind)
    for name in ("trainer", "trainer.models", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    error = refused(path)
    assert "whole model" in error.what
    assert "trainer.models.clip_model.CLIPModel" in error.why
    assert "RE-N-Y/mpsv1" in error.hint
    with pytest.raises(IntegrityError, match="whole model"):  # and so where a reward is read
        read_network(Preprocessing(family="mps"), {"weights": path})


# ---- archives


def good(path: Path) -> zipfile.ZipFile:
    torch.save({"w": torch.ones(3)}, path)
    return zipfile.ZipFile(path)


def rewritten(path: Path, change: Callable[[str, bytes], list[tuple[str, bytes]]], kind: int) -> None:
    """The archive of a good file, its members changed."""
    with good(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members:
            for new_name, new_content in change(name, content):
                archive.writestr(new_name, new_content)


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile says so where a test writes one
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda name, data: [(name, data)] * 2, "one name"),
        (lambda name, data: [(name, data), (name.upper(), data)], "one name"),
        (lambda name, data: [(name, data), (f"other/{name}", data)], "not in one folder"),
        (lambda name, data: [(f"m/../{name}", data)], "not in one folder"),
        (lambda name, data: [(f"/{name}", data)], "not in one folder"),
        (lambda name, data: [] if name.endswith("data.pkl") else [(name, data)], "no data.pkl"),
        (lambda name, data: [(name, data), *([("m/code/x.py", b"")] if name.endswith(".pkl") else [])], "Script"),
    ],
)
def test_an_archive_with_odd_members_is_refused(change: Any, word: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    rewritten(path, change, zipfile.ZIP_STORED)
    assert word in refused(path).why


def test_a_compressed_archive_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    bomb = b"\x80\x02" + b"0" * (64 * 1024**2) + b"."
    rewritten(path, lambda name, data: [(name, bomb if name.endswith("data.pkl") else data)], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1024**2
    assert "compressed" in refused(path).why


def test_a_pickle_too_long_is_refused(tmp_path: Path) -> None:
    zipped(tmp_path / "m.pt", b"\x80\x02" + b"N0" * (MAX_PICKLE_BYTES // 2) + b".")
    assert "16 MiB" in refused(tmp_path / "m.pt").why


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with good(path) as archive:
        directory, infos = archive.start_dir, archive.infolist()
    data = bytearray(path.read_bytes())
    # The directory's second entry is made to begin where its first does; its own name stays.
    second = data.index(b"PK\x01\x02", directory + 4)
    struct.pack_into("<I", data, second + 42, infos[0].header_offset)
    path.write_bytes(data)
    refused(path)


def tensor_pickle(numel: int, stride: int, offset: int, size: int) -> bytes:
    """{"w": a tensor of ``size`` over a storage of ``numel`` floats}, as torch.save writes it."""
    number = lambda value: b"\x8a\x08" + value.to_bytes(8, "little", signed=True)  # noqa: E731
    text = lambda value: b"X" + len(value).to_bytes(4, "little") + value  # noqa: E731
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + number(numel) + b"tQ"
    shape = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}(" + text(b"w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + b"tRu."


def test_a_tensor_larger_than_its_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    zipped(path, tensor_pickle(4, 1, 0, 4), data__0=struct.pack("<4f", 1, 2, 3, 4))
    assert read_official(path)["w"].tolist() == [1, 2, 3, 4]  # the writer above is right
    for stride, offset, size in ((0, 0, 10**12), (1, 0, 5), (1, 2, 3), (10**15, 0, 2), (-1, 3, 4), (1, -1, 2)):
        zipped(path, tensor_pickle(4, stride, offset, size), data__0=struct.pack("<4f", 1, 2, 3, 4))
        refused(path)
    for claimed in (3, 5, 10**12):  # bytes of other members would be taken for numbers
        zipped(path, tensor_pickle(claimed, 1, 0, 3), data__0=struct.pack("<4f", 1, 2, 3, 4))
        assert "longer or shorter" in refused(path).why


def test_a_persistent_id_that_is_no_storage_is_refused(tmp_path: Path) -> None:
    zipped(tmp_path / "m.pt", b"\x80\x02}(X\x01\x00\x00\x00wX\x03\x00\x00\x00foo\x85Qu.")
    refused(tmp_path / "m.pt")


def test_nothing_is_executed_by_looking(tmp_path: Path) -> None:
    """Not even an import of what the pickle names."""
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')", encoding="utf-8")
    buffer = io.BytesIO()
    buffer.write(b"\x80\x02cevil_module\nf\n)R.")
    zipped(tmp_path / "m.pt", buffer.getvalue())
    sys.path.insert(0, str(tmp_path))
    try:
        assert "evil_module.f" in refused(tmp_path / "m.pt").why
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "canary").exists()
