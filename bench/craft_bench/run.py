"""One run of the microbenchmarks: tests, copy bandwidth, cases, rows, figures, plots."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from craft_bench import check, measure, registry, rows
from craft_bench.gates import Reached, covered, judge
from craft_bench.registry import EAGER, MODES, Case, Form, Problem, runs_on
from craft_bench.rows import Row, RowFile
from craft_bench.verify import TIMEOUT_S, Verdict, refuse_a_forced_form, tests_folder, verdicts
from craft_fast.errors import EnvironmentProblem, Interrupted
from craft_fast.progress import Progress

SUITE = "kernels"
COPY_DRIFT = 0.05


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Args:
        ops: names of ops; none for all.
        quick: few sizes, short timing.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: only cases of this dtype; None for all.
        out: folder for rows and plots.
        deadline_s: no new case is begun this many seconds after the start; None for no limit.
        plots: draw a plot an op.
    """

    ops: Sequence[str] = ()
    quick: bool = False
    device: str = "auto"
    dtype: str | None = None
    out: Path = Path("bench/results")
    deadline_s: float | None = None
    plots: bool = True


@dataclass(slots=True)
class Report:
    """What came out.

    Args:
        path: the file of rows.
        rows: the rows of this run.
        verdicts: by op, whether it may show speed-ups.
        gates: the issue's figures.
        copy_gbps: copy bandwidth at the start and at the end.
        missing: labels of cases that the deadline left out.
        wrong: labels of cases in which our form gave a wrong result or none.
        plots: PNG files.
        notes: lines worth reading.
    """

    path: Path
    rows: list[Row] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    gates: list[Reached] = field(default_factory=list)
    copy_gbps: tuple[float, float | None] = (0.0, None)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def red(self) -> list[str]:
        """Ops whose tests are not green."""
        return [op for op, verdict in self.verdicts.items() if not verdict.green]


def run(
    options: Options,
    *,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
    load: Callable[[str], list[Case]] = registry.load_cases,
    tests: Path | None = None,
) -> Report:
    """Verify, measure, judge and draw.

    Args:
        options: what to run.
        progress: told of each op and case.
        should_stop: asked between two forms; true ends the run, and the rows measured so far stay.
        load: gives the cases of an op.
        tests: folder of the ops' tests; None finds that of the checkout.

    Returns:
        The report.

    Raises:
        UsageError: there is no op of that name.
        EnvironmentProblem: the device is not there, a form is forced, or the folder cannot be written.
        Interrupted: ``should_stop`` said so.
    """
    began = time.monotonic()
    device = _device(options.device)
    refuse_a_forced_form(device.type)
    ops = registry.choose_ops(options.ops)
    cases = _select([case for op in ops for case in load(op)], options)
    known = rows.environment(device.type)
    name = f"{SUITE}-{known['device']}-{known['date']}"
    with RowFile(options.out / f"{name}.jsonl") as file:
        report = Report(file.path)
        deadline = None if options.deadline_s is None else began + options.deadline_s
        report.verdicts = _verify(cases, device, tests, options.out / f"{name}-tests.log", deadline, progress)
        _stop_if(should_stop, file.path)
        effort = measure.QUICK if options.quick else measure.FULL
        copy = measure.copy_gbps(device, effort)
        report.copy_gbps = (copy, None)
        bench = _Bench(report, file, device, effort, known, copy, should_stop)
        for case in _announced(cases, progress):
            if deadline is not None and time.monotonic() >= deadline:
                report.missing.append(case.label)
            else:
                bench.case(case)
        _copy_again(report, device, effort)
        report.gates = judge(cases, report.rows if device.type == "cuda" else ())
        for reached in report.gates:
            if reached.measured is not None:
                file.append(_gate_row(reached, known))
    if options.plots:
        from craft_bench.plots import draw

        report.plots = draw(report.rows, options.out, name, report.notes)
    return report


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise EnvironmentProblem(
            "There is no CUDA device",
            where="--device cuda",
            why="torch.cuda.is_available() is false" + ("" if torch.version.cuda else f" (torch {torch.__version__})"),
            hint="craft-fast bench kernels --device cpu runs the forms that a CPU can",
        )
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _select(cases: list[Case], options: Options) -> list[Case]:
    """The cases to run: those that figures need first, small ones before large ones."""
    wanted = [case for case in cases if options.dtype in (None, case.dtype) and (case.quick or not options.quick)]
    if not wanted and options.dtype is not None:
        have = sorted({case.dtype for case in cases})
        raise EnvironmentProblem(
            f"No case has the dtype {options.dtype}", where="--dtype", why=f"these ops have {', '.join(have)}",
            hint="leave --dtype out",
        )  # fmt: skip
    order = {op: index for index, op in enumerate(registry.OPS)}
    return sorted(wanted, key=lambda case: (not covered(case), order.get(case.op, len(order))))


