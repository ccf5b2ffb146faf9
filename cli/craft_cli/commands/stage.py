"""What the stages from ``score`` on share: one command function, made once for each."""

from __future__ import annotations

from collections.abc import Callable

from craft_cli import options as opt
from craft_cli.execute import execute
from craft_cli.request import Request


def stage_command(stage: str, *, gpu: bool = True) -> Callable[..., None]:
    """A command that runs one stage on the results of the earlier ones.

    Args:
        stage: its name.
        gpu: the stage loads models, so ``--vram`` is an option of it.
    """

    def on_gpu(
        name: opt.Name = None,
        config: opt.Config = None,
        preset: opt.Preset = None,
        overrides: opt.Set = None,
        vram_gib: opt.Vram = None,
        offline: opt.Offline = None,
        runs: opt.Runs = opt.DEFAULT_RUNS,
        as_json: opt.Json = False,
        quiet: opt.Quiet = False,
    ) -> None:
        request = Request(name, runs, config, preset, overrides or (), vram_gib=vram_gib, offline=offline)
        request.existing_root()
        execute(request, as_json=as_json, quiet=quiet, only=stage)

    def elsewhere(
        name: opt.Name = None,
        config: opt.Config = None,
        preset: opt.Preset = None,
        overrides: opt.Set = None,
        offline: opt.Offline = None,
        runs: opt.Runs = opt.DEFAULT_RUNS,
        as_json: opt.Json = False,
        quiet: opt.Quiet = False,
    ) -> None:
        on_gpu(name, config, preset, overrides, None, offline, runs, as_json, quiet)

    command = on_gpu if gpu else elsewhere
    command.__name__ = stage
    return command
