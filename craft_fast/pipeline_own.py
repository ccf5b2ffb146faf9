"""Own pictures in the pipeline: their groups, how they come in, what the run remembers of their folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_fast.config import Settings
from craft_fast.errors import ConfigError, IntegrityError
from craft_fast.filtering import FilterResult
from craft_fast.own_folder import HELD_OUT, OwnFolder, own_root, read_folder
from craft_fast.own_groups import changes, given_selections, given_weights, listing, own_groups, own_members
from craft_fast.progress import Progress
from craft_fast.records import Candidate, Group, Prompt, Variant
from craft_fast.store.digest import sha256_once
from craft_fast.store.run import Run, resolve_uri

if TYPE_CHECKING:
    from craft_fast.pipeline_stream import Work

_META = "own_images"


@dataclass(frozen=True)
class OwnDigests:
    """What of a folder of own pictures decides a run, wherever the folder is.

    Attributes:
        content: pictures and captions.
        weights: the same with the weights.
        held_out: of the file of held-out prompts; None where a share of the captions is held out.
    """

    content: str
    weights: str
    held_out: str | None


def own_digests(settings: Settings, run: Run | None = None, progress: Progress | None = None) -> OwnDigests:
    """Digests of the folder as it is now; of a folder that cannot be reached, those that the run remembers.

    Args:
        settings: of the run.
        run: whose copies of the pictures do where the folder itself is not there any more.
        progress: counts what is hashed.

    Raises:
        ConfigError: there is no such folder, and the run has no copy of it.
    """
    try:
        folder = read_folder(settings.images, settings.prompts.max_chars, progress=progress)
    except ConfigError:
        if run is None or not _unreachable(run, settings):
            raise
        if progress is not None:
            progress.warn(f"{settings.images.folder} is not there; the run goes on from its own copies of the pictures")
        return OwnDigests(**_remembered(run)["digests"])
    found = _digests(settings, folder)
    known = _remembered(run) if run is not None else {}
    if run is not None and known.get("digests") == asdict(found) and known["of"] != _of(settings):
        # The same content elsewhere makes nothing stale, but from now on that is where it is.
        run.manifest.set_meta(_META, json.dumps(known | {"of": _of(settings)}, ensure_ascii=False))
    return found


def _digests(settings: Settings, folder: OwnFolder) -> OwnDigests:
    file = held_out_file(settings, folder.root)
    held_out = sha256_once(resolve_uri(file)) if file is not None else None
    return OwnDigests(folder.content, folder.digest, held_out)


def _of(settings: Settings) -> list[Any]:
    """What the remembered digests depend on besides the folder's content."""
    return [settings.images.folder, settings.images.weights, settings.prompts.max_chars, settings.prompts.heldout_file]


def _unreachable(run: Run, settings: Settings) -> bool:
    """Whether the folder is not there, and the run has copies of what was in it."""
    return not Path(settings.images.folder or "").is_dir() and _remembered(run).get("of") == _of(settings)


def _remembered(run: Run) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(run.manifest.get_meta(_META) or "{}")
    return known


def held_out_file(settings: Settings, root: Path) -> str | None:
    """The file of held-out prompts: the one that is set, else the one that came with a dataset."""
    if settings.prompts.heldout_file is not None:
        return settings.prompts.heldout_file
    return str(root / HELD_OUT) if (root / HELD_OUT).is_file() else None


# ---- groups


def expand_own(work: Work) -> dict[str, Any]:
    """Look at all own pictures, and make the run's groups of them.

    Raises:
        IntegrityError, ConfigError: pictures that cannot be taken, all at once; nothing was done then.
    """
    from craft_fast.own_images import check_pictures
    from craft_fast.pipeline_keys import own_expand_key

    settings, manifest = work.settings, work.run.manifest
    if _unreachable(work.run, settings) and (kept := manifest.groups(work.keys.expand)):
        return _info(kept, len(manifest.groups(work.keys.expand, "heldout")))
    folder = read_folder(settings.images, settings.prompts.max_chars, progress=work.progress)
    notes = check_pictures(folder, settings.images, own_sizes(settings), work.progress, work.should_stop)
    work.check_stop()
    digests = _digests(settings, folder)
    if own_expand_key(settings, digests) != work.keys.expand:
        raise IntegrityError(
            "The folder of pictures changed in this moment", where=str(folder.root),
            hint="the same command again takes it as it is then",
        )  # fmt: skip
    train, heldout, more = parted(settings, folder)
    for note in (*folder.notes, *notes, *more):
        work.progress.warn(note)
    before, after = _remembered(work.run).get("listing"), listing(folder)
    if before is not None and (what := changes(before, after)):
        work.progress.info(f"The own pictures changed since the run last saw them: {what}")
    if folder.weighted:
        work.progress.info("Weights came with the pictures: they and the selection are taken as they are")
    with manifest.transaction():
        manifest.put_groups(work.keys.expand, [*train, *(_alone(prompt) for prompt in heldout)])
        remembered = {"of": _of(settings), "digests": asdict(digests), "listing": after}
        manifest.set_meta(_META, json.dumps(remembered, ensure_ascii=False))
    return _info(train, len(heldout))