def _verify(
    cases: Sequence[Case],
    device: torch.device,
    tests: Path | None,
    log: Path,
    deadline: float | None,
    progress: Progress,
) -> dict[str, Verdict]:
    """Run the tests of the ops that could show a speed-up here."""
    ops = list(dict.fromkeys(case.op for case in cases))
    compared = [
        op for op in ops if any(runs_on(impl, device.type) for case in cases if case.op == op for impl in case.ours)
    ]
    nothing = Verdict("self-check", True, f"our form does not run on {device.type}: nothing to compare")
    here = dict.fromkeys(ops, nothing)
    if not compared:
        return here
    folder = tests if tests is not None else tests_folder()
    progress.stage("tests", 1, len(ops) + 1)
    left = TIMEOUT_S if deadline is None else max(1.0, min(TIMEOUT_S, deadline - time.monotonic()))
    found = verdicts(compared, device.type, folder=folder, log=log, timeout_s=left)
    for op, verdict in found.items():
        say = progress.info if verdict.green else progress.warn
        say(f"{op}: {verdict}")
    return here | found


def _announced(cases: Sequence[Case], progress: Progress) -> Iterator[Case]:
    """The cases, with each op told as a stage and each case counted."""
    ops = list(dict.fromkeys(case.op for case in cases))
    index = 0
    while index < len(cases):
        op = cases[index].op
        block = []
        while index < len(cases) and cases[index].op == op:
            block.append(cases[index])
            index += 1
        progress.stage(op, ops.index(op) + 2, len(ops) + 1)
        with progress.task(op, len(block), "cases") as task:
            for case in block:
                yield case
                task.advance()


def _stop_if(should_stop: Callable[[], bool], path: Path) -> None:
    if should_stop():
        raise Interrupted("Stopped", hint=f"the rows measured so far are in {path}")


