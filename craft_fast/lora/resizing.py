"""A LoRA of a lower rank: the closest one there is, layer by layer, and how far it is from what it was.

The best rank-k approximation of ``scale * up @ down`` is its truncated SVD (Eckart and Young). It is had without the
[O, I] matrix: with up = Qu Ru and down^T = Qd Rd, the singular values are those of the small Ru Rd^T [r, r].

Shapes: r rank, O out, I in times kernel (a convolution is flattened: the rank is shared by all places of the kernel).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from craft_fast.errors import IntegrityError, UsageError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.reading import ALPHA_DTYPES
from craft_fast.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        rank_before: rank it had.
        rank_after: rank it has.
        norm: Frobenius norm of its delta before.
        error: Frobenius norm of (delta after - delta before) over ``norm``, rounding to the stored dtype included.
        kept: share of the norm that the kept singular values hold, 0 to 1.
    """

    rank_before: int
    rank_after: int
    norm: float
    error: float
    kept: float


@dataclass(frozen=True, slots=True)
class ResizeReport:
    """How far a resized LoRA is from what it was.

    Attributes:
        layers: by the adapter's layer names.
    """

    layers: Mapping[str, LayerReport]

    @property
    def error(self) -> float:
        """Relative error of all layers together: root of summed squared errors over root of summed squared norms."""
        lost = math.sqrt(math.fsum((one.error * one.norm) ** 2 for one in self.layers.values()))
        return lost / norm if (norm := self.norm) else 0.0

    @property
    def kept(self) -> float:
        """Share of the whole norm that the kept singular values hold."""
        held = math.sqrt(math.fsum((one.kept * one.norm) ** 2 for one in self.layers.values()))
        return held / norm if (norm := self.norm) else 1.0

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.sqrt(math.fsum(one.norm**2 for one in self.layers.values()))

    @property
    def changed(self) -> int:
        """Number of layers that are not bit for bit what they were."""
        return sum(one.rank_after != one.rank_before for one in self.layers.values())

    def worst(self, n: int = 5) -> list[tuple[str, LayerReport]]:
        """The ``n`` layers of the largest relative error, worst first; those of no error are left out."""
        found = sorted(self.layers.items(), key=lambda item: (-item[1].error, item[0]))
        return [item for item in found[:n] if item[1].error > 0]


def resize_adapter(
    adapter: Adapter,
    rank: int | None,
    *,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, ResizeReport]:
    """The closest adapter of at most ``rank``; all algebra in float64.

    A layer whose rank is small enough is left as it is, to the bit. Of the others the scale ``alpha / rank`` stays, so
    alpha shrinks with the rank: trainers and their users read a LoRA's strength off that ratio, and the factors keep
    the size they were trained at. Singular values go in equal parts into both factors, which in float16 keeps small
    ones from being lost to rounding in one of them.

    Args:
        adapter: any.
        rank: of every layer at most, from 1; None: ``max_error`` alone decides.
        max_error: of each layer the lowest rank whose truncation error, relative to the layer's norm, is at most
            this, 0 to 1; never above ``rank``.
        dtype: of the changed layers; None: as each is stored.
        progress: counts layers.

    Returns:
        The adapter, its metadata as before, and how far it is from what it was.

    Raises:
        UsageError: neither ``rank`` nor ``max_error``, or out of range; IntegrityError: NaN or infinity.
    """
    check_targets(rank, max_error)
    layers, report = {}, {}
    with (progress or Silent()).task("resize", len(adapter.layers), "layers") as task:
        for name, layer in adapter.layers.items():
            layers[name], report[name] = resize_layer(name, layer, rank, max_error, dtype)
            task.advance()
    same = [name for name, layer in layers.items() if layer is adapter.layers[name]]
    return Adapter(layers, _metadata(adapter.metadata, same)), ResizeReport(report)


def _metadata(metadata: Mapping[str, str], same: Collection[str]) -> dict[str, str]:
    """The header, with dtypes of alphas for none but the layers that are as they were."""
    dtypes = json.loads(metadata.get(ALPHA_DTYPES, "{}"))
    kept = {name: dtype for name, dtype in dtypes.items() if name in same}
    rest = {key: value for key, value in metadata.items() if key != ALPHA_DTYPES}
    return {**rest, **({ALPHA_DTYPES: json.dumps(kept, sort_keys=True)} if kept else {})}


def check_targets(rank: int | None, max_error: float | None) -> None:
    """Refuse a rank and an error to stay under that cannot be; see ``resize_adapter``.

    Raises:
        UsageError: neither is given, or out of range.
    """
    if rank is None and max_error is None:
        raise UsageError("Neither a rank nor an error to stay under is given", hint="--rank 8 or --max-error 0.01")
    if rank is not None and rank < 1:
        raise UsageError("A rank is at least 1", where=f"--rank {rank}")
    if max_error is not None and not 0 <= max_error < 1:
        raise UsageError("An error to stay under is from 0 to below 1", where=f"--max-error {max_error}")


def resize_layer(
    name: str, layer: LoraLayer, rank: int | None, max_error: float | None, dtype: torch.dtype | None
) -> tuple[LoraLayer, LayerReport]:
    """One layer of ``resize_adapter``; the very same object where nothing is cut."""
    factors = Factors.of(name, layer)
    norm = float(torch.linalg.vector_norm(factors.values))
    after = min(layer.rank, rank or layer.rank)
    if max_error is not None:
        after = min(after, factors.rank_within(max_error))
    if after < layer.rank:
        after = min(after, len(factors.values))  # a layer may have fewer inputs or outputs than its rank
    else:
        return layer, LayerReport(layer.rank, layer.rank, norm, 0.0, 1.0)
    resized = factors.truncated(name, layer, after, dtype)
    error = distance(layer, resized) / norm if norm else 0.0
    kept = float(torch.linalg.vector_norm(factors.values[:after])) / norm if norm else 1.0
    return resized, LayerReport(layer.rank, after, norm, error, kept)


