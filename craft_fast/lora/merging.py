"""Several LoRAs as one: the weighted sum of what they add to the model.

``sum_n w_n s_n up_n @ down_n = [w_1 s_1 up_1, w_2 s_2 up_2, ...] @ [down_1; down_2; ...]``: ranks add up and nothing
is lost. Adding the factors themselves, ``(sum up) @ (sum down)``, would make cross terms that nobody trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from craft_fast.errors import IntegrityError, UsageError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.reading import ALPHA_DTYPES
from craft_fast.lora.resizing import ResizeReport, check_targets, fitting_alpha, resize_layer, stored
from craft_fast.progress import Progress, Silent

Weighted = Sequence[tuple[Adapter, float]]


def merge_adapters(
    adapters: Weighted, *, rank: int | None = None, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> Adapter:
    """One adapter whose delta is the weighted sum of the others' deltas.

    Without ``rank`` it is exact but for storage: every ``up`` is multiplied by weight and scale in float32 and rounded
    once (relative 2^-11 in float16, 2^-8 in bfloat16, 2^-24 in float32), ``down`` keeps its bits where its dtype is
    the output's. With ``rank`` the sum is cut to it by SVD in float64; see ``merge_reduced`` for the error of that.

    Args:
        adapters: with their weights, any sign; ranks may differ, and so may the layers they have. What is merged with
            weight 0 is left out.
        rank: of the result at most; None: the sum of the ranks.
        dtype: of the result; None: that of the first adapter.
        progress: counts layers when ``rank`` is given.

    Returns:
        The adapter; its alpha is its rank, so its scale is 1 (as far as the dtype holds the rank). Metadata are those
        of the first.

    Raises:
        UsageError: nothing to merge, or a weight that is no number; IntegrityError: two adapters have layers of the
            same name and other shapes, or values leave the dtype's range.
    """
    if rank is None:
        return _joined(adapters, dtype or _dtype(adapters))
    return merge_reduced(adapters, rank, dtype=dtype, progress=progress)[0]


def merge_reduced(
    adapters: Weighted,
    rank: int | None,
    *,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, ResizeReport]:
    """The sum cut to ``rank``, and how far that is from the whole sum; arguments and errors as ``resize_adapter``.

    A layer that is not cut is joined as ``merge_adapters`` joins it; its error in the report is 0.
    """
    dtype = dtype or _dtype(adapters)
    check_targets(rank, max_error)
    counted, names = _counted(adapters)
    layers, report = {}, {}
    with (progress or Silent()).task("merge", len(names), "layers") as task:
        for name in names:
            # Joined without rounding, so that what is stored is rounded once.
            whole = _join(name, _parts(name, counted), torch.float64)
            cut, report[name] = resize_layer(name, whole, rank, max_error, dtype)
            layers[name] = _join(name, _parts(name, counted), dtype) if cut is whole else cut
            task.advance()
    return Adapter(layers, _metadata(adapters)), ResizeReport(report)


def _metadata(adapters: Weighted) -> dict[str, str]:
    return {key: value for key, value in adapters[0][0].metadata.items() if key != ALPHA_DTYPES}


def _dtype(adapters: Weighted) -> torch.dtype:
    """Of the first layer of the first adapter."""
    for adapter, _ in adapters:
        for layer in adapter.layers.values():
            return layer.up.dtype
    return torch.float32


def _joined(adapters: Weighted, dtype: torch.dtype) -> Adapter:
    counted, names = _counted(adapters)
    layers = {name: _join(name, _parts(name, counted), dtype) for name in names}
    return Adapter(layers, _metadata(adapters))


Counted = Sequence[tuple[Mapping[str, LoraLayer], float]]


def _counted(adapters: Weighted) -> tuple[Counted, Sequence[str]]:
    """The layers that count with their weights, and the names of all of them, in the files' order."""
    if not adapters:
        raise UsageError("There is nothing to merge", hint="give at least one LoRA")
    for adapter, weight in adapters:
        if not -1e4 < weight < 1e4:  # also refuses NaN
            raise UsageError("A LoRA's weight is a plain number", where=str(weight), hint="such as 0.7 or -0.3")
        if not adapter.layers:
            raise IntegrityError("A LoRA without layers cannot be merged", hint="give another file")
    counted = [(adapter.layers, weight) for adapter, weight in adapters if weight != 0]
    if not counted:
        raise UsageError("All weights are 0: nothing would be left", hint="give one of them a weight")
    return counted, list(dict.fromkeys(name for layers, _ in counted for name in layers))


def _parts(name: str, counted: Counted) -> list[tuple[LoraLayer, float]]:
    return [(layers[name], weight) for layers, weight in counted if name in layers]


def _join(name: str, parts: Sequence[tuple[LoraLayer, float]], dtype: torch.dtype) -> LoraLayer:
    """Ranks in a row; the shapes are those of the first part."""
    first = parts[0][0]
    for layer, _ in parts[1:]:
        if layer_shape(layer) != layer_shape(first):
            raise IntegrityError(
                "These LoRAs are not for the same model",
                where=name,
                why=f"one is for a weight of {list(layer_shape(first))}, another for {list(layer_shape(layer))}",
                hint="merge LoRAs of one base model; craft-fast lora check FILE says what a file is for",
            )
    rank = sum(layer.rank for layer, _ in parts)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # In bfloat16 not every rank above 256 can be an alpha.
    alpha = fitting_alpha(float(rank), rank, dtype)
    ups = [layer.up.to(wide).flatten(1) * (weight * layer.scale * rank / alpha) for layer, weight in parts]
    downs = [stored(name, layer.down, dtype).flatten(1) for layer, _ in parts]
    up = stored(name, torch.cat(ups, dim=1), dtype).reshape(first.up.shape[0], rank, *first.up.shape[2:])
    return LoraLayer(torch.cat(downs).reshape(rank, *first.down.shape[1:]), up, alpha)


def layer_shape(layer: LoraLayer) -> tuple[int, ...]:
    """Shape of the weight that a layer is for; a 1x1 convolution counts as the matrix it is."""
    kernel = tuple(layer.down.shape[2:])
    return (layer.up.shape[0], layer.down.shape[1], *(() if kernel == (1, 1) else kernel))
