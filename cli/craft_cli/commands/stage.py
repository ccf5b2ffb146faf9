"""What the stages from ``score`` on share: one command function, made once for each."""

from __future__ import annotations

from collections.abc import Callable

from craft_cli import options as opt
from craft_cli.execute import execute
from craft_cli.request import Request


def stage_command(stage: str) -> Callable[..., None]:
    """A command that runs one stage on the results of the earlier ones."""

    def command(
        name: opt.Name = None,
        config: opt.Config = None,
        preset: opt.Preset = None,
        overrides: opt.Set = None,
        runs: opt.Runs = opt.DEFAULT_RUNS,
        as_json: opt.Json = False,
        quiet: opt.Quiet = False,
    ) -> None:
        request = Request(name, runs, config, preset, overrides or ())
        request.existing_root()
        execute(request, as_json=as_json, quiet=quiet, only=stage)

    command.__name__ = stage
    return command
