"""The one way in which commands run stages: settings, progress, signals, result."""

from __future__ import annotations

from craft_cli.request import Request, resolve
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.summary import summary_data, summary_lines
from craft_fast.errors import Interrupted, QualityGateError
from craft_fast.quiet import quiet_third_party


def execute(request: Request, *, as_json: bool, quiet: bool, until: str | None = None, only: str | None = None) -> None:
    """Run the pipeline for ``request`` and print its result.

    Args:
        request: which run, which settings.
        as_json: JSON lines on stdout.
        quiet: nothing but errors.
        until: last stage to run; None for all.
        only: the one stage to run, on the results of earlier ones; None for all.

    Raises:
        CraftError: whatever the pipeline raises; ``Interrupted`` carries the signal's exit code.
    """
    mode = choose_mode(as_json=as_json, quiet=quiet)
    # Before anything imports torch: threads that wait must not spin, and import notices stay off the screen.
    quiet_third_party()
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            root = request.root
            resolved = resolve(request)
            for note in resolved.notes:
                sink.info(note)
            from craft_fast.pipeline import STAGES, run_pipeline

            try:
                summary = run_pipeline(root, resolved.settings, until=until, only=only, progress=sink, should_stop=stop)
            except Interrupted as stopped:
                # The pipeline knows that it was asked to stop; which signal asked is known here.
                raise Interrupted(
                    "Stopped; everything done so far is saved",
                    exit_code=stop.exit_code,
                    hint=f"the same command continues; so does: {request.command(only or 'run')}",
                ) from stopped
            except QualityGateError as missed:
                # The run is complete all the same, and its report shows what is missing.
                page = root / "report.html"
                if missed.where == "evaluate.min_win_rate" and page.exists():
                    missed.hint += f"; the report: {page}"
                raise
    lines, data = summary_lines(summary, only), summary_data(summary)
    if only is not None and only != STAGES[-1]:
        data["next"] = request.command(STAGES[STAGES.index(only) + 1])
        lines.append(f"next: {data['next']}")
    print_result(mode, lines, data, event="result")
