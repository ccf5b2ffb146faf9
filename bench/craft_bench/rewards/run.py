"""One run of ``craft-fast bench rewards``: reward after reward, results compared before they are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from craft_bench import rows
from craft_bench.rewards import measure
from craft_bench.rewards.cases import OURS, PACKAGE, PLAIN, Case, cases_of
from craft_bench.rewards.compare import Deviation, compare
from craft_bench.rewards.gates import judge
from craft_bench.rewards.models import SIZES, Size, Subject, default_dtypes, make_pictures, make_prompts, open_subject
from craft_bench.rewards.rivals import Rivals, package_environment
from craft_bench.rows import Row, RowFile
from craft_bench.sdxl.measure import MATMUL_DRIFT, matmul_tflops
from craft_bench.sdxl.planned import beside
from craft_bench.sdxl.problem import clean
from craft_bench.sdxl.run import Report, gate_row
from craft_bench.sdxl.stepping import reason
from craft_fast.errors import EnvironmentProblem, Interrupted
from craft_fast.progress import Progress

SUITE = "rewards"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Args:
        rewards: names of published models.
        batches: pictures in a call, in the order of measuring.
        quick: few cases, short timing.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of ours; None: float16 and bfloat16 on a GPU, float32 and bfloat16 on a CPU.
        size: ``auto`` (full on a GPU, tiny on a CPU), ``full`` or ``tiny``.
        package: hold ours against the authors' packages.
        out: folder for rows.
        deadline_s: no new case is begun this many seconds after the start; None for no limit.
    """

    rewards: Sequence[str]
    batches: Sequence[int]
    quick: bool = False
    device: str = "auto"
    dtype: str | None = None
    size: str = "auto"
    package: bool = False
    out: Path = Path("bench/results")
    deadline_s: float | None = None


def run(options: Options, *, progress: Progress, should_stop: Callable[[], bool] = lambda: False) -> Report:
    """Measure and judge.

    Args:
        options: what to run.
        progress: told of each reward and case.
        should_stop: asked between two calls; true ends the run, and the rows measured so far stay.

    Raises:
        EnvironmentProblem: the device or a package's environment is not there, or the folder cannot be written.
        Interrupted: ``should_stop`` said so.
    """
    began = time.monotonic()
    device = _device(options.device)
    name = options.size if options.size != "auto" else "full" if device.type == "cuda" else "tiny"
    size = SIZES[name]
    known = rows.environment(device.type)
    effort = measure.QUICK if options.quick else measure.FULL
    dtypes = [options.dtype] if options.dtype else default_dtypes(device)
    with RowFile(options.out / f"{SUITE}-{known['device']}-{known['date']}.jsonl") as file:

        def check() -> None:
            if should_stop():
                raise Interrupted("Stopped", hint=f"the rows measured so far are in {file.path}")

        rate = matmul_tflops(device, getattr(torch, dtypes[0]), size.matmul, effort.rate)
        report = Report(file.path, name, matmul_tflops=(rate, None))
        work = Work(device, size, effort, dtypes, rate, known, check)
        deadline = None if options.deadline_s is None else began + options.deadline_s
        for index, reward in enumerate(options.rewards):
            progress.stage(reward, index + 1, len(options.rewards))
            _Reward(report, file, work, options, deadline, progress, reward).everything()
        _rate_again(report, work)
        report.gates = judge(report.rows)
        for reached in report.gates:
            if reached.measured is not None:
                file.append(gate_row(reached, known, SUITE))
    return report


@dataclass(frozen=True)
class Work:
    """Where and how all is measured.

    Attributes:
        device: where.
        size: how large.
        effort: how long.
        dtypes: of ours.
        matmul_tflops: the device's rate in the first of them.
        known: fields of every row.
        check: asked between calls; may raise to end all.
    """

    device: torch.device
    size: Size
    effort: measure.Effort
    dtypes: Sequence[str]
    matmul_tflops: float
    known: Row
    check: Callable[[], None]


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise EnvironmentProblem(
            "There is no CUDA device",
            where="--device cuda",
            why=f"torch.cuda.is_available() is false (torch {torch.__version__})",
            hint="craft-fast bench rewards --device cpu goes through all of it with tiny networks",
        )
    return torch.device("cuda" if there and name != "cpu" else "cpu")