def _info(train: Sequence[Group], heldout: int) -> dict[str, Any]:
    own = [entry for group in train for entry in own_members(group).values()]
    given = {"weights": "given"} if all(entry["weight"] is not None for entry in own) else {}
    return {"train": len(train), "heldout": heldout, "own_pictures": len(own), **given}


def _alone(prompt: Prompt) -> Group:
    return Group(prompt, (Variant(prompt.prompt_id, 0, prompt.text),))


def parted(settings: Settings, folder: OwnFolder) -> tuple[list[Group], list[Prompt], list[str]]:
    """Groups to train on, held-out prompts, and what a person should know.

    Raises:
        ConfigError: there is nothing to evaluate on.
    """
    from craft_fast.prompts import held_out_prompts, hold_out_share, unknown_words

    prompts, groups = settings.prompts, own_groups(folder)
    notes = [note] if (note := unknown_words(prompts, [group.prompt.text for group in groups])) else []
    file = held_out_file(settings, folder.root)
    if file is not None:
        named = prompts.model_copy(update={"heldout_file": file})
        found = held_out_prompts(named, {group.prompt.prompt_id for group in groups})
        return groups[: prompts.limit], list(found.heldout), [*notes, *found.notes]
    share = 0.0 if folder.weighted else prompts.heldout_share
    _, held = hold_out_share([group.prompt for group in groups], share)
    if not held:
        why = "all captions are trained on, as their weights say" if folder.weighted else "no caption is held out"
        raise ConfigError(
            "Own pictures need held-out prompts for the evaluation", where="prompts.heldout_file", why=why,
            hint="--set prompts.heldout_file=FILE, one prompt a line",
        )  # fmt: skip
    apart = {prompt.prompt_id for prompt in held}
    train = [group for group in groups if group.prompt.prompt_id not in apart]
    lost = sum(len(own_members(group)) for group in groups) - sum(len(own_members(g)) for g in train)
    notes.append(
        f"{len(held)} captions are held out for the evaluation, and their {lost} pictures are not trained on; "
        "--set prompts.heldout_file=FILE keeps them"
    )
    return train[: prompts.limit], list(held), notes


def own_sizes(settings: Settings) -> list[tuple[int, int]]:
    """The buckets of a run."""
    from craft_fast.budget import model_shape
    from craft_fast.own_images import bucket_sizes, side_multiple

    shape = model_shape(settings)
    return bucket_sizes(settings.images, settings.generate, side_multiple(shape.unet, shape.vae_scale_factor))


# ---- candidates, verdicts


def bring_in_block(work: Work, block: Sequence[Group]) -> None:
    """Encode the own pictures of a block."""
    from craft_fast.own_images import bring_in

    bring_in(
        work.run, work.bench.model(), own_root(work.settings.images), block, own_sizes(work.settings),
        key=work.keys.generate, progress=work.progress, should_stop=work.should_stop,
        concessions=work.bench.concessions(),
    )  # fmt: skip
    work.check_stop()


def given_result(groups: Sequence[Group], rows: Sequence[Candidate]) -> FilterResult:
    """The filter's result where verdicts came with own pictures: no reward was asked, and none can be loosened."""
    found = tuple(given_selections(groups, rows))
    ids = tuple(row.candidate_id for row in found)
    return FilterResult(found, ids, len(ids), len(ids), {"all": 1.0}, False, {})


def own_weights(work: Work, candidates: Sequence[Candidate]) -> dict[str, float] | None:
    """Weights that came with own pictures, by candidate; None where the advantage makes them."""
    row = work.run.manifest.stage("expand")
    if row is None or row.info.get("weights") != "given":
        return None
    return given_weights(work.run.manifest.groups(work.keys.expand, "train"), candidates)
