"""SDXL's UNet as a list of layers and as a walk through them on a ``Ledger``; follows diffusers' modules op by op.

Shapes: B images, h x w latent pixels of a level, d channels, rows = B h w; sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from craft_fast.sdxl.costs_ledger import Ledger, Shadow
from craft_fast.sdxl.costs_setup import Kind, Layer, Setup

_FLOAT32 = 4


def _listed(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


@dataclass(frozen=True)
class Unit:
    """A unit as it was met.

    Attributes:
        name: in the UNet.
        kind: ``resnet`` or ``transformer``.
        run: does it again, on any walk.
        input_bytes: of its input.
        needs_grad: whether backward goes through its input.
        sizes: that decide its shape, by name.
    """

    name: str
    kind: Literal["resnet", "transformer"]
    run: Callable[[UnetWalk, Shadow], Shadow]
    input_bytes: int
    needs_grad: bool
    sizes: Mapping[str, int]


@dataclass
class UnetWalk:
    """Goes through the UNet once; layers are noted on the way.

    Attributes:
        config: the UNet's configuration.
        setup: how it is run.
        ledger: keeps the books.
        layers: by name, in the order of their use.
        recomputed: units that are computed again in backward.
        units: in the order in which they run.
    """

    config: Mapping[str, Any]
    setup: Setup
    ledger: Ledger
    recomputed: Collection[str] = ()
    layers: dict[str, Layer] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)

    def alone(self, unit: Unit) -> tuple[UnetWalk, Shadow]:
        """A walk with books of its own for one unit, and the unit's input."""
        ledger = Ledger()
        walk = UnetWalk(self.config, self.setup, ledger, self.recomputed)
        walk._text = ledger.take(0)
        return walk, ledger.tensor(unit.input_bytes, needs_grad=unit.needs_grad)

    # ---- layers

    def _lora(self, name: str) -> bool:
        return self.setup.train == "lora" and any(name == t or name.endswith("." + t) for t in self.setup.targets)

    def _layer(self, name: str, kind: Kind, fan_in: int, fan_out: int, bias: bool = True) -> Layer:
        return self.layers.setdefault(name, Layer(name, kind, fan_in, fan_out, bias))

    def linear(self, name: str, x: Shadow, rows: int, fan_in: int, fan_out: int, *, bias: bool = True) -> Shadow:
        """``x W^T + b``, with an adapter where the name asks for one."""
        layer = self._layer(name, "linear", fan_in, fan_out, bias)
        setup = self.setup
        size, flops = rows * fan_out * setup.element, 2.0 * rows * layer.weight
        scratch = layer.weight * setup.element if setup.nf4 else 0
        if self._lora(name):
            adapted = self._fused if setup.adapter == "fused" else self._peft
            return adapted(x, layer, rows, size, flops, scratch)
        if setup.train == "full":
            return self._trained(x, layer, size, flops)
        return self.ledger.op([x], size, grads=["new"], flops=flops, scratch=scratch)

    def _trained(self, x: Shadow, layer: Layer, size: int, flops: float) -> Shadow:
        """A layer whose own weight gets a gradient, which is used and freed within backward."""
        back = layer.parameters * self.setup.element
        kept = [] if layer.kind == "norm" else [x]
        return self.ledger.op([x], size, saved=kept, grads=["new"], flops=flops, trained=True, back_scratch=back)

    def _fused(self, x: Shadow, layer: Layer, rows: int, size: int, flops: float, scratch: int) -> Shadow:
        """``craft_kernels.lora_linear``: keeps x, x A^T, and the adapter in the dtype of the computation."""
        rank, element = self.setup.rank, self.setup.element
        adapter = rank * (layer.fan_in + layer.fan_out)
        kept: list[Shadow | int] = [x, rows * rank * element]
        if element != _FLOAT32:
            kept.append(adapter * element)
        extra = 2.0 * rows * adapter
        back = 2 * extra + (flops if x.node is not None else 0.0)
        return self.ledger.op(
            [x], size, saved=kept, grads=["new"], flops=flops + extra, scratch=scratch, trained=True, back_flops=back,
            back_scratch=scratch if x.node is not None else 0, leaves=self._leaves(adapter),
        )  # fmt: skip

    def _peft(self, x: Shadow, layer: Layer, rows: int, size: int, flops: float, scratch: int) -> Shadow:
        """PEFT's layer: base, A, B, scale, sum, each an op of its own; x is cast to the adapter's dtype."""
        setup, op = self.setup, self.ledger.op
        inner = setup.element if setup.autocast else _FLOAT32
        wide = rows * layer.fan_out * inner
        base = op([x], size, grads=["new"], flops=flops, scratch=scratch)
        read = x
        if setup.element != _FLOAT32:
            read = op([x], rows * layer.fan_in * inner, grads=["new"], packs=False)
        thin = op(
            [read], rows * setup.rank * inner, saved=[read], grads=["new"], trained=True,
            flops=2.0 * rows * setup.rank * layer.fan_in, leaves=self._leaves(setup.rank * layer.fan_in),
        )  # fmt: skip
        del read
        update = op(
            [thin], wide, saved=[thin], grads=["new"], trained=True, flops=2.0 * rows * setup.rank * layer.fan_out,
            leaves=self._leaves(setup.rank * layer.fan_out),
        )  # fmt: skip
        del thin
        update = op([update], wide, grads=["new"], packs=False)
        return op([base, update], size, grads=["same", "same"], packs=False)

    def _leaves(self, elements: int) -> int:
        return 0 if self.setup.flat_grads else elements * _FLOAT32

    def conv(
        self, name: str, x: Shadow, pixels: int, fan_in: int, fan_out: int, *, side: int = 3, stride: int = 1
    ) -> Shadow:
        """A convolution; ``pixels`` of its result, over the batch."""
        layer = self._layer(name, "conv", fan_in * side**2, fan_out)
        setup = self.setup
        size, flops = pixels * fan_out * setup.element, 2.0 * pixels * layer.weight
        scratch = layer.weight * setup.element if setup.nf4_convs else 0
        if setup.workspaces:
            # cuDNN's tensor-core kernels want channels last: it lays input, weight and result out anew.
            scratch += x.size + size + layer.weight * setup.element
        back = scratch + (layer.parameters * setup.element if setup.train == "full" else 0)
        return self.ledger.op(
            [x], size, saved=[x] if setup.conv == "torch" else [], grads=["new"], flops=flops, scratch=scratch,
            back_scratch=back, trained=setup.train == "full",
        )  # fmt: skip

    def group_norm(self, name: str, x: Shadow, channels: int) -> Shadow:
        """Keeps its input; mean and deviation are too few to count."""
        return self._norm(name, x, channels, [x])

    def layer_norm(self, name: str, x: Shadow, rows: int, channels: int) -> Shadow:
        """Keeps its input, and mean and deviation of each row in float32."""
        return self._norm(name, x, channels, [x, rows * 2 * _FLOAT32])

    def _norm(self, name: str, x: Shadow, channels: int, kept: Sequence[Shadow | int]) -> Shadow:
        self._layer(name, "norm", channels, channels)
        return self.ledger.op([x], x.size, saved=kept, grads=["new"], trained=self.setup.train == "full")

    def norm_silu(self, name: str, x: Shadow, channels: int) -> Shadow:
        """GroupNorm and SiLU."""
        if self.setup.lean != "none":
            self._layer(name, "norm", channels, channels)
            # In PyTorch's form the norm's result and its gradient are made again.
            again = 2 * x.size if self.setup.lean == "torch" else 0
            inside = x.size if self.setup.lean == "torch" else 0
            return self.ledger.op(
                [x], x.size, saved=[x], grads=["new"], trained=self.setup.train == "full", scratch=2 * inside,
                back_scratch=again,
            )  # fmt: skip
        x = self.group_norm(name, x, channels)
        return self.ledger.op([x], x.size, saved=[x], grads=["new"])

    def add(self, x: Shadow, y: Shadow) -> Shadow:
        """``x + y``."""
        return self.ledger.op([x, y], x.size, grads=["same", "same"], packs=False)

    # ---- units

    def _unit(self, name: str, method: Callable[..., Shadow], x: Shadow, **sizes: int) -> Shadow:
        run = partial(method, name=name, **sizes)
        kind: Literal["resnet", "transformer"] = "resnet" if ".resnets." in name else "transformer"
        self.units.append(Unit(name, kind, run, x.size, x.node is not None, sizes))
        here = partial(run, self)
        return self.ledger.recomputed(here, x) if name in self.recomputed else here(x)

    def resnet(self, x: Shadow, *, name: str, fan_in: int, fan_out: int, pixels: int) -> Shadow:
        """ResnetBlock2D."""
        ledger, time = self.ledger, int(self.config["block_out_channels"][0]) * 4
        hidden = self.norm_silu(f"{name}.norm1", x, fan_in)
        hidden = self.conv(f"{name}.conv1", hidden, pixels, fan_in, fan_out)
        self._layer(f"{name}.time_emb_proj", "linear", time, fan_out)
        ledger.flops += 2.0 * self.setup.batch * time * fan_out
        hidden = ledger.op([hidden], hidden.size, grads=["same"], packs=False)
        hidden = self.norm_silu(f"{name}.norm2", hidden, fan_out)
        hidden = self.conv(f"{name}.conv2", hidden, pixels, fan_out, fan_out)
        if fan_in != fan_out:
            x = self.conv(f"{name}.conv_shortcut", x, pixels, fan_in, fan_out, side=1)
        total = self.add(x, hidden)
        if self.setup.lean != "none":
            return total
        # Divided by output_scale_factor, which is 1.
        return ledger.op([total], hidden.size, grads=["new"], packs=False)

    def _attention(self, name: str, x: Shadow, rows: int, d: int, heads: int, context: int | None) -> Shadow:
        setup = self.setup
        keys = rows if context is None else setup.batch * setup.tokens
        query = self.linear(f"{name}.to_q", x, rows, d, d, bias=False)
        source = x if context is None else Shadow(self._text, self._text.size, None)
        key, value = (
            self.linear(f"{name}.{part}", source, keys, context or d, d, bias=False) for part in ("to_k", "to_v")
        )
        del source
        flops = 4.0 * rows * (keys // setup.batch) * d
        # The flash kernel's backward adds up the gradient of q in float32.
        back = rows * d * _FLOAT32 if setup.workspaces else 0
        out = self.ledger.op(
            [query, key, value], query.size, saved=[query, key, value, rows * heads * _FLOAT32], save_output=True,
            grads=["new"] * 3, flops=flops, back_flops=2.5 * flops, back_scratch=back,
        )  # fmt: skip
        out = self.linear(f"{name}.to_out.0", out, rows, d, d)
        # Divided by rescale_output_factor, which is 1.
        return self.ledger.op([out], out.size, grads=["new"], packs=False)

    def block(self, x: Shadow, *, name: str, d: int, context: int, heads: int, rows: int) -> Shadow:
        """BasicTransformerBlock."""
        normed = self.layer_norm(f"{name}.norm1", x, rows, d)
        attended = self._attention(f"{name}.attn1", normed, rows, d, heads, None)
        x = self.add(attended, x)
        normed = self.layer_norm(f"{name}.norm2", x, rows, d)
        attended = self._attention(f"{name}.attn2", normed, rows, d, heads, context)
        x = self.add(attended, x)  # diffusers' variable holds on to `attended` until the block is through
        normed = self.layer_norm(f"{name}.norm3", x, rows, d)
        hidden = self.linear(f"{name}.ff.net.0.proj", normed, rows, d, 8 * d)
        inner = rows * 4 * d * self.setup.element
        hidden = self._geglu(hidden, inner)
        hidden = self.linear(f"{name}.ff.net.2", hidden, rows, 4 * d, d)
        x = self.add(hidden, x)
        del attended, normed
        return x

    def _geglu(self, hidden: Shadow, inner: int) -> Shadow:
        """``h * gelu(gate)``, both halves of ``hidden``, with a result of ``inner`` bytes."""
        lean = self.setup.lean
        if lean == "none":
            # GELU's result is kept for backward, or lives until the product is there.
            return self.ledger.op(
                [hidden], inner, saved=[hidden, inner], grads=["new"], scratch=2 * inner, back_scratch=0
            )  # fmt: skip
        scratch, back = (2 * inner, hidden.size + 2 * inner) if lean == "torch" else (0, 0)
        return self.ledger.op([hidden], inner, saved=[hidden], grads=["new"], scratch=scratch, back_scratch=back)

    # ---- the network

    def _transformer(self, name: str, x: Shadow, d: int, depth: int, heads: int, context: int, pixels: int) -> Shadow:
        residual = x
        by_linear = bool(self.config.get("use_linear_projection"))
        x = self.group_norm(f"{name}.norm", x, d)
        if by_linear:
            x = self.linear(f"{name}.proj_in", x, pixels, d, d)
        else:
            x = self.conv(f"{name}.proj_in", x, pixels, d, d, side=1)
        for index in range(depth):
            unit = f"{name}.transformer_blocks.{index}"
            x = self._unit(unit, UnetWalk.block, x, d=d, context=context, heads=heads, rows=pixels)
        if by_linear:
            x = self.linear(f"{name}.proj_out", x, pixels, d, d)
            x = self.ledger.op([x], x.size, grads=["same"], packs=False)
        else:
            x = self.ledger.op([x], x.size, grads=["same"], packs=False)
            x = self.conv(f"{name}.proj_out", x, pixels, d, d, side=1)
        return self.add(x, residual)

    def run(self, latents: Shadow | None = None) -> Shadow:
        """Forward from the latents to the prediction."""
        config, setup = self.config, self.setup
        channels = [int(c) for c in config["block_out_channels"]]
        levels = len(channels)
        depths = _listed(config.get("transformer_layers_per_block", 1), levels)
        heads = _listed(config["attention_head_dim"], levels)
        contexts = _listed(config["cross_attention_dim"], levels)
        counts = _listed(config.get("layers_per_block", 2), levels)
        inputs, outputs = int(config.get("in_channels", 4)), int(config.get("out_channels", 4))
        self._text = self.ledger.take(setup.batch * setup.tokens * int(contexts[-1]) * setup.element)
        self._embedding(channels[0])
        height, width = setup.height, setup.width

        def pixels() -> int:
            return setup.batch * height * width

        latents = latents or self.ledger.tensor(pixels() * inputs * setup.element)
        x = self.conv("conv_in", latents, pixels(), inputs, channels[0])
        skips: list[tuple[Shadow, int]] = [(x, channels[0])]
        width_in = channels[0]
        for level, kind in enumerate(config["down_block_types"]):
            name, width_out = f"down_blocks.{level}", channels[level]
            for index in range(counts[level]):
                x = self._resnet(f"{name}.resnets.{index}", x, width_in, width_out, pixels())
                if kind.startswith("CrossAttn"):
                    x = self._transformer(
                        f"{name}.attentions.{index}", x, width_out, depths[level], heads[level], contexts[level],
                        pixels(),
                    )  # fmt: skip
                width_in = width_out
                skips.append((x, width_out))
            if level < levels - 1:
                height, width = (height + 1) // 2, (width + 1) // 2
                x = self.conv(f"{name}.downsamplers.0.conv", x, pixels(), width_out, width_out)
                skips.append((x, width_out))
        x = self._mid(x, width_in, depths[-1], heads[-1], contexts[-1], pixels())
        sizes = self._sizes()
        for level, kind in enumerate(config["up_block_types"]):
            source = levels - 1 - level
            name, width_out = f"up_blocks.{level}", channels[source]
            # The caller's variables outlive the block: its input, and all of its skips.
            count = counts[source] + 1
            entry, held = x, skips[-count:]
            del skips[-count:]
            for index in range(count):
                skip, skip_width = held[count - 1 - index]
                x = self.ledger.op([x, skip], x.size + skip.size, grads=["same", "same"], packs=False)
                del skip
                x = self._resnet(f"{name}.resnets.{index}", x, width_in + skip_width, width_out, pixels())
                if kind.startswith("CrossAttn"):
                    x = self._transformer(
                        f"{name}.attentions.{index}", x, width_out, depths[source], heads[source], contexts[source],
                        pixels(),
                    )  # fmt: skip
                width_in = width_out
            if level < levels - 1:
                height, width = sizes[source - 1]
                x = self.ledger.op([x], pixels() * width_out * setup.element, grads=["new"], packs=False)
                x = self.conv(f"{name}.upsamplers.0.conv", x, pixels(), width_out, width_out)
        del entry
        x = self.norm_silu("conv_norm_out", x, channels[0])
        return self.conv("conv_out", x, pixels(), channels[0], outputs)

    def _sizes(self) -> list[tuple[int, int]]:
        sizes = [(self.setup.height, self.setup.width)]
        for _ in self.config["block_out_channels"][1:]:
            height, width = sizes[-1]
            sizes.append(((height + 1) // 2, (width + 1) // 2))
        return sizes

    def _resnet(self, name: str, x: Shadow, fan_in: int, fan_out: int, pixels: int) -> Shadow:
        return self._unit(name, UnetWalk.resnet, x, fan_in=fan_in, fan_out=fan_out, pixels=pixels)

    def _mid(self, x: Shadow, d: int, depth: int, heads: int, context: int, pixels: int) -> Shadow:
        x = self._resnet("mid_block.resnets.0", x, d, d, pixels)
        if str(self.config.get("mid_block_type", "UNetMidBlock2DCrossAttn")).endswith("CrossAttn"):
            x = self._transformer("mid_block.attentions.0", x, d, depth, heads, context, pixels)
        return self._resnet("mid_block.resnets.1", x, d, d, pixels)

    def _embedding(self, first: int) -> None:
        """Time and size conditioning: one row an image, so only its weights and flops count."""
        time, batch = 4 * first, self.setup.batch
        sizes = self.config.get("projection_class_embeddings_input_dim")
        for name, fan_in in (("time_embedding", first), *((("add_embedding", sizes),) if sizes else ())):
            for part, inner in (("linear_1", int(fan_in)), ("linear_2", time)):
                layer = self._layer(f"{name}.{part}", "linear", inner, time)
                self.ledger.flops += 2.0 * batch * layer.weight
