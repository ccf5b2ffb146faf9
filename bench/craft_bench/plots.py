"""One plot an op: time over size for every form, and the floor that no form can pass under."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_bench.registry import MODES
from craft_bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart (jfly.uni-koeln.de/color); markers differ as well.
_LOOKS = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
)
_OURS = {"triton": ("#D55E00", "X"), "torch": ("#000000", "P")}
_NAMES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "peft": "PEFT",
    "liger": "Liger",
    "randn": "eager, torch.randn",
    "triton": "craft-fast (Triton)",
    "torch": "craft-fast (matrix products)",
}


def draw(rows: Sequence[Row], folder: Path, name: str, notes: list[str]) -> list[Path]:
    """Draw each op that has rows.

    Args:
        rows: of one run.
        folder: for the PNG files.
        name: of the run's row file; files are ``<name>-<op>.png``.
        notes: gets a line where nothing can be drawn.

    Returns:
        The files.
    """
    timed = [row for row in rows if row["p50_ms"] is not None]
    if not timed:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        notes.append("no plots: matplotlib is missing; pip install 'craft-fast[bench]'")
        return []
    ops = dict.fromkeys(row["name"] for row in timed)
    return [_draw_op([row for row in timed if row["name"] == op], folder / f"{name}-{op}.png") for op in ops]


def _draw_op(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    # No pyplot: it would keep a window system's state for files alone.
    figure = Figure(figsize=(max(7.0, 4.6 * len(modes) + 0.8), 3.9 * len(dtypes) + 1.0), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(len(dtypes), len(modes), squeeze=False, sharey=True)
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, mode in zip(line, modes, strict=True):
            _panel(axes, [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)])
            axes.set_title(f"{mode}, {dtype}" if mode != "both" else f"forward + backward, {dtype}", fontsize=10)
            axes.tick_params(labelbottom=True, labelleft=True)
    first = rows[0]
    figure.suptitle(f"{first['name']} on {first['device_name'] or first['device']}, {first['date']}", fontsize=12)
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles.update({str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2 if len(modes) == 1 else 3,
        fontsize=9,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "craft-fast"})
    return path


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    """Lines over size for a sweep; for cases that differ in more than size, points over their names."""
    cases = list(dict.fromkeys((row["size"], row["case"]) for row in sorted(rows, key=lambda row: int(row["size"]))))
    sweep = len({size for size, _ in cases}) == len(cases) > 2
    places = {case: size if sweep else index for index, (size, case) in enumerate(cases)}
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    looks = iter(_LOOKS * (1 + len(impls) // len(_LOOKS)))
    for index, impl in enumerate(impls):
        mine = sorted((row for row in rows if row["impl"] == impl), key=lambda row: int(row["size"]))
        # Points over one name stand beside each other, or the first would be hidden.
        aside = 0.0 if sweep else 0.5 * (index - (len(impls) - 1) / 2) / len(impls)
        look = _OURS[impl] if impl in _OURS else next(looks)
        _form(axes, impl, mine, [places[row["case"]] + aside for row in mine], look, sweep=sweep)
    floors = {row["case"]: row["floor_ms"] for row in rows}
    label = "floor: bytes / measured copy bandwidth"
    if sweep:
        axes.plot(list(places.values()), [floors[case] for case in places], "k--", linewidth=1.2, label=label)
        axes.set_xscale("log")
        axes.set_xlabel(f"size ({rows[0]['unit']})")
    else:
        for case, place in places.items():
            ends = [place - 0.4, place + 0.4]
            axes.plot(ends, [floors[case]] * 2, "k--", linewidth=1.2, label=label)
        axes.set_xticks(list(places.values()), list(places), rotation=30, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("median time (ms), bars: p20 to p80")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)


def _form(
    axes: Axes, impl: str, rows: Sequence[Row], places: Sequence[float], look: tuple[str, str], *, sweep: bool
) -> None:
    """One form: medians with their spread, and for ours what a CUDA graph makes of it, without the launches' cost."""
    colour, marker = look
    medians = [row["p50_ms"] for row in rows]
    spread = [[row["p50_ms"] - row["p20_ms"] for row in rows], [row["p80_ms"] - row["p50_ms"] for row in rows]]
    line = "-" if sweep else "none"
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.6, "capsize": 2}
    axes.errorbar(places, medians, yerr=spread, linestyle=line, label=_NAMES.get(impl, impl), **style)
    graphed = [(place, row["graph_ms"]) for place, row in zip(places, rows, strict=True) if row["graph_ms"] is not None]
    if impl in _OURS and graphed:
        axes.plot(
            [place for place, _ in graphed], [time for _, time in graphed], linestyle=":" if sweep else "none",
            marker=marker, markerfacecolor="none", color=colour, markersize=5, linewidth=1.4,
            label=f"{_NAMES[impl]} in a CUDA graph",
        )  # fmt: skip
