"""What lora_linear costs: bytes kept and operations issued, next to PEFT's layers, and instructions on absent GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from craft_kernels.lora_linear import lora_linear
from craft_kernels.nf4_dequantize import NF4Weight


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from craft_kernels.lora_linear import kernel

    def launch(rows: int, inner: int, columns: int, rank: int, dtype: torch.dtype, backward: bool = False) -> None:
        x, y = torch.zeros(rows, inner, dtype=dtype), torch.zeros(rows, columns, dtype=dtype)
        lora_a, lora_b = torch.zeros(rank, inner, dtype=dtype), torch.zeros(columns, rank, dtype=dtype)
        if backward:
            kernel.low_rank_update_(x, y, lora_b.t(), lora_a, down_scale=0.5)
        else:
            kernel.low_rank_update_(y, x, lora_a, lora_b.t(), up_scale=0.5)

    # Few, for each takes seconds: every tile height, forward and backward, every dtype.
    yield "sdxl", lambda: launch(4096, 640, 640, 16, torch.bfloat16)
    yield "sdxl", lambda: launch(1024, 1280, 1280, 64, torch.bfloat16, backward=True)
    yield "sdxl", lambda: launch(16384, 640, 640, 64, torch.float16)
    yield "float32", lambda: launch(4096, 640, 640, 64, torch.float32, backward=True)
    yield "odd", lambda: launch(77, 63, 123, 5, torch.bfloat16)


def nf4(out: int, inner: int, device: torch.device | str = "cpu", nested: bool = True) -> tuple[NF4Weight, Any]:
    """The weight of a bitsandbytes layer, and the layer."""
    import bitsandbytes as bnb

    torch.manual_seed(out + inner)
    layer = bnb.nn.Linear4bit(
        inner, out, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested, bias=True
    ).to(device)
    return NF4Weight.from_bitsandbytes(layer.weight, layer.weight.quant_state), layer.requires_grad_(False)


def peft_layer(base: Any, rank: int, device: torch.device) -> Any:
    """The layer that PEFT puts around ``base``: its adapter in float32, its B not zero."""
    import peft

    module = torch.nn.ModuleDict({"to_q": base})
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["to_q"])
    layer = peft.inject_adapter_in_model(config, module)["to_q"].to(device)
    layer.lora_A.float()
    layer.lora_B.float()
    torch.manual_seed(1)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def saved_bytes(run: Callable[[], Tensor], owned: list[Tensor]) -> int:
    """What autograd keeps for backward, each storage once, without those of ``owned``."""
    storages: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["Linear", "Linear4bit"])
def test_it_is_peft_with_less_kept(kind: str, mode: str, device: torch.device) -> None:
    """In bfloat16 PEFT keeps x in float32 for its adapter; under autocast a converted dense weight.

    Where it keeps neither, both keep the same: the result of x A^T, and what autocast had to convert.
    """
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    if kind == "Linear":
        base: Any = torch.nn.Linear(64, 96).to(device, dtype).requires_grad_(False)
        weight, frozen = base.weight, [base.weight]
    else:
        weight, base = nf4(96, 64, device)
        base.compute_dtype, base.bias.data = dtype, base.bias.data.to(dtype)
        frozen = [tensor for tensor in vars(weight).values() if isinstance(tensor, Tensor)]
    layer = peft_layer(base, 8, device)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 50, 64, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 50, 96, device=device)

    def ours() -> Tensor:
        return lora_linear(x, weight, lora_a, lora_b, scaling=layer.scaling["default"], bias=base.bias)

    results, kept = [], []
    for run in (ours, lambda: layer(x)):
        with torch.autocast(device.type, torch.bfloat16, enabled=mode == "autocast"):
            out = run()
            kept.append(saved_bytes(run, [x, lora_a, lora_b, base.bias, *frozen]))
        results.append([out.detach(), *torch.autograd.grad(out, (x, lora_a, lora_b), grad.to(out.dtype))])
    # Under autocast bitsandbytes turns its output back to the dtype of x; torch's linear layer and ours do not.
    skip = 1 if (kind, mode) == ("Linear4bit", "autocast") else 0
    assert [one.dtype for one in results[0][skip:]] == [one.dtype for one in results[1][skip:]]
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert float(error) < (1e-6 if mode == "float32" else 2**-7)
    tie = (kind, mode) in (("Linear", "float32"), ("Linear4bit", "float32"), ("Linear4bit", "autocast"))
    assert kept[0] == kept[1] if tie else kept[0] < kept[1], kept


class Operations(TorchDispatchMode):
    """Counts what reaches a device: a launch each, and no view or allocation (which the tests fill, hence fill_)."""

    FREE = ("view", "t", "detach", "_unsafe_view", "empty", "new_empty", "reshape", "transpose", "fill_")

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in self.FREE:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_it_issues_fewer_operations_than_peft(autocast: bool, device: torch.device) -> None:
    base = torch.nn.Linear(64, 96, bias=False).to(device, torch.bfloat16).requires_grad_(False)
    layer = peft_layer(base, 8, device)
    learnt = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in learnt]
    x = torch.randn(50, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def counted(run: Callable[[], Tensor], adapter: list[Tensor]) -> list[Counter[str]]:
        forward, backward = Operations(), Operations()
        with forward, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = run()
        grad = torch.ones_like(out)
        with backward:
            torch.autograd.grad(out, (x, *adapter), grad)
        return [forward.counted, backward.counted]

    ours = counted(lambda: lora_linear(x, base.weight, *learnt), learnt)
    assert ours == [Counter(mm=2, addmm_=1, _to_copy=2), Counter(addmm_=5, _to_copy=2)]
    assert counted(lambda: lora_linear(x, base.weight, *half), half) == [Counter(mm=2, addmm_=1), Counter(addmm_=5)]
    theirs = counted(lambda: layer(x), learnt)
    assert all(one.total() < other.total() for one, other in zip(ours, theirs, strict=True))


def test_compiled_for_gpus_it_multiplies_on_tensor_cores(gpu_code: Any) -> None:
    rows = gpu_code(__file__)
    assert {row["kernel"] for row in rows} == {"_low_rank_kernel"}
    for row in rows:
        ops = row["ops"]
        assert not row["spilled_bytes"], row
        if row["name"] != "float32":
            assert [op for op in ops if op.startswith(("HMMA", "HGMMA"))], row
        if row["name"] == "sdxl":
            # The rows come through asynchronous copies of 16 bytes, what is updated through loads and stores of 16.
            assert ops["LDGSTS.E.BYPASS.128"] > 0, row
            assert {op for op in ops if op.startswith("LDG.E")} == {"LDG.E.128"}, row
            assert ops["STG.E.128"] > 0, row