@dataclass(slots=True)
class _Bench:
    """Measures case after case; what all of them share."""

    report: Report
    file: RowFile
    device: torch.device
    effort: measure.Effort
    known: Row
    copy_gbps: float
    should_stop: Callable[[], bool]

    def case(self, case: Case) -> None:
        """Check and measure every form of a case; whatever a form raises becomes its row."""
        torch._dynamo.reset()
        needed, free = case.memory, _free_bytes(self.device)
        if free is not None and needed > free:
            why = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            for impl in (*case.rivals, *case.ours):
                self._fail(case, impl, why)
            self.report.notes.append(f"{case.label} was left out: {why}")
            return
        try:
            problem = case.build(self.device)
            exact = problem.exact()
            eager_form = problem.forms[EAGER]()
            eager = check.errors(check.results(eager_form), exact)
        except Exception as error:
            for impl in (*case.rivals, *case.ours):
                self._fail(case, impl, _reason(error))
            self._note_ours(case, "its inputs or the naive form failed: " + _reason(error))
        else:
            medians: dict[str, dict[str, float]] = {}
            for impl in (*case.rivals, *case.ours):
                _stop_if(self.should_stop, self.file.path)
                self._form(case, problem, impl, exact, eager, medians)
            del problem, exact, eager_form
        finally:
            # A large case leaves blocks in torch's cache that the next one's sizes may not fit into.
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def _form(
        self,
        case: Case,
        problem: Problem,
        impl: str,
        exact: registry.Result,
        eager: check.Errors,
        medians: dict[str, dict[str, float]],
    ) -> None:
        ours = impl in case.ours
        if not runs_on(impl, self.device.type):
            self._fail(case, impl, f"does not run on {self.device.type}")
            return
        try:
            form = problem.forms[impl]()
            wrong = check.differences(form, exact, eager, slack=1.0 if ours else check.BASELINE_SLACK)
            if wrong is not None:
                self._fail(case, impl, f"not timed, its result is wrong: {wrong}")
                if ours:
                    self._note_ours(case, wrong)
                return
            for mode in MODES:
                if mode in case.traffic:
                    self._measured(case, form, impl, mode, medians)
        except Exception as error:
            self._fail(case, impl, _reason(error))
            if ours and not _is_missing_memory(error):
                self._note_ours(case, _reason(error))

    def _measured(
        self, case: Case, form: Form, impl: str, mode: registry.Mode, medians: dict[str, dict[str, float]]
    ) -> None:
        figures = measure.measure(form, mode, self.device, self.effort)
        medians.setdefault(mode, {})[impl] = figures["p50_ms"]
        gbps = case.traffic[mode] / (figures["p50_ms"] * 1e-3) / 1e9
        verdict = self.report.verdicts[case.op]
        ratios = {other: p50 / figures["p50_ms"] for other, p50 in medians[mode].items() if other in case.rivals}
        self._keep(
            self._row(case, impl)
            | figures
            | {
                "mode": mode,
                "bytes": case.traffic[mode],
                "floor_ms": case.traffic[mode] / (self.copy_gbps * 1e9) * 1e3,
                "gbps": gbps,
                "copy_fraction": gbps / self.copy_gbps,
                "versus": ratios if impl in case.ours and verdict.green else None,
                "checked": verdict.checked,
            }
        )

    def _row(self, case: Case, impl: str) -> Row:
        return rows.blank_row(
            suite=SUITE, name=case.op, impl=impl, case=case.name, dtype=case.dtype, size=case.size, unit=case.unit,
            copy_gbps=self.copy_gbps, **self.known,
        )  # fmt: skip

    def _fail(self, case: Case, impl: str, why: str) -> None:
        self._keep(self._row(case, impl) | {"failed": why})

    def _note_ours(self, case: Case, why: str) -> None:
        if any(runs_on(impl, self.device.type) for impl in case.ours):
            self.report.wrong.append(f"{case.label}: {why}")

    def _keep(self, row: Row) -> None:
        self.file.append(row)
        self.report.rows.append(row)


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a case may take; a tenth stays free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0] * 0.9)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(int(values["MemAvailable"].split()[0]) * 1024 * 0.9)
    except (OSError, KeyError, ValueError):
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed"
    text = str(error).strip()
    first = text.splitlines()[0][:300] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_missing_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def _copy_again(report: Report, device: torch.device, effort: measure.Effort) -> None:
    """A clock that fell in between makes the shares of bandwidth doubtful; say so."""
    first, last = report.copy_gbps[0], measure.copy_gbps(device, effort)
    report.copy_gbps = (first, last)
    if abs(last - first) > COPY_DRIFT * first:
        report.notes.append(
            f"copy bandwidth went from {first:.0f} to {last:.0f} GB/s during the run: "
            "shares of it are uncertain by as much"
        )


def _gate_row(reached: Reached, known: Row) -> dict[str, Any]:
    """A figure as a row: what was asked, what was measured, at the worst of its cases."""
    gate = reached.gate
    return rows.blank_row(
        suite=SUITE, name=gate.op, case=reached.where, mode=gate.mode, dtype=gate.dtype, **known
    ) | {
        "figure": gate.text,
        "metric": gate.metric,
        "rival": gate.rival,
        "asked": gate.least,
        "measured": reached.measured,
        "met": reached.met,
        "below": list(reached.below),
        "cases_measured": reached.cases[0],
        "cases": reached.cases[1],
    }  # fmt: skip