@dataclass(frozen=True, slots=True)
class Factors:
    """The SVD of a layer's delta, ``out @ diag(values) @ into``, float64, n = min(r, O, I).

    Attributes:
        out: [O, n], orthonormal columns.
        values: [n], from the largest down.
        into: [n, I], orthonormal rows.
    """

    out: Tensor
    values: Tensor
    into: Tensor

    @classmethod
    def of(cls, name: str, layer: LoraLayer) -> Factors:
        """Decompose a layer in the space of its rank.

        Raises:
            IntegrityError: it holds NaN or infinity.
        """
        up, down = matrices(layer)
        if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise IntegrityError("A LoRA's weight is NaN or infinite", where=name, hint="get the file again")
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down.T)
        u, values, vh = torch.linalg.svd(r_up @ r_down.T * layer.scale, full_matrices=False)
        return cls(q_up @ u, values, vh @ q_down.T)

    def rank_within(self, max_error: float) -> int:
        """The lowest rank, from 1, whose truncation error is at most ``max_error`` of the norm."""
        # tails[k]: what is lost when k values are kept; the last is 0 for all of them.
        squares = self.values.square().flip(0).cumsum(0).flip(0)
        tails = torch.cat([squares, squares.new_zeros(1)]).sqrt()
        fitting = (tails <= max_error * tails[0]).nonzero()
        return max(1, int(fitting[0]))

    def truncated(self, name: str, layer: LoraLayer, rank: int, dtype: torch.dtype | None) -> LoraLayer:
        """The first ``rank`` values as a layer of ``layer``'s shapes and scale."""
        # Files hold alpha in the dtype of the weights: the scale is what that leaves of it. A scale of 0 or below has
        # no square root to share; then the new layer's scale is 1.
        dtypes = dtype or layer.down.dtype, dtype or layer.up.dtype
        alpha = fitting_alpha((layer.scale if layer.scale > 0 else 1.0) * rank, rank, dtypes[0])
        root = (self.values[:rank] * (rank / alpha)).sqrt()
        up, down = self.out[:, :rank] * root, root[:, None] * self.into[:rank]
        return LoraLayer(
            stored(name, down, dtypes[0]).reshape(rank, *layer.down.shape[1:]),
            stored(name, up, dtypes[1]).reshape(layer.up.shape[0], rank, *layer.up.shape[2:]),
            alpha,
        )


def in_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The same adapter stored in ``dtype``: layers that are so already keep their bits, others are rounded once.

    Raises:
        IntegrityError: a value is too large for it.
    """
    layers = {name: _in_dtype(name, layer, dtype) for name, layer in adapter.layers.items()}
    same = [name for name, layer in layers.items() if layer is adapter.layers[name]]
    return Adapter(layers, _metadata(adapter.metadata, same))


def _in_dtype(name: str, layer: LoraLayer, dtype: torch.dtype) -> LoraLayer:
    if layer.up.dtype == layer.down.dtype == dtype:
        return layer
    up, alpha = layer.up, layer.alpha
    if alpha is not None and alpha != float(torch.tensor(alpha, dtype=dtype)):
        alpha = fitting_alpha(alpha, layer.rank, dtype)
        up = up.double() * (layer.scale * layer.rank / alpha)
    return LoraLayer(stored(name, layer.down, dtype), stored(name, up, dtype), alpha)


def fitting_alpha(wanted: float, rank: int, dtype: torch.dtype) -> float:
    """The alpha nearest to ``wanted`` that ``dtype`` holds, near ``rank`` where it holds nothing like it."""
    alpha = float(torch.tensor(wanted, dtype=dtype))
    return alpha if 0 < alpha < float("inf") else float(torch.tensor(float(rank), dtype=dtype))


def matrices(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A layer's factors as matrices: up [O, r], down [r, I], float64."""
    return layer.up.flatten(1).double(), layer.down.flatten(1).double()


def stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``, rounded once.

    Raises:
        IntegrityError: it is too large for it.
    """
    rounded = value.to(dtype).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise IntegrityError(
            "A LoRA's weight is too large for its number format",
            where=name,
            why=f"{float(value.abs().max()):.4g} in {str(dtype).removeprefix('torch.')}",
            hint="--dtype float32",
        )
    return rounded


def distance(a: LoraLayer, b: LoraLayer) -> float:
    """Frobenius norm of the difference of two layers' deltas, from [r_a + r_b]^2 products alone.

    ``|X Y|^2 = trace((X^T X)(Y Y^T))`` for X = [s_a up_a, -s_b up_b], Y = [down_a; down_b]. Exact to about 1e-8 of
    the deltas' norms (the root of float64's rounding), far below float16's 5e-4.
    """
    (up_a, down_a), (up_b, down_b) = matrices(a), matrices(b)
    out = torch.cat([up_a * a.scale, up_b * -b.scale], dim=1)
    into = torch.cat([down_a, down_b])
    return math.sqrt(max(0.0, float(((out.T @ out) * (into @ into.T)).sum())))
