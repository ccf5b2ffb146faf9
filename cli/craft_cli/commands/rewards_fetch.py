"""``craft-fast rewards fetch``: the files of published reward models onto this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_fast.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from craft_fast.rewards.catalog import Asset, Official

HELP = opt.help_text(
    "Fetch the files of reward models.",
    "Files go to the shelf ($CRAFT_FAST_REWARDS, or the user's cache folder), one copy for all models that share it; "
    "what the hub's cache has is not fetched again. A download that was broken off goes on where it was, and each file "
    "is checked by its sha256. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxies' variables are obeyed. Without a "
    "network, --offline says exactly which file to put where.",
    examples=(
        "craft-fast rewards fetch hpsv2.1 pickscore aesthetic-v2",
        "craft-fast rewards fetch --all --dry-run",
        "craft-fast rewards fetch image-reward --offline",
    ),
)
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", autocompletion=opt.complete_rewards, help="Models, as rewards list has them."),
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list what would be fetched, and to where.")]


def fetch(
    names: Names = None,
    everything: All = False,
    offline: opt.Offline = None,
    dry_run: DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch what is missing, check what is there."""
    from craft_fast.rewards import fetching, shelf

    mode = choose_mode(as_json=as_json, quiet=quiet)
    officials = chosen(names or [], everything=everything)
    have = {official.name: shelf.find(official) for official in officials}
    missing = list({asset.key: asset for found in have.values() for asset in found.missing}.values())
    if dry_run:
        print_result(mode, plan_lines(missing), result(officials, missing, fetched=False), event="result")
        return
    for found in have.values():
        shelf.refuse(found.problems)
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            try:
                if missing and not (offline or fetching.is_offline()):
                    sink.stage("fetch", 1, 1)
                fetching.fetch(missing, progress=sink, offline=bool(offline), should_stop=stop)
                # What came was checked as it came.
                for official in officials:
                    shelf.verify(official, have[official.name])
            except Interrupted as stopped:
                raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped
    lines = [
        f"{official.name}: {path}" for official in officials for _, path in shelf.pairs(official, shelf.find(official))
    ]
    print_result(mode, lines, result(officials, missing, fetched=True), event="result")


def chosen(names: list[str], *, everything: bool) -> list[Official]:
    """The models that were named, each once.

    Raises:
        UsageError: an unknown name, none at all, or names beside ``--all``.
    """
    from craft_fast.rewards.catalog import OFFICIALS, get

    if bool(names) == everything:
        raise UsageError(
            "No reward model is named" if not names else "--all and names exclude each other",
            why=f"known are {', '.join(OFFICIALS)}",
            hint="craft-fast rewards fetch NAME..., or craft-fast rewards fetch --all",
        )
    return list(OFFICIALS.values()) if everything else [get(name) for name in dict.fromkeys(names)]


def plan_lines(missing: list[Asset]) -> list[str]:
    """What would be fetched, for a person."""
    from craft_fast.rewards import fetching, shelf

    if not missing:
        return ["nothing is missing"]
    lines = []
    for asset in missing:
        lines += [
            f"{'' if asset.exact else '~'}{shelf.size_text(asset.size)}  {asset.why}",
            f"  from {fetching.address(asset)}",
            f"  to   {shelf.place(asset)}",
        ]
    total = shelf.size_text(sum(asset.size for asset in missing))
    return [*lines, f"{len(missing)} {'file' if len(missing) == 1 else 'files'}, about {total}; nothing was fetched"]


def result(officials: list[Official], missing: list[Asset], *, fetched: bool) -> dict[str, Any]:
    """The same for a script; ``files`` are those that came, or would come."""
    from craft_fast.rewards import fetching, shelf

    files = [
        {
            "file": asset.name,
            "url": fetching.address(asset),
            "path": str(shelf.place(asset)),
            "bytes": shelf.place(asset).stat().st_size if fetched else asset.size,
            "sha256": asset.sha256,
        }
        for asset in missing
    ]
    return {"rewards": [one.name for one in officials], "fetched": fetched, "shelf": str(shelf.shelf()), "files": files}