@dataclass
class _Reward:
    """One reward: its results compared, then its cases."""

    report: Report
    file: RowFile
    work: Work
    options: Options
    deadline: float | None
    progress: Progress
    reward: str
    p50_ms: dict[tuple[str, int], float] = field(default_factory=dict)
    bad: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def everything(self) -> None:
        """Open, compare, measure."""
        self.work.check()
        if self._late():
            self.report.missing.append(self.reward)
            return
        environment = package_environment(self.reward) if self.options.package else None
        with (
            open_subject(self.reward, self.work.size, self.work.device, environment=environment) as subject,
            Rivals(subject, environment) as rivals,
        ):
            xformers = subject.xformers(self.work.dtypes)
            self.report.notes += [note for note in (*subject.notes, *rivals.notes) if note not in self.report.notes]
            cases = cases_of(
                self.reward, batches=self.options.batches, dtypes=self.work.dtypes, plain=rivals.plain,
                package=rivals.package is not None, xformers=xformers, quick=self.options.quick,
            )  # fmt: skip
            self._compare(cases, subject, rivals)
            with self.progress.task(self.reward, len(cases), "cases") as task:
                for case in cases:
                    self.work.check()
                    if self._late():
                        self.report.missing.append(case.label)
                    else:
                        self._case(case, subject, rivals)
                    task.advance()
        clean(self.work.device)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    # ---- right or wrong

    def _compare(self, cases: Sequence[Case], subject: Subject, rivals: Rivals) -> None:
        """Every form's scores of the same pictures against ours in float32; a wrong one is not timed."""
        count = self.work.size.compared
        pictures, prompts = make_pictures(self.work.size, count), make_prompts(0, count)
        reference = subject.score_once("float32", "sdpa", pictures, prompts)
        forms = list(dict.fromkeys((case.impl, case.dtype, case.attention) for case in cases))
        for impl, dtype, attention in forms:
            if (impl, dtype, attention) == (OURS, "float32", "sdpa"):
                continue
            self.work.check()
            row = self._row(Case(self.reward, impl, len(prompts), dtype, "score", attention)) | {"mode": "compare"}
            try:
                if impl == OURS:
                    found = subject.score_once(dtype, attention, pictures, prompts)
                else:
                    found = rivals.scores(impl, pictures, prompts)
                deviation = compare(found, reference, subject.unit, impl, dtype)
            except Interrupted:
                raise
            except Exception as error:
                self._refuse((impl, dtype, attention), row, reason(error))
                continue
            self._judge_form((impl, dtype, attention), row, deviation)
        clean(self.work.device)

    def _judge_form(self, form: tuple[str, str, str], row: Row, found: Deviation) -> None:
        row["deviation"] = found.fields()
        if found.right:
            self._keep(row)
        else:
            told = f"scores are up to {found.largest:.2g} from ours in float32, {found.allowed:.2g} allowed"
            self._refuse(form, row, told)

    def _refuse(self, form: tuple[str, str, str], row: Row, why: str) -> None:
        self.bad[form] = why
        if "deviation" in row:
            self._keep(row | {"failed": None, "checked": False})
        self.report.wrong.append(f"{self.reward} {form[0]} {form[1]} {form[2]}: {why}")

    # ---- time and memory

    def _case(self, case: Case, subject: Subject, rivals: Rivals) -> None:
        """Measure a case; whatever it raises becomes its row."""
        form = (case.impl, case.dtype, case.attention)
        row = self._row(case)
        if form in self.bad:
            self._keep(row | {"failed": f"not timed: {self.bad[form]}"})
            return
        clean(self.work.device)
        try:
            fields = self._ours(case, subject) if case.impl == OURS else self._rival(case, rivals)
        except Interrupted:
            raise
        except Exception as error:
            fields = {"failed": reason(error)}
            if case.impl == OURS:
                self.report.wrong.append(f"{case.label}: {fields['failed']}")
        self._keep(row | fields)

    def _rival(self, case: Case, rivals: Rivals) -> Row:
        fields = rivals.measure(case, self.work.size, self.work.device, self.work.effort, self.work.check)
        self.p50_ms[case.impl, case.batch] = fields["p50_ms"]
        return fields | {"images_per_s": 1e3 * case.batch / fields["p50_ms"], "checked": True}

    def _ours(self, case: Case, subject: Subject) -> Row:
        with subject.at_work(case.dtype, case.attention) as judge:
            call = judge.call(case, self.work.size)
            fields = measure.timed(call, self.work.device, self.work.effort, check=self.work.check)
        gflop = subject.need.image_gflop  # a millisecond: TFLOP a second
        fields |= {
            "images_per_s": 1e3 * case.batch / fields["p50_ms"], "gflop_per_image": gflop,
            "matrix_fraction": gflop * case.batch / fields["p50_ms"] / self.work.matmul_tflops,
            "weights_gib": judge.weight_bytes / GIB, "checked": True,
        }  # fmt: skip
        if case.mode == "score":
            planned = judge.planned_bytes(case.batch, self.work.size) / GIB
            fields["planned"] = {"memory_gib": planned, "memory_error": beside(planned, fields["peak_gib"])}
            fields["versus"] = {
                rival: self.p50_ms[rival, case.batch] / fields["p50_ms"]
                for rival in (PACKAGE, PLAIN)
                if (rival, case.batch) in self.p50_ms
            }
        return fields

    def _row(self, case: Case) -> Row:
        row = rows.blank_row(
            suite=SUITE, name=case.reward, impl=case.impl, case=case.name, dtype=case.dtype, mode=case.mode,
            size=case.batch, unit="images", **self.work.known,
        )  # fmt: skip
        return row | {
            "problem": self.work.size.name, "batch": case.batch, "attention": case.attention,
            "side_px": self.work.size.picture_px, "matmul_tflops": self.work.matmul_tflops,
        }  # fmt: skip

    def _keep(self, row: Row) -> None:
        self.file.append(row)
        self.report.rows.append(row)


def _rate_again(report: Report, work: Work) -> None:
    """A clock that fell in between makes shares of the rate doubtful; say so."""
    first = report.matmul_tflops[0]
    last = matmul_tflops(work.device, getattr(torch, work.dtypes[0]), work.size.matmul, work.effort.rate)
    report.matmul_tflops = (first, last)
    if abs(last - first) > MATMUL_DRIFT * first:
        report.notes.append(
            f"the matrix rate went from {first:.4g} to {last:.4g} TFLOP/s during the run: "
            "shares of it are uncertain by as much"
        )
