"""Check a run: every file against its record, every record against those it names. Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from craft_fast.errors import IntegrityError
from craft_fast.pipeline_facts import exported_files, pending_files
from craft_fast.records import FileRef
from craft_fast.store.digest import sha256_bytes, sha256_file
from craft_fast.store.run import Run, open_run
from craft_fast.store.safe_load import load_safetensors

_NAMES = {
    "latents": "candidates' latents",
    "image": "candidates' images",
    "text": "text cache",
    "checkpoint": "checkpoints",
    "lora": "LoRA",
}
_REMEDY = "the same craft-fast run makes it anew where it is still needed"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: what it is.
        ok: whether it is as recorded.
        detail: how many, or what is wrong and what to type.
    """

    what: str
    ok: bool
    detail: str


def verify_run(root: Path) -> list[Check]:
    """Re-hash every file that the run's manifest names and compare its records with one another.

    Args:
        root: the run's folder.

    Returns:
        One check for each kind of file and record, and one more for each thing that is wrong.

    Raises:
        UsageError: there is no such run.
        IntegrityError: the manifest itself cannot be read.
    """
    with open_run(Path(root), read_only=True) as run:
        return [*_manifest(run), *_files(run), *_checkpoints(run), *_records(run), *_stages(run)]


def _manifest(run: Run) -> Iterator[Check]:
    problems = run.manifest.problems()
    yield Check("manifest", not problems, "; ".join(problems[:3]) or "SQLite finds no damage")
    config, wanted = run.path("config.yaml"), run.manifest.get_meta("config")
    if wanted is not None:
        found = sha256_bytes(config.read_bytes()) if config.exists() else None
        detail = "as last used" if found == wanted else "changed or missing since the run was last worked on"
        yield Check("config.yaml", found == wanted, detail)


def _files(run: Run) -> Iterator[Check]:
    kinds: dict[str, dict[FileRef, None]] = {}
    for kind, _, _, ref in run.manifest.all_files():
        kinds.setdefault(kind, {})[ref] = None
    row = run.manifest.stage("export")
    if row is not None and row.state == "done":
        # A kill while the scores were put into a file leaves the old one or the new one.
        pending = {ref.path: ref for ref in pending_files(row)}
        for ref in exported_files(row):
            new = pending.get(ref.path)
            taken = new is not None and bool(_problem(run, ref)) and not _problem(run, new)
            kinds.setdefault("lora", {})[new if new is not None and taken else ref] = None
    for kind, refs in kinds.items():
        bad = [Check(ref.path, False, problem) for ref in refs if (problem := _problem(run, ref))]
        what = _NAMES.get(kind, kind.replace("_", " "))
        yield Check(what, not bad, f"{len(refs)} files" + (f", {len(bad)} of them bad" if bad else ""))
        yield from bad


def _problem(run: Run, ref: FileRef) -> str:
    """What is wrong with a file; empty when it is what was written."""
    path = run.path(ref.path)
    if not path.exists():
        return f"missing; {_REMEDY}"
    try:
        if path.suffix == ".safetensors":
            load_safetensors(path, expect_sha256=ref.sha256)
        elif path.is_file() and sha256_file(path) != ref.sha256:
            return f"its content is not what was written; remove it, and {_REMEDY}"
    except IntegrityError as error:
        return f"{error.what}: {error.why}; {_REMEDY}" if error.why else f"{error.what}; {_REMEDY}"
    return ""


def _checkpoints(run: Run) -> Iterator[Check]:
    """Folders that no row names: half-written ones, or copied from elsewhere."""
    folder = run.path("checkpoints")
    if not folder.is_dir():
        return
    named = {Path(ref.path).parent.name for kind, _, _, ref in run.manifest.all_files() if kind == "checkpoint"}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in named)
    if strange:
        yield Check("checkpoint folders", True, f"not recorded, and not used unless complete: {', '.join(strange[:5])}")


def _records(run: Run) -> Iterator[Check]:
    """Every accepted candidate exists, is recorded once, and every sample is an accepted candidate."""
    manifest = run.manifest
    rows = {row.name: row for row in manifest.stages() if row.state == "done"}
    if not {"generate", "filter"} <= rows.keys():
        return
    candidates = {row.candidate_id: row for row in manifest.candidates(rows["generate"].key)}
    selections = manifest.selections(rows["filter"].key)
    accepted = {row.candidate_id for row in selections if row.accepted}
    lost = sorted({row.candidate_id for row in selections} - candidates.keys())
    yield Check("verdicts", not lost, f"{len(lost)} of candidates that are lost" if lost else f"{len(selections)}")
    counted = int(rows["filter"].info.get("accepted", -1))
    same = counted == len(accepted)
    yield Check("accepted", same, f"{len(accepted)}" if same else f"{len(accepted)} rows, {counted} recorded")
    if "cache" in rows:
        samples = manifest.samples(rows["cache"].key)
        strange = [row.sample_id for row in samples if row.candidate_id not in accepted]
        yield Check("samples", not strange, f"{len(strange)} were never accepted" if strange else f"{len(samples)}")


def _stages(run: Run) -> Iterator[Check]:
    from craft_fast.pipeline import stage_keys

    keys = stage_keys(run)
    rows = run.manifest.stages()
    running = [row.name for row in rows if row.state == "running"]
    stale = [row.name for row in rows if row.state == "done" and row.key != keys.get(row.name)]
    notes = [f"unfinished: {', '.join(running)}"] if running else []
    notes += [f"made under other settings: {', '.join(stale)}"] if stale else []
    # Neither is damage: the same command again finishes or redoes them.
    yield Check("stages", True, "; ".join(notes) or f"{len(rows)} done")
