"""``craft-fast bench rewards``: images a second of the published judges at full size, beside those who are known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from craft_cli import options as opt
from craft_cli.commands.bench import DEVICES, Deadline, Device
from craft_cli.commands.bench_sdxl import SIZES, last_lines, report_data
from craft_cli.request import check
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import table
from craft_fast.errors import Interrupted, QualityGateError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_bench.sdxl.run import Report

HELP = opt.help_text(
    "Time the published reward models on this machine.",
    "Pictures a second from bytes in memory to scores, and of the network alone, at each batch size; peak memory; the "
    "share of the device's matrix rate. Weights are random, so nothing is fetched. In the same run: transformers' "
    "CLIPModel in float32, and with --package the authors' own score(). Scores are compared before anything is timed; "
    "where ours are others, no time is shown and the exit code is 7. Rows are appended to "
    "rewards-<device>-<date>.jsonl.",
    examples=(
        "craft-fast bench rewards",
        "craft-fast bench rewards hpsv2.1 --package --batch 1,16",
        "craft-fast bench rewards --quick --device cpu",
    ),
)
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME", autocompletion=opt.complete_rewards, help="Reward models; all but hpsv2.0 unless named."
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Few cases and short timing.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=opt.complete_from("float32", "bfloat16", "float16"),
        help="Only this dtype: float32, bfloat16 or float16.",
    ),
]
Batch = Annotated[str, typer.Option("--batch", metavar="N,N", help="Pictures in a call, in the order of measuring.")]
Package = Annotated[
    bool, typer.Option("--package", help="Hold ours against the authors' packages (craft-fast rewards install).")
]
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


def rewards(
    names: Names = None,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = None,
    batch: Batch = "16,64,1",
    package: Package = False,
    size: SizeOption = "auto",
    out: Out = Path("bench/results"),
    deadline_s: Deadline = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure the judges and print their tables."""
    from craft_bench.rewards.cases import DTYPES, choose_rewards, parse_batches

    mode = choose_mode(as_json=as_json, quiet=quiet)
    chosen, batches = choose_rewards(names or ()), parse_batches(batch)
    check("--device", device, DEVICES)
    check("--size", size, SIZES)
    if dtype is not None:
        check("--dtype", dtype, DTYPES)
    # Before anything imports torch: threads that wait must not spin, and import notices stay off the screen.
    quiet_third_party()
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            from craft_bench.rewards.run import Options, run

            options = Options(
                chosen, batches, quick=quick, device=device, dtype=dtype, size=size, package=package, out=out,
                deadline_s=deadline_s,
            )  # fmt: skip
            try:
                report = run(options, progress=sink, should_stop=stop)
            except Interrupted as stopped:
                raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped
    print_result(mode, report_lines(report), report_data(report), event="result")
    if report.wrong:
        more = f"; and {len(report.wrong) - 1} more" if len(report.wrong) > 1 else ""
        raise QualityGateError(
            "Scores are not what they must be, or a judge failed: no time of it is shown",
            where=str(report.path),
            why=report.wrong[0] + more,
            hint="CRAFT_DEBUG=1 shows more",
        )


def report_lines(report: Report) -> list[str]:
    """The report for a person: tables, the figures, where the rows are."""
    from craft_bench.rewards.table import deviation_table, failures, speed_table

    lines: list[str] = []
    for cells, first in ((speed_table(report.rows), 3), (deviation_table(report.rows), 2)):
        if cells:
            lines += [*table(cells, right=range(first, len(cells[0]))), ""]
    return [*lines, *last_lines(report, failures(report.rows))]
