"""One block of each shape of a model, timed in the form that a run gives it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craft_fast.errors import ConfigError
from craft_fast.plan.stages import Costs
from craft_fast.probe.clock import Clock
from craft_fast.qlora.adapt import prepare_unet
from craft_fast.qlora.nf4 import quantize_nf4
from craft_fast.qlora.optim import make_optimizer
from craft_fast.sdxl import costs
from craft_fast.sdxl.costs_ledger import Ledger
from craft_fast.sdxl.costs_setup import Setup
from craft_fast.sdxl.costs_unet import UnetWalk, Unit
from craft_fast.sdxl.graph import Replay


class _Holder(nn.Module):
    """Blocks that ``prepare_unet`` takes for a UNet."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        """As diffusers' UNet does it."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


@dataclass
class _Shape:
    """Blocks of one shape: how many there are, how many recompute, and the operations of one."""

    unit: Unit
    count: int = 0
    redone: int = 0
    flops: float = 0.0
    back_flops: float = 0.0

    @property
    def work(self) -> float:
        """Operations of all of them in a training step."""
        return self.count * (self.flops + self.back_flops) + self.redone * self.flops


def _key(unit: Unit) -> str:
    """Of the block's weights: the same ones serve every size of image."""
    sizes = {name: value for name, value in unit.sizes.items() if name not in ("rows", "pixels")}
    return "_".join([unit.kind, *(f"{name}{value}" for name, value in sorted(sizes.items()))])


def _shapes(planned: Costs, setup: Setup, kept: Sequence[str]) -> tuple[dict[str, _Shape], float]:
    """Shapes, those with most work first, and the operations of forward that are in no block."""
    walk = UnetWalk(planned.shape.unet, setup, Ledger())
    walk.run()
    found: dict[str, _Shape] = {}
    inside = 0.0
    for unit in walk.units:
        # Blocks before the first adapter go without backward: another shape.
        rows = unit.sizes.get("rows", unit.sizes.get("pixels", 0))
        shape = found.setdefault(f"{_key(unit)}_{rows}_{unit.needs_grad}", _Shape(unit))
        shape.count += 1
        shape.redone += unit.name not in kept and (unit.needs_grad or unit.kind == "transformer")
        if shape.count == 1:
            alone, x = walk.alone(unit)
            out = [unit.run(alone, x)]
            shape.flops = alone.ledger.flops
            if out[0].node is not None:
                alone.ledger.backward(out.pop(), unit.input_bytes)
            shape.back_flops = alone.ledger.flops - shape.flops
        inside += shape.flops
    return dict(sorted(found.items(), key=lambda item: -item[1].work)), max(0.0, walk.ledger.flops - inside)


