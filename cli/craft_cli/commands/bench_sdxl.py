"""``craft-fast bench sdxl``: the whole engine on a full-size SDXL with random weights, beside a reference loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.commands.bench import DEVICES, Deadline, Device
from craft_cli.request import check
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import table
from craft_fast.errors import Interrupted, QualityGateError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from collections.abc import Sequence

    from craft_bench.sdxl.gates import Reached
    from craft_bench.sdxl.run import Report

SIZES = ("auto", "full", "tiny")
HELP = opt.help_text(
    "Time SDXL's training and generation on this card.",
    "In one run on one card, with the same work and the same seeds: our engine beside a loop that does what diffusers' "
    "SDXL LoRA example does. Weights are random, so nothing is downloaded; cost and memory do not depend on them. "
    "Losses of the first steps are compared on the same noise; where ours are others, no speed-up is shown and the "
    "exit code is 7. Groups: steps (batch 1 and 4), large (batch 8), generation, headline (a whole run by stage), plan "
    "(what it says beside what is measured), variants, caps (memory caps), compile. Rows are appended to "
    "sdxl-<device>-<date>.jsonl as they come, what figures are asked of first.",
    examples=(
        "craft-fast bench sdxl",
        "craft-fast bench sdxl steps --deadline 300 --json",
        "craft-fast bench sdxl --quick --device cpu",
    ),
)


def _complete_groups(incomplete: str) -> list[str]:
    from craft_bench.sdxl.cases import GROUPS

    return [group for group in GROUPS if group.startswith(incomplete)]


Groups = Annotated[
    list[str] | None,
    typer.Argument(metavar="GROUP", autocompletion=_complete_groups, help="Groups to run; all unless named."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Few cases and short timing.")]
SizeOption = Annotated[
    str,
    typer.Option(
        "--size",
        metavar="NAME",
        autocompletion=opt.complete_from(*SIZES),
        help="full, tiny, or auto: full on a GPU, tiny on a CPU.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for rows.")]


def sdxl(
    groups: Groups = None,
    quick: Quick = False,
    device: Device = "auto",
    size: SizeOption = "auto",
    out: Out = Path("bench/results"),
    deadline_s: Deadline = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure the engine and print its tables."""
    from craft_bench.sdxl.cases import choose_groups

    mode = choose_mode(as_json=as_json, quiet=quiet)
    chosen = choose_groups(groups or ())
    check("--device", device, DEVICES)
    check("--size", size, SIZES)
    # Before anything imports torch: threads that wait must not spin, and import notices stay off the screen.
    quiet_third_party()
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            from craft_bench.sdxl.run import Options, run

            options = Options(chosen, quick=quick, device=device, size=size, out=out, deadline_s=deadline_s)
            try:
                report = run(options, progress=sink, should_stop=stop)
            except Interrupted as stopped:
                raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped
    print_result(mode, report_lines(report), report_data(report), event="result")
    if report.wrong:
        more = f"; and {len(report.wrong) - 1} more" if len(report.wrong) > 1 else ""
        raise QualityGateError(
            "Our engine failed or trains otherwise than the reference: no speed-up of it is shown",
            where=str(report.path),
            why=report.wrong[0] + more,
            hint="CRAFT_DEBUG=1 shows more",
        )


def report_lines(report: Report) -> list[str]:
    """The report for a person: tables, the figures, where the rows are."""
    from craft_bench.sdxl.table import failures, image_table, loss_table, stage_table, step_table

    lines: list[str] = []
    for cells in (step_table(report.rows), loss_table(report.rows), image_table(report.rows)):
        if cells:
            lines += [*table(cells, right=range(1, len(cells[0]))), ""]
    if cells := stage_table(report.rows):
        lines += [*table(cells, right=(1,)), ""]
    return [*lines, *last_lines(report, failures(report.rows))]


def last_lines(report: Report, failed: Sequence[str]) -> list[str]:
    """What a report for a person ends with: what failed, the figures, the matrix rate, where the rows are."""
    from craft_bench.sdxl.table import gate_table

    lines = [*failed, ""] if failed else []
    if any(reached.measured is not None for reached in report.gates):
        lines += [*table(gate_table(report.gates), right=(1, 2)), ""]
    else:
        lines.append(f"none of the {len(report.gates)} figures asked of a GPU was measured")
    first, last = report.matmul_tflops
    lines.append(f"matrix rate: {first:.4g} TFLOP/s at the start" + (f", {last:.4g} at the end" if last else ""))
    lines += report.notes
    if report.missing:
        lines.append(f"left out by the deadline: {len(report.missing)} cases: {', '.join(report.missing)}")
    lines.append(f"rows: {report.path} ({len(report.rows)} of this run, {report.size} size)")
    return lines


def report_data(report: Report) -> dict[str, Any]:
    """The report for a script."""
    return {
        "file": str(report.path),
        "size": report.size,
        "rows": report.rows,
        "figures": figures(report.gates),
        "matmul_tflops": report.matmul_tflops,
        "missing": report.missing,
        "wrong": report.wrong,
        "notes": report.notes,
    }


def figures(gates: Sequence[Reached]) -> list[dict[str, Any]]:
    """What was asked and what was measured, for a script."""
    return [
        {
            "figure": reached.gate.text,
            "sense": reached.gate.sense,
            "asked": reached.gate.bound,
            "measured": reached.measured,
            "met": reached.met,
            "where": reached.where,
            "cases": reached.cases,
        }
        for reached in gates
    ]
