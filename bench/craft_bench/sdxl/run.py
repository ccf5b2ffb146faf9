"""One run of ``craft-fast bench sdxl``: cases in the order of their importance, rows, figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from craft_bench import rows
from craft_bench.rows import Row, RowFile
from craft_bench.sdxl import measure, stepping
from craft_bench.sdxl.cases import (
    OURS,
    REFERENCE,
    GenerateCase,
    StepCase,
    generate_cases,
    step_cases,
)
from craft_bench.sdxl.gates import Reached, judge
from craft_bench.sdxl.generation import measure_images
from craft_bench.sdxl.headline import Headline
from craft_bench.sdxl.problem import SizeName, clean, default_dtype, make_size
from craft_bench.sdxl.stepping import Reference, Work
from craft_bench.sdxl.worker import TIMEOUT_S, Request, measure_apart
from craft_bench.verify import refuse_a_forced_form
from craft_fast.errors import EnvironmentProblem, Interrupted
from craft_fast.progress import Progress

SUITE = "sdxl"
GRACE_S = 45.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Args:
        groups: of ``cases.GROUPS``, in their order.
        quick: few cases, short timing.
        device: ``auto``, ``cpu`` or ``cuda``.
        size: ``auto`` (full on a GPU, tiny on a CPU), ``full`` or ``tiny``.
        out: folder for rows.
        deadline_s: no new case is begun this many seconds after the start; None for no limit.
    """

    groups: Sequence[str]
    quick: bool = False
    device: str = "auto"
    size: str = "auto"
    out: Path = Path("bench/results")
    deadline_s: float | None = None


@dataclass(slots=True)
class Report:
    """What came out.

    Args:
        path: the file of rows.
        size: how large the networks were.
        rows: the rows of this run.
        gates: the figures that are asked.
        matmul_tflops: the card's rate at the start and at the end.
        missing: labels of cases that the deadline left out.
        wrong: results of ours that are not the reference's, and what of ours failed.
        notes: lines worth reading.
    """

    path: Path
    size: str
    rows: list[Row] = field(default_factory=list)
    gates: list[Reached] = field(default_factory=list)
    matmul_tflops: tuple[float, float | None] = (0.0, None)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(options: Options, *, progress: Progress, should_stop: Callable[[], bool] = lambda: False) -> Report:
    """Measure and judge.

    Args:
        options: what to run.
        progress: told of each group and case.
        should_stop: asked between two steps; true ends the run, and the rows measured so far stay.

    Raises:
        EnvironmentProblem: the device is not there, a form is forced, or the folder cannot be written.
        Interrupted: ``should_stop`` said so.
    """
    began = time.monotonic()
    device = _device(options.device)
    refuse_a_forced_form(device.type)
    name: SizeName = "full" if options.size == "full" or (options.size == "auto" and device.type == "cuda") else "tiny"
    known = rows.environment(device.type)
    effort = measure.QUICK if options.quick else measure.FULL
    deadline = None if options.deadline_s is None else began + options.deadline_s
    with RowFile(options.out / f"{SUITE}-{known['device']}-{known['date']}.jsonl") as file:

        def check() -> None:
            if should_stop():
                raise Interrupted("Stopped", hint=f"the rows measured so far are in {file.path}")

        size, dtype = make_size(name), default_dtype(device)
        rate = measure.matmul_tflops(device, dtype, size.matmul, effort)
        report = Report(file.path, name, matmul_tflops=(rate, None))
        work = Work(size, device, dtype, effort, rate, check)
        _Bench(report, file, work, options, known, deadline, progress).everything()
        _rate_again(report, work)
        report.gates = judge(report.rows)
        for reached in report.gates:
            if reached.measured is not None:
                file.append(gate_row(reached, known, SUITE))
    return report


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise EnvironmentProblem(
            "There is no CUDA device",
            where="--device cuda",
            why=f"torch.cuda.is_available() is false (torch {torch.__version__})",
            hint="craft-fast bench sdxl --device cpu goes through all of it with a tiny model",
        )
    return torch.device("cuda" if there and name != "cpu" else "cpu")