class Blocks:
    """One block of each shape; first as generation has it, then as training has it."""

    def __init__(self, planned: Costs, clock: Clock) -> None:
        self.planned, self.clock = planned, clock
        options = planned.training_options()
        batch = options.pop("micro_batch")
        for name in ("grad_accum_steps", "gpu"):
            options.pop(name)
        self.setup = costs.unet_setup(batch=batch, workspaces=False, **options)
        self.shapes, self.rest = _shapes(planned, self.setup, planned.kept)
        blocks = {}
        for shape in self.shapes.values():
            if _key(shape.unit) not in blocks:
                blocks[_key(shape.unit)] = _random_block(planned, shape.unit)
        self.holder = _Holder(blocks)
        self.measured = 0

    def denoise(self, batch: int, seconds: float) -> tuple[float, float]:
        """Seconds of one denoising step, and the operations a second that it reaches."""
        setup = costs.inference_setup(self.setup, batch)
        shapes, rest = _shapes(self.planned, setup, ())
        own = self.holder.eval().requires_grad_(False)
        if self.planned.draws_in_nf4:
            self.holder = copy.deepcopy(own)
            quantize_nf4(self.holder, compute_dtype=self.planned.dtype, convs=True, own_layers=False)
        took, done = self._over(
            {name: shape.count * shape.flops for name, shape in shapes.items()},
            seconds,
            lambda name, slice_s: shapes[name].count * self._time(shapes[name].unit, setup, [], slice_s, back=False),
        )
        self.holder = own
        return took + rest / done, done

    def train(self, seconds: float) -> tuple[float, float]:
        """Seconds of a micro-batch, and of the optimizer's step."""
        planned, train = self.planned, self.planned.settings.train
        try:
            parameters = prepare_unet(
                self.holder, method=planned.choices.method, dtype=planned.dtype, rank=train.rank,
                lora_alpha=train.lora_alpha, target_modules=train.target_modules, seed=0, nf4_convs=train.nf4_convs,
                fused_lora=planned.choices.lora == "fused", lean=planned.choices.lean, device=planned.device,
            )  # fmt: skip
        except ConfigError:  # adapters outside of blocks alone
            parameters = {}
        shapes = {name: shape for name, shape in self.shapes.items()}

        def one(name: str, slice_s: float) -> float:
            shape = shapes[name]
            block = self.holder.blocks[_key(shape.unit)]
            own = [p for p in block.parameters() if p.requires_grad]
            back = bool(own) or shape.unit.needs_grad
            both = self._time(shape.unit, self.setup, own, slice_s * (0.7 if shape.redone else 1.0), back=back)
            again = self._time(shape.unit, self.setup, [], slice_s * 0.3, back=False) if shape.redone else 0.0
            return shape.count * both + shape.redone * again

        took, rate = self._over({name: shape.work for name, shape in shapes.items()}, seconds, one)
        # Outside of blocks, backward is for the inputs alone, which is as much as forward.
        return took + 2 * self.rest / rate, self._update_s(parameters)

    def _over(
        self, work: Mapping[str, float], seconds: float, measure: Callable[[str, float], float]
    ) -> tuple[float, float]:
        """Measure shape after shape; what time does not suffice for goes by the rate of the others."""
        end = time.perf_counter() + seconds
        took = done = 0.0
        left = dict(work)
        for name in work:
            now = time.perf_counter()
            if done and now > end:
                break
            took += measure(name, max(0.01, (end - now) / len(left)))
            done += left.pop(name)
        self.measured = len(work) - len(left)
        rate = done / took
        return took + sum(left.values()) / rate, rate

    def _time(self, unit: Unit, setup: Setup, parameters: list[nn.Parameter], slice_s: float, *, back: bool) -> float:
        """Seconds of one block, forward alone or with backward, recorded where the run would be."""
        block: Any = self.holder.blocks[_key(unit)]
        inputs = _inputs(self.planned, unit, setup)
        transformer = unit.kind == "transformer"

        def call(x: Tensor, other: Tensor) -> Tensor:
            out: Tensor = block(x, encoder_hidden_states=other) if transformer else block(x, other)
            return out

        def run(x: Tensor, other: Tensor) -> Tensor:
            if not back:
                with torch.no_grad():
                    return call(x, other)
            with torch.autocast(self.planned.device.type, self.planned.dtype, enabled=self.planned.choices.autocast):
                leaf = x.detach().requires_grad_(unit.needs_grad)
                out = call(leaf, other)
            torch.autograd.grad(out, [*([leaf] if unit.needs_grad else []), *parameters], torch.ones_like(out))
            return out.detach()

        replay = Replay(run, record=self.planned.choices.graph)
        try:
            return self.clock.time(lambda: replay(**inputs), slice_s=slice_s, warmup=4 if replay.record else 1)
        finally:
            replay.release()

    def _update_s(self, parameters: Mapping[str, nn.Parameter]) -> float:
        """The optimizer's step over these parameters, scaled to all: by launches where it is one a tensor."""
        if not parameters or self.planned.choices.method == "full":
            return 0.0  # of a full training it is a part of backward; by bytes it is small beside it
        kind, train = self.planned.choices.optimizer, self.planned.settings.train
        optimizer = make_optimizer(parameters, kind=kind, lr=1e-4, weight_decay=0.0, max_grad_norm=1.0)
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        took = self.clock.time(lambda: optimizer.step(1e-4), slice_s=0.05)
        tensors = 2 * len(costs.adapted_layers(self.planned.shape.unet, train.target_modules))
        elements = costs.lora_parameters(self.planned.shape.unet, rank=train.rank, target_modules=train.target_modules)
        by_tensor = tensors / len(parameters)
        return took * (by_tensor if kind == "bitsandbytes" else elements / sum(p.numel() for p in parameters.values()))


def _random_block(planned: Costs, unit: Unit) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    config, sizes = planned.shape.unet, unit.sizes
    with torch.device("meta"):
        if unit.kind == "transformer":
            d, heads = sizes["d"], sizes["heads"]
            block: Any = BasicTransformerBlock(d, heads, d // heads, cross_attention_dim=sizes["context"])
        else:
            groups = int(config.get("norm_num_groups") or 32)
            time_width = int(config["block_out_channels"][0]) * 4
            block = ResnetBlock2D(
                in_channels=sizes["fan_in"], out_channels=sizes["fan_out"], temb_channels=time_width, groups=groups
            )
    block = block.to(planned.dtype).to_empty(device=planned.device).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.uniform_(-0.02, 0.02)
    return block  # type: ignore[no-any-return]


def _inputs(planned: Costs, unit: Unit, setup: Setup) -> dict[str, Tensor]:
    """``x`` and, of a transformer block, the text; of a resnet, the time embedding."""
    made: dict[str, Any] = {"device": planned.device, "dtype": planned.dtype}
    batch, sizes = setup.batch, unit.sizes
    if unit.kind == "transformer":
        rows = sizes["rows"] // batch
        x = torch.randn(batch, rows, sizes["d"], **made)
        return {"x": x, "other": torch.randn(batch, setup.tokens, sizes["context"], **made)}
    height = next(h for h, w in _levels(setup) if h * w == sizes["pixels"] // batch)
    x = torch.randn(batch, sizes["fan_in"], height, sizes["pixels"] // batch // height, **made)
    return {"x": x, "other": torch.randn(batch, int(planned.shape.unet["block_out_channels"][0]) * 4, **made)}


def _levels(setup: Setup) -> Iterator[tuple[int, int]]:
    height, width = setup.height, setup.width
    while True:
        yield height, width
        height, width = (height + 1) // 2, (width + 1) // 2
