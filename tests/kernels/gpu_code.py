"""Compile what a test module launches for GPUs that are not here, and say what came out. Run as a script.

    python tests/kernels/gpu_code.py tests/kernels/test_weighted_noise_loss.py

The module's ``launches()`` yields (name, function) pairs; the functions call the launchers of ``kernel.py`` on CPU
tensors. Nothing is launched: each kernel is compiled for the exact arguments (dtypes, alignment, constants) and
disassembled. One JSON object a line: ``name, kernel, arch, registers, spilled_bytes, shared_bytes, ops`` (how often
each SASS instruction occurs, with its modifiers), ``fused`` (fused multiply-adds that the compiler was handed in PTX;
SASS has more, inside of roots and divisions).
"""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 120)
INSTRUCTION_BYTES = 16


class Elsewhere:
    """The driver of a GPU that is not in this machine: enough of one to compile for it."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _: int) -> int:
        return 0


def tool(name: str, *args: str | Path) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([program, *args], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """What a kernel takes of a multiprocessor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = tool("cuobjdump", "-res-usage", path)
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    return {
        "registers": number["REG"],
        "spilled_bytes": number["STACK"] + number["LOCAL"],
        "shared_bytes": number["SHARED"],
    }


def instructions(cubin: bytes) -> bytes:
    """The code sections of a cubin, which is an ELF file of 64 bits."""
    start, size, count, names = (struct.unpack_from(form, cubin, at)[0] for form, at in
                                 (("<Q", 0x28), ("<H", 0x3A), ("<H", 0x3C), ("<H", 0x3E)))  # fmt: skip
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + number * size) for number in range(count)]
    text = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", text + name)
    )


def ops(cubins: list[bytes], arch: int) -> list[dict[str, int]]:
    """How often each instruction occurs, for every cubin.

    All go through one disassembler, end to end: it takes 0.2 s to start and a hundredth of that for a kernel.
    """
    codes = [instructions(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(codes))
        listing = tool("nvdisasm", "--binary", f"SM{arch}", "--no-dataflow", path)
    found = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)
    ends = list(itertools.accumulate(map(len, codes)))
    assert len(found) * INSTRUCTION_BYTES == ends[-1], "the disassembler did not read all"
    counts: list[Counter[str]] = [Counter() for _ in codes]
    for address, op in found:
        counts[bisect.bisect_right(ends, int(address, 16))][op] += 1
    return [dict(count) for count in counts]


def main(path: str) -> None:
    import triton
    from triton.runtime.jit import JITFunction

    spec = importlib.util.spec_from_file_location("launched", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    for arch in ARCHITECTURES:
        triton.runtime.driver.set_active(Elsewhere(arch))
        rows, cubins = [], []
        for name, function in module.launches():
            compiled.clear()
            function()
            for kernel, result in compiled:
                cubins.append(result.asm["cubin"])
                rows.append({"name": name, "kernel": kernel, "arch": arch, "fused": result.asm["ptx"].count("fma."),
                             **usage(cubins[-1])})  # fmt: skip
        for row, counted in zip(rows, ops(cubins, arch), strict=True):
            print(json.dumps({**row, "ops": counted}), flush=True)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    main(sys.argv[1])
