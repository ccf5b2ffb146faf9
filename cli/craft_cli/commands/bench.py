"""``craft-fast bench``: measurements of this machine; ``kernels`` times the ops against what there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.request import check
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import table
from craft_fast.errors import Interrupted, QualityGateError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_bench.run import Report

HELP = opt.help_text(
    "Measure this machine.",
    examples=(
        "craft-fast bench kernels --quick",
        "craft-fast bench kernels weighted_noise_loss --device cuda",
    ),
)
KERNELS_HELP = opt.help_text(
    "Time the ops against PyTorch and libraries.",
    "Each op is timed beside eager PyTorch, torch.compile and the library that has it, and every result is compared "
    "with float64 before. An op's tests run first; while they are red, no speed-up of it is shown and the exit code is "
    "7. Rows are appended to kernels-<device>-<date>.jsonl as they come; beside it go a plot an op and what the tests "
    "said.",
    examples=(
        "craft-fast bench kernels",
        "craft-fast bench kernels --quick --device cpu",
        "craft-fast bench kernels geglu lora_linear --dtype bfloat16 --json",
        "craft-fast bench kernels --deadline 300 --out runs/bench",
    ),
)
DEVICES = ("auto", "cpu", "cuda")


def _complete_ops(incomplete: str) -> list[str]:
    from craft_bench.registry import OPS

    return [op for op in OPS if op.startswith(incomplete)]


Ops = Annotated[
    list[str] | None,
    typer.Argument(metavar="OP", autocompletion=_complete_ops, help="Ops to run; all unless named."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Few sizes and short timing.")]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", autocompletion=opt.complete_from(*DEVICES), help="auto, cpu or cuda.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=opt.complete_from("float32", "bfloat16", "float16"),
        help="Only this dtype: float32, bfloat16 or float16.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for rows and plots.")]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Draw nothing.")]
Deadline = Annotated[
    float | None,
    typer.Option("--deadline", metavar="SECONDS", min=0, help="Begin no new case later than this after the start."),
]


def kernels(
    ops: Ops = None,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = None,
    out: Out = Path("bench/results"),
    no_plots: NoPlots = False,
    deadline_s: Deadline = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run the microbenchmarks and print their tables."""
    from craft_bench.registry import DTYPES, choose_ops

    mode = choose_mode(as_json=as_json, quiet=quiet)
    chosen = choose_ops(ops or ())
    check("--device", device, DEVICES)
    if dtype is not None:
        check("--dtype", dtype, DTYPES)
    # Before anything imports torch: threads that wait must not spin, and import notices stay off the screen.
    quiet_third_party()
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            from craft_bench.run import Options, run

            options = Options(
                chosen, quick=quick, device=device, dtype=dtype, out=out, deadline_s=deadline_s, plots=not no_plots
            )
            try:
                report = run(options, progress=sink, should_stop=stop)
            except Interrupted as stopped:
                raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped
    print_result(mode, report_lines(report), report_data(report), event="result")
    _refuse_what_is_red(report)


def _refuse_what_is_red(report: Report) -> None:
    faults = [f"{op}: {report.verdicts[op].detail}" for op in report.red] + report.wrong
    if faults:
        more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
        red = bool(report.red)
        raise QualityGateError(
            "Tests of an op are red: no speed-up of it is shown" if red else "A form of ours failed: it was not timed",
            where=", ".join(report.red) if red else str(report.path),
            why=faults[0] + more,
            hint=f"what pytest said: {report.path.with_suffix('')}-tests.log" if red else "CRAFT_DEBUG=1 shows more",
        )


def report_lines(report: Report) -> list[str]:
    """The report for a person: a table an op, the figures, where things are."""
    from craft_bench.table import failures, gate_table, op_table

    lines: list[str] = []
    for op, verdict in report.verdicts.items():
        rows = [row for row in report.rows if row["name"] == op]
        if rows:
            checked = f"{verdict.checked} {'green' if verdict.green else 'RED'}: {verdict.detail}"
            cells = op_table(rows, verdict)
            lines += [f"{op} ({checked})", *table(cells, right=range(3, len(cells[0]))), *failures(rows), ""]
    if any(reached.measured is not None for reached in report.gates):
        lines += [*table(gate_table(report.gates), right=(2, 3)), ""]
    elif report.gates:
        lines.append(f"none of the {len(report.gates)} figures asked of a GPU was measured")
    first, last = report.copy_gbps
    lines.append(f"copy bandwidth: {first:.1f} GB/s at the start" + (f", {last:.1f} at the end" if last else ""))
    lines += report.notes
    if report.missing:
        lines.append(f"left out by the deadline: {len(report.missing)} cases: {', '.join(report.missing)}")
    lines += [f"plot: {path}" for path in report.plots]
    lines.append(f"rows: {report.path} ({len(report.rows)} of this run)")
    return lines


def report_data(report: Report) -> dict[str, Any]:
    """The report for a script."""
    return {
        "file": str(report.path),
        "rows": report.rows,
        "verified": {
            op: {"checked": verdict.checked, "green": verdict.green, "detail": verdict.detail}
            for op, verdict in report.verdicts.items()
        },
        "figures": [
            {
                "op": reached.gate.op,
                "figure": reached.gate.text,
                "asked": reached.gate.least,
                "measured": reached.measured,
                "met": reached.met,
                "where": reached.where,
                "cases": reached.cases,
            }
            for reached in report.gates
        ],
        "copy_gbps": report.copy_gbps,
        "missing": report.missing,
        "wrong": report.wrong,
        "plots": [str(path) for path in report.plots],
        "notes": report.notes,
    }