@dataclass
class _Bench:
    """Measures case after case; what all of them share."""

    report: Report
    file: RowFile
    work: Work
    options: Options
    known: Row
    deadline: float | None
    progress: Progress
    references: dict[int, Reference] = field(default_factory=dict)

    def everything(self) -> None:
        """All groups in their order."""
        size, options = self.work.size, self.options
        steps = step_cases(options.groups, batches=size.batches, caps_gib=size.caps_gib, quick=options.quick)
        images = generate_cases(options.groups, batches=size.generated, quick=options.quick)
        cases: list[StepCase | GenerateCase] = [*steps, *images]
        for index, group in enumerate(options.groups):
            self.progress.stage(group, index + 1, len(options.groups))
            if group == "headline":
                self._headline()
            elif mine := [case for case in cases if case.group == group]:
                self._group(group, mine)

    def _group(self, group: str, cases: Sequence[StepCase | GenerateCase]) -> None:
        for case in self._counted(group, cases):
            self.work.check()
            if self._late():
                self.report.missing.append(case.label)
            elif not self._known(case):
                self._case(case)

    def _counted(self, group: str, cases: Sequence[StepCase | GenerateCase]) -> Iterator[StepCase | GenerateCase]:
        with self.progress.task(group, len(cases), "cases") as task:
            for case in cases:
                yield case
                task.advance()

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _known(self, case: StepCase | GenerateCase) -> bool:
        """Groups that are run by themselves need the reference, too; once a run is enough."""
        return isinstance(case, StepCase) and case.impl == REFERENCE and case.batch in self.references

    def _case(self, case: StepCase | GenerateCase) -> None:
        """Measure a case; whatever it raises becomes its row."""
        fields: Row
        try:
            fields = self._images(case) if isinstance(case, GenerateCase) else self._step(case)
        except Interrupted:
            raise
        except Exception as error:
            fields = {"failed": stepping.reason(error)}
        self._keep(self._row(case) | fields)
        failed = fields.get("failed")
        if failed and failed != stepping.OUT_OF_MEMORY and getattr(case, "impl", OURS) == OURS:
            self.report.wrong.append(f"{case.label}: {failed}")
        if fields.get("same") is False:
            adapter = fields.get("adapter_difference")
            self.report.wrong.append(
                f"{case.label}: its losses are up to {fields['loss_difference']:.2%} from the reference's"
                + (f", its adapter is {adapter:.2%} from it" if adapter is not None else "")
            )
        # What a failed case left must not weigh on the next one; a compiled one would be compiled anew.
        torch._dynamo.reset()
        clean(self.work.device)

    def _step(self, case: StepCase) -> Row:
        if case.impl == REFERENCE:
            fields, self.references[case.batch] = stepping.measure_reference(case, self.work)
            return fields
        reference = self.references.get(case.batch)
        if not case.isolated:
            return stepping.measure_ours(case, self.work, reference)
        clean(self.work.device)
        request = Request(
            case, self.work.size.name, self.work.device.type, self.options.quick, self.work.matmul_tflops
        )  # fmt: skip
        # A case that was begun in time may end somewhat later.
        left = TIMEOUT_S if self.deadline is None else self.deadline - time.monotonic() + GRACE_S
        fields = measure_apart(request, check=self.work.check, timeout_s=min(TIMEOUT_S, left))
        if reference is not None and not fields.get("failed") and fields["method"] != "full":
            fields |= stepping.compare(
                fields["losses"], reference, exact_base=fields["method"] == "lora", dtype=self.work.dtype
            )
            if fields["same"] is not False:
                fields["versus"] = {"reference": reference.p50_ms / fields["p50_ms"]}
        return fields

    def _images(self, case: GenerateCase) -> Row:
        return measure_images(case, self.work)

    def _headline(self) -> None:
        with self.progress.task("headline", None, "stages") as task:
            headline = Headline(self.work, self.report.rows, deadline=self.deadline)
            for fields in headline.stages():
                self._keep(self._blank("stage", OURS, str(fields["case"])) | fields)
                task.advance()

    def _blank(self, name: str, impl: str, case: str) -> Row:
        row = rows.blank_row(
            suite=SUITE, name=name, impl=impl, case=case, dtype=str(self.work.dtype).removeprefix("torch."),
            unit="images", **self.known,
        )  # fmt: skip
        return row | {"problem": self.work.size.name, "matmul_tflops": self.work.matmul_tflops}

    def _row(self, case: StepCase | GenerateCase) -> Row:
        step = isinstance(case, StepCase)
        row = self._blank("step" if step else "generate", case.impl if isinstance(case, StepCase) else OURS, case.name)
        settings = asdict(case)
        settings.pop("quick", None)
        return row | settings | {"size": case.batch, "mode": "both" if step else "forward"}

    def _keep(self, row: Row) -> None:
        self.file.append(row)
        self.report.rows.append(row)


def _rate_again(report: Report, work: Work) -> None:
    """A clock that fell in between makes utilisation doubtful; say so."""
    first = report.matmul_tflops[0]
    last = measure.matmul_tflops(work.device, work.dtype, work.size.matmul, work.effort)
    report.matmul_tflops = (first, last)
    if abs(last - first) > measure.MATMUL_DRIFT * first:
        report.notes.append(
            f"the matrix rate went from {first:.4g} to {last:.4g} TFLOP/s during the run: "
            "utilisation is uncertain by as much"
        )


def gate_row(reached: Reached, known: Row, suite: str) -> dict[str, Any]:
    """A figure as a row: what was asked, what was measured, at the worst of its cases."""
    gate = reached.gate
    return rows.blank_row(suite=suite, name="figure", case=reached.where, **known) | {
        "figure": gate.text,
        "metric": gate.metric,
        "sense": gate.sense,
        "asked": gate.bound,
        "measured": reached.measured,
        "met": reached.met,
        "missed": list(reached.missed),
        "cases_measured": reached.cases,
        "best_public": gate.best_public or None,
    }
