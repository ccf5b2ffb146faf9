"""The UNet's blocks with less kept for backward: the same sums, to the bit, from inputs that are kept anyway.

What diffusers' blocks keep and these do not: the inputs of frozen convolutions, what lies between group norm and SiLU,
gelu's result in the feed-forward. Each is worked out again in backward by an elementwise pass or two; no matrix product
is done twice. Weights, names and state dict stay as they are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_fast.qlora.frozen import compute_dtype, frozen_conv2d, is_channels_last
from craft_fast.quiet import import_bitsandbytes, quiet_third_party
from craft_kernels.geglu import geglu
from craft_kernels.group_norm_silu import group_norm_silu

quiet_third_party()
import_bitsandbytes()  # before diffusers, which would import it with its request to a hub

from diffusers.models.activations import GEGLU  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402

Form = Literal["torch", "triton"]


def lean_activations(unet: nn.Module, *, impl: Form = "torch") -> int:
    """Have the blocks of ``unet`` keep less for backward; call it after ``prepare_unet``.

    Under autocast and under a compiler, which both decide themselves what is kept, the blocks run as diffusers' do
    (frozen convolutions excepted).

    Args:
        unet: a diffusers UNet in any form; the classes of its modules change, and ``conv_act`` becomes a part of
            ``conv_norm_out``.
        impl: ``torch``: the very operations of diffusers, equal to the bit; ``triton``: ``craft_kernels.geglu`` and
            ``group_norm_silu``, one launch each, rounded once instead of twice.

    Returns:
        How many modules were changed.
    """
    changed = 0
    for module in list(unet.modules()):
        kind = _lean_kind(module)
        if kind is not None:
            module.__class__ = kind
            vars(module)["impl"] = impl
            changed += 1
    changed += _join_last_norm(unet, impl)
    return changed


def _lean_kind(module: Any) -> type[nn.Module] | None:
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return LeanConv2d
    if type(module) is GEGLU:
        return LeanGEGLU
    if type(module) is ResnetBlock2D and _is_plain(module):
        return LeanResnetBlock2D
    return None


def _is_plain(block: Any) -> bool:
    """Whether a resnet block is of the one kind that SDXL has, for which the forward below is written."""
    return (
        block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and block.time_emb_proj is not None
        and not block.skip_time_act
        and block.output_scale_factor == 1.0
        and block.dropout.p == 0.0
        and type(block.nonlinearity) is nn.SiLU
        and all(type(norm) is nn.GroupNorm and norm.affine for norm in (block.norm1, block.norm2))
    )


def _join_last_norm(unet: Any, impl: Form) -> int:
    norm, act = getattr(unet, "conv_norm_out", None), getattr(unet, "conv_act", None)
    if type(norm) is not nn.GroupNorm or type(act) is not nn.SiLU:
        return 0
    norm.__class__ = LeanGroupNormSiLU
    vars(norm)["impl"] = impl
    unet.conv_act = nn.Identity()
    return 1


class LeanConv2d(nn.Conv2d):
    """``nn.Conv2d`` that keeps no input while it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        frozen = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
        if not frozen or not torch.is_grad_enabled():
            return super().forward(x)
        assert not isinstance(self.padding, str)
        return frozen_conv2d(
            x, self.weight, self.bias,
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
        )  # fmt: skip


class LeanGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' ``GEGLU`` that keeps its projection's result alone."""

    impl: Form

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., D]."""
        x = self.proj(hidden_states)
        if self.impl == "triton":
            return geglu(x, impl="triton")
        if not _worth_it(x):
            return geglu(x, impl="torch")
        out: Tensor = _Geglu.apply(x)  # type: ignore[no-untyped-call]
        return out


class LeanGroupNormSiLU(nn.GroupNorm):
    """``nn.GroupNorm`` and SiLU, keeping the norm's input alone."""

    impl: Form

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return norm_silu(x, self, self.impl)


class LeanResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """diffusers' ``ResnetBlock2D`` in SDXL's form: keeps its input and the sum of convolution and time embedding."""

    impl: Form

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, H, W] and [B, E] -> [B, C', H, W]."""
        hidden = self.conv1(norm_silu(input_tensor, self.norm1, self.impl))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(norm_silu(hidden, self.norm2, self.impl))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        out: Tensor = shortcut + hidden
        return out


def norm_silu(x: Tensor, norm: nn.GroupNorm, impl: Form) -> Tensor:
    """``silu(norm(x))``, keeping ``x`` and two numbers a group for backward."""
    if impl == "triton":
        return group_norm_silu(
            x, norm.weight, norm.bias, num_groups=norm.num_groups, eps=norm.eps, impl="triton"
        )  # fmt: skip
    if not _worth_it(x) or x.dtype != norm.weight.dtype:
        return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    out: Tensor = _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # type: ignore[no-untyped-call]
    return out


def _worth_it(x: Tensor) -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and compute_dtype(x) == x.dtype


class _Geglu(torch.autograd.Function):
    """``x[..., :D] * gelu(x[..., D:])``, arXiv 2002.05202 section 2, by the operations of eager PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        hidden, gate = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_hidden, grad_gate = grad_x.chunk(2, dim=-1)
        torch.mul(grad_y, F.gelu(gate), out=grad_hidden)
        grad_gate.copy_(torch.ops.aten.gelu_backward(grad_y * hidden, gate))
        return grad_x


class _NormSilu(torch.autograd.Function):
    """Group norm (arXiv 1803.08494) and SiLU (arXiv 1702.03118) by the operations of eager PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        lying = _as_group_norm_reads(x, x)
        z, mean, rstd = torch.native_group_norm(lying, weight, bias, *_sizes(x), groups, eps)
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        lying = _as_group_norm_reads(x, x)
        z = torch.native_group_norm(lying, weight, bias, *_sizes(x), ctx.groups, ctx.eps)[0]
        grad_z = _as_group_norm_reads(torch.ops.aten.silu_backward(grad_y, z), x)
        del z
        grads = torch.ops.aten.native_group_norm_backward(
            grad_z, lying, mean, rstd, weight, *_sizes(x), ctx.groups, list(ctx.needs_input_grad[:3])
        )
        return (
            *(grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad, strict=False)),
            None,
            None,
        )


def _as_group_norm_reads(tensor: Tensor, x: Tensor) -> Tensor:
    """On a CPU in the layout of ``x``, elsewhere contiguous: what ``torch.group_norm`` does before its kernel."""
    nhwc = x.is_cpu and is_channels_last(x)
    return tensor.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
