"""What of a run is done, stale or new under settings that may differ from those it was last worked on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from craft_fast.asking import who_is_asked
from craft_fast.config import OFFICIAL_REWARDS, REWARD_FAMILIES, RewardSettings, Section, Settings
from craft_fast.errors import CraftError
from craft_fast.pipeline import CONFIG_NAME, STAGES, status
from craft_fast.pipeline_keys import InputKeys, output_keys
from craft_fast.store.digest import digest_json
from craft_fast.store.run import MANIFEST_NAME

State = Literal["done", "stale", "running", "new"]


@dataclass(frozen=True)
class Known:
    """What an existing run tells.

    Attributes:
        states: by stage; empty where there is no run.
        acceptance: share of the variants that passed, where some were judged.
        notes: what could not be told.
    """

    states: dict[str, State]
    acceptance: float | None
    notes: tuple[str, ...]


def known_of(root: Path, settings: Settings) -> Known:
    """Read the run in ``root``, if there is one.

    A stage that was done is stale where a setting that it, or a stage before it, depends on has changed. That a file
    or a model behind a setting has other content is found out by the run itself: nothing is hashed here.

    Args:
        root: the run's folder.
        settings: those planned with, ``train.method`` decided.
    """
    if not (root / MANIFEST_NAME).exists():
        return Known({}, None, ())
    rows = {row.name: row for row in status(root)}
    states: dict[str, State] = {name: row.state for name, row in rows.items()}
    passed: Any = rows["filter"].info.get("acceptance", {}).get("all")
    acceptance = float(passed) if passed is not None and rows["filter"].state in ("done", "running") else None
    try:
        before = _saved(root)
    except CraftError as problem:
        return Known(states, acceptance, (f"the run's saved settings cannot be read: {problem.what}",))
    if before is None:
        return Known(states, acceptance, ())
    old, new = settings_by_stage(before), settings_by_stage(settings)
    for name in STAGES:
        if old[name] != new[name] and states[name] in ("done", "running"):
            states[name] = "stale"
    return Known(states, acceptance, ())


def settings_by_stage(settings: Settings) -> dict[str, str]:
    """For each stage, a digest of the settings that its key is made of (``pipeline_keys``), files and models left out.

    The later stages' keys are the pipeline's own, over keys of the earlier ones in which nothing is hashed.
    """
    from craft_fast import pipeline_keys as keys

    def digest(*parts: Any) -> str:
        return digest_json(list(parts))

    def plain(section: Section, *without: str) -> Any:
        return section.model_dump(mode="json", exclude=set(without))

    model = digest(plain(settings.model, "device", "offline"))
    files = [settings.prompts.file, settings.prompts.heldout_file, settings.prompts.vocabulary, settings.expand.file]
    expand = digest(
        settings.seed, files, plain(settings.prompts, *keys._PROMPT_FILES), plain(settings.expand, *keys._TRANSPORT)
    )
    drawn, fitted = expand, None
    if settings.images.folder is not None:
        # As pipeline_keys.own_expand_key: an expander has no part in it.
        content = [settings.images.folder, settings.images.weights, settings.prompts.max_chars]
        size = [settings.generate.height_px, settings.generate.width_px]
        wanted = plain(settings.prompts, "file", "vocabulary")
        expand = digest(settings.seed, wanted, plain(settings.images), size)
        drawn, fitted = digest(settings.seed, content), plain(settings.images, "folder", "weights", "max_enlargement")
    generate = digest(drawn, model, settings.seed, plain(settings.generate, *keys._BUDGET), fitted)
    own = {name: digest(*_of_reward(spec, settings.score.dtype)) for name, spec in settings.rewards.items()}
    judges = {name: own[name] for name, spec in settings.rewards.items() if not spec.held_out}
    score = digest(generate, judges, settings.score.prompt)
    weights = dict(who_is_asked(settings.rewards, settings.filter, settings.train, settings.score).weights)
    budget = [settings.generate.max_images, settings.generate.max_minutes]
    chosen = digest(score, weights, budget, plain(settings.filter), expand)
    inputs = InputKeys(expand, generate, score, chosen, digest("text", model), model, judges, own)
    return {
        **{name: getattr(inputs, name) for name in ("expand", "generate", "score", "filter")},
        **vars(output_keys(settings, inputs, selection="")),
    }


def _of_reward(spec: RewardSettings, dtype: str) -> list[Any]:
    """What of its settings a reward's scores depend on; only networks have a dtype."""
    if spec.kind == "function":
        return [spec.kind, spec.path]
    if spec.kind in (*OFFICIAL_REWARDS, *REWARD_FAMILIES):
        return [spec.kind, spec.path, spec.backend, dtype]
    return [spec.kind, spec.options]


def _saved(root: Path) -> Settings | None:
    from craft_fast.settings_io import load_settings

    file = root / CONFIG_NAME
    return load_settings(config=file) if file.exists() else None
