"""What a whole SDXL with LoRAs in it is made of, tensor by tensor, from either layout to either.

Within a layout names and bytes stay; between them every weight has its place (``lora.original``). Nothing is read here
but headers: an ``Entry`` reads its tensor when it is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.original import Piece, last_block, piece_of, plain, vae_place
from craft_fast.lora.streams import FLOATS, Entry, Stored, aligned, read_table
from craft_fast.sdxl.single_file import part_names
from craft_fast.sdxl.source import FilePart, FolderPart, Part, Source
from craft_fast.sdxl.weights import expected_shapes, new_vae_names, require_same, weight_files

ADAPTED = ("unet", "text_encoder", "text_encoder_2")
Change = Callable[[Tensor], None]


class Deltas:
    """What LoRAs add to a model's weights, by part and plain weight name; strengths of 0 add nothing."""

    def __init__(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self._layers: dict[tuple[str, str], list[tuple[LoraLayer, float]]] = defaultdict(list)
        for adapter, strength in adapters:
            for name, layer in adapter.layers.items() if strength else ():
                part, _, module = name.partition(".")
                self._layers[part, f"{plain(part, module)}.weight"].append((layer, strength))

    def __len__(self) -> int:
        return len(self._layers)

    def names(self, part: str) -> list[str]:
        """Plain names of the weights of a part that change."""
        return [name for found, name in self._layers if found == part]

    def change(self, part: str, name: str) -> Change | None:
        """How a weight changes, in place and in its own dtype; None: it stays."""
        layers = self._layers.get((part, plain(part, name)))
        if layers is None:
            return None

        def add(weight: Tensor) -> None:
            # All deltas together first: the weight is the largest number in the sum.
            total = sum(
                (layer.delta() * strength for layer, strength in layers[1:]), layers[0][0].delta() * layers[0][1]
            )
            weight.add_(total.view(weight.shape))

        return add


@dataclass(frozen=True)
class WeightFile:
    """A file of weights that will be written.

    Attributes:
        path: below the output folder; of a single file ``.``.
        entries: its tensors.
        metadata: its header.
        original: the file whose bytes it has, where nothing of it changes.
    """

    path: Path
    entries: Sequence[Entry]
    metadata: Mapping[str, str]
    original: Path | None = None

    @property
    def size(self) -> int:
        """Bytes, without the header."""
        return sum(entry.size for entry in self.entries)


def folder_from_folder(source: Source, deltas: Deltas, dtype: torch.dtype | None) -> list[WeightFile]:
    """The same files; only tensors that change are not their bytes."""
    files = []
    for part in (*ADAPTED, "vae"):
        place = source.of(part)
        if not isinstance(place, FolderPart):
            files.append(_vae_for_folder(place, dtype))
            continue
        for path in weight_files(place.folder(part)):
            table, metadata = read_table(path)
            entries = [_entry(one, deltas.change(part, name), dtype) for name, one in table.items()]
            same = all(entry.source == table[entry.name] for entry in entries)
            where = Path(part) / path.name
            files.append(WeightFile(where, _ordered(entries, dtype), metadata, path if same else None))
    return files


def file_from_file(source: Source, deltas: Deltas, dtype: torch.dtype | None) -> list[WeightFile]:
    """The same tensors in the same order, those included that are of no network."""
    main = cast("FilePart", source.main)
    table, metadata = read_table(source.path)
    changes: dict[str, list[Change]] = defaultdict(list)
    for part in ADAPTED:
        config = main.config("unet")
        for name in deltas.names(part):
            piece = piece_of(part, name, config)
            change = deltas.change(part, name)
            if change is not None:
                changes[piece.name].append(_within(piece, change))
    entries = [_entry(one, _all(changes.get(name, ())), dtype) for name, one in table.items()]
    if source.vae is not None:
        own = set(part_names(main.header, "vae"))
        entries = aligned([entry for entry in entries if entry.name not in own] + _vae_for_file(source.vae, dtype))
    return [WeightFile(Path(), _ordered(entries, dtype), metadata)]


def file_from_folder(source: Source, deltas: Deltas, dtype: torch.dtype | None) -> list[WeightFile]:
    """One file of the original layout; open_clip's attention matrices are joined."""
    config = source.main.config("unet")
    entries: list[Entry] = []
    for part in ADAPTED:
        weights = _folder_weights(cast("FolderPart", source.main), part)
        together: dict[str, list[tuple[Piece, Stored, Change | None]]] = defaultdict(list)
        for name, stored in weights.items():
            piece = piece_of(part, name, config)
            together[piece.name].append((piece, stored, deltas.change(part, name)))
        entries += [_joined(name, pieces, dtype) for name, pieces in together.items()]
    entries += _vae_for_file(source.of("vae"), dtype)
    return [WeightFile(Path(), aligned(entries), {})]


def folder_from_file(source: Source, deltas: Deltas, dtype: torch.dtype | None) -> list[WeightFile]:
    """A file for each network, under the names that every version of diffusers and transformers reads."""
    table, _ = read_table(source.path)
    config = source.main.config("unet")
    files = []
    for part in ADAPTED:
        entries = []
        for name, shape in expected_shapes(part, source.main.config(part)).items():
            if not name.endswith("position_ids"):
                piece, change = piece_of(part, name, config), deltas.change(part, name)
                entries.append(_cut(_folder_name(part, name), shape, piece, table[piece.name], change, dtype))
        file = "diffusion_pytorch_model" if part == "unet" else "model"
        files.append(WeightFile(Path(part) / f"{file}.safetensors", aligned(entries), {"format": "pt"}))
    return [*files, _vae_for_folder(source.of("vae"), dtype)]


def _folder_name(part: str, name: str) -> str:
    wrapped = part.startswith("text_encoder") and not plain(part, name).startswith("text_projection")
    return f"text_model.{plain(part, name)}" if wrapped else name


# ---- weights as they lie


def _folder_weights(place: FolderPart, part: str) -> dict[str, Stored]:
    """A part's weights in a folder by plain name.

    Raises:
        IntegrityError: they are not those that its configuration describes.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(place.folder(part)):
        for name, stored in read_table(path)[0].items():
            if not name.endswith("position_ids"):  # a buffer that every loader makes for itself
                found[_today(part, name, stored.shape)] = stored
    expected = {plain(part, name): shape for name, shape in expected_shapes(part, place.config(part)).items()}
    matrices = {name: _as_matrix(part, name, one.shape) for name, one in found.items()}
    require_same(matrices, expected, f"{place.folder(part)}")
    return found


def _today(part: str, name: str, shape: tuple[int, ...]) -> str:
    if part != "vae":
        return plain(part, name)
    return next(iter(new_vae_names({name: torch.empty(shape, device="meta")})))


def _as_matrix(part: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A VAE's attention matrix that an old file holds as a 1x1 convolution."""
    return shape[:2] if part == "vae" and ".attentions." in name and shape[2:] == (1, 1) else shape


def _vae_weights(place: Part) -> dict[str, Stored]:
    """A VAE's weights by their names of today, from a folder or from a file in either naming."""
    if isinstance(place, FolderPart):
        return _folder_weights(place, "vae")
    file = cast("FilePart", place)  # there are these two
    table, _ = read_table(file.path)
    names = part_names(file.header, "vae")
    expected = place.shapes("vae")
    last = last_block(expected)
    there = {vae_place(name, shape, last)[0].partition(".")[2]: name for name, shape in expected.items()}
    prefix = "first_stage_model." if file.header.has("first_stage_model.") else ""
    found = {}
    for name in names:
        inner = name.removeprefix(prefix)
        found[there.get(inner) or _today("vae", inner, table[name].shape)] = table[name]
    require_same(
        {name: _as_matrix("vae", name, one.shape) for name, one in found.items()}, expected, f"{file.path} (vae)"
    )
    return found


def _vae_for_folder(place: Part, dtype: torch.dtype | None) -> WeightFile:
    shapes = expected_shapes("vae", place.config("vae"))
    entries = [_reshaped(_entry(one, None, dtype), name, shapes[name]) for name, one in _vae_weights(place).items()]
    return WeightFile(Path("vae/diffusion_pytorch_model.safetensors"), aligned(entries), {"format": "pt"})


def _vae_for_file(place: Part, dtype: torch.dtype | None) -> list[Entry]:
    weights = _vae_weights(place)
    last = last_block(weights)
    entries = []
    for name, stored in weights.items():
        shape = _as_matrix("vae", name, stored.shape)
        entries.append(_reshaped(_entry(stored, None, dtype), *vae_place(name, shape, last)))
    return entries


# ---- one tensor


def _target(stored: Stored, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that a tensor is written in; None for one of no floating-point dtype, which stays as it is."""
    own = FLOATS.get(stored.dtype)
    return dtype if dtype is not None and own is not None else own


def _same(stored: Stored, dtype: torch.dtype | None) -> bool:
    return _target(stored, dtype) is FLOATS.get(stored.dtype)


def _ordered(entries: Sequence[Entry], dtype: torch.dtype | None) -> Sequence[Entry]:
    """The source's own order, unless sizes changed."""
    return entries if dtype is None else aligned(entries)


def _entry(stored: Stored, change: Change | None, dtype: torch.dtype | None) -> Entry:
    if change is None and _same(stored, dtype):
        return Entry.copied(stored)
    target = _target(stored, dtype) or torch.float32
    return Entry.made(stored.name, target, stored.shape, lambda: _rounded(_changed(stored, change), target, stored))


def _reshaped(entry: Entry, name: str, shape: tuple[int, ...]) -> Entry:
    """The same bytes under another name and shape."""
    source = entry.source
    if isinstance(source, Stored):
        return Entry(name, entry.dtype, shape, entry.size, source)
    return Entry(name, entry.dtype, shape, entry.size, lambda: source().view(shape))


def _joined(name: str, pieces: list[tuple[Piece, Stored, Change | None]], dtype: torch.dtype | None) -> Entry:
    """One tensor of the original layout from the weights that are in it."""
    (first, stored, change), *more = pieces
    if not more and first.third is None and not first.transposed:
        return _reshaped(_entry(stored, change, dtype), name, stored.shape)
    ordered = sorted(pieces, key=lambda one: one[0].third or 0)
    target = _target(stored, dtype) or torch.float32
    if any((_target(one, dtype), one.shape) != (target, stored.shape) for _, one, _ in ordered):
        raise IntegrityError(
            "Queries, keys and values of one layer are stored in different number formats or sizes",
            where=f"{stored.path} ({stored.name})",
            hint="--dtype float16, or write a folder",
        )
    shape = stored.shape[::-1] if first.transposed else (len(ordered) * stored.shape[0], *stored.shape[1:])

    def make() -> Tensor:
        values = [_rounded(_changed(one, its), target, one) for _, one, its in ordered]
        return values[0].T if first.transposed else torch.cat(values)

    return Entry.made(name, target, shape, make)


def _cut(
    name: str, shape: tuple[int, ...], piece: Piece, stored: Stored, change: Change | None, dtype: torch.dtype | None
) -> Entry:
    """One weight out of the tensor of the original layout that it is in."""
    if piece.third is None and not piece.transposed:
        return _reshaped(_entry(stored, change, dtype), name, shape)
    target = _target(stored, dtype) or torch.float32
    within = None if change is None else _within(piece, change)
    return Entry.made(name, target, shape, lambda: piece.view(_rounded(_changed(stored, within), target, stored)))


def _within(piece: Piece, change: Change) -> Change:
    return lambda whole: change(piece.view(whole))


def _all(changes: Iterable[Change]) -> Change | None:
    some = list(changes)
    if not some:
        return None

    def every(weight: Tensor) -> None:
        for change in some:
            change(weight)

    return every


def _changed(stored: Stored, change: Change | None) -> Tensor:
    """A tensor with its change, in float32 (float64 where it is stored so)."""
    value = stored.read()
    value = value if value.dtype == torch.float64 else value.float()
    if change is not None:
        change(value)
    return value


def _rounded(value: Tensor, dtype: torch.dtype, stored: Stored) -> Tensor:
    """Rounded once.

    Raises:
        IntegrityError: NaN, or beyond the dtype's range.
    """
    result = value.to(dtype)
    if not bool(torch.isfinite(result.float()).all()):
        raise IntegrityError(
            "A weight is NaN or infinite once the LoRA is in it",
            where=f"{stored.path} ({stored.name})",
            why=f"written as {str(dtype).removeprefix('torch.')}",
            hint="a lower strength, or --dtype float32",
        )
    return result


def adapted_shapes(source: Source) -> dict[str, dict[str, tuple[int, ...]]]:
    """Plain name to shape of the weights of the networks that a LoRA can change."""
    return {part: {plain(part, name): shape for name, shape in source.main.shapes(part).items()} for part in ADAPTED}


Plan = Callable[[Source, Deltas, torch.dtype | None], list[WeightFile]]
PLANS: dict[tuple[Any, str], Plan] = {
    (FolderPart, "folder"): folder_from_folder,
    (FolderPart, "file"): file_from_folder,
    (FilePart, "file"): file_from_file,
    (FilePart, "folder"): folder_from_file,
}
