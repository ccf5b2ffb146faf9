"""Stage keys: what a stage's result depends on, as one digest (design.md section 2).

A key hashes the stage's version, its settings, the keys of its inputs and the digests of the models it uses. What
does not change a result (batch sizes, budgets, how often to save) is left out, so changing it makes nothing stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_fast.asking import who_is_asked
from craft_fast.config import Section, Settings
from craft_fast.pipeline_own import OwnDigests, own_digests
from craft_fast.progress import Progress
from craft_fast.store.digest import digest_json, sha256_file
from craft_fast.store.run import Run, resolve_uri

VERSIONS = {
    "expand": 1,
    "generate": 1,
    "score": 1,
    "filter": 1,
    "cache": 1,
    "train": 3,  # 2: noise by counter; 3: NF4 of rows that are no multiple of its block
    "export": 2,  # 2: kohya's keys, alpha unfolded
    "evaluate": 1,
    "report": 2,  # 2: viewer, every prompt, agreement, advice
}
_BUDGET = {"batch_size", "max_images", "max_minutes"}
_PROMPT_FILES = {"file", "heldout_file", "vocabulary"}
_TRANSPORT = {"file", "api_key_env", "timeout_s", "retries"}
_BOOKKEEPING = {"checkpoint_every", "keep_checkpoints", "sample_every", "sample_prompts", "gradient_checkpointing"}
_SAMPLE_FIELDS = {"weighting", "weight_clip", "weight_temperature", "condition_on"}


@dataclass(frozen=True)
class InputKeys:
    """Keys up to the filter, functions of the settings and of the files and models they name.

    Attributes:
        expand: prompts and their variants.
        generate: candidates.
        score: rewards of candidates.
        filter: verdicts and what the budget decided.
        text: text embeddings.
        model: digest of the model and of how it predicts.
        rewards: reward name to the key under which it scores candidates; held-out rewards are not among them.
        all_rewards: reward name to its own key, in which ``score.dtype`` is.
    """

    expand: str
    generate: str
    score: str
    filter: str
    text: str
    model: str
    rewards: dict[str, str]
    all_rewards: dict[str, str]


@dataclass(frozen=True)
class OutputKeys:
    """Keys from the cache on; they follow from the samples that were accepted."""

    cache: str
    train: str
    export: str
    evaluate: str
    report: str


def expander_cache(run: Run) -> Path:
    """Where an expander keeps what it was answered."""
    return run.path("expansions")


def input_keys(
    settings: Settings, cache_dir: Path, progress: Progress | None = None, own: OwnDigests | None = None
) -> InputKeys:
    """Compute the keys up to the filter.

    Args:
        settings: of the run.
        cache_dir: of the expander, inside the run's folder.
        progress: told of rewards' files that are fetched: their digests are part of the keys.
        own: digests of ``images.folder``, where they are known; else it is read.

    Raises:
        CraftError: a file or a model that the settings name is not there.
    """
    from craft_fast.rewards.composite import score_key
    from craft_fast.rewards.registry import reward_key
    from craft_fast.sdxl.load import model_digest

    own = None if settings.images.folder is None else own or own_digests(settings, progress=progress)
    texts = (_plain(settings.prompts, _PROMPT_FILES), _plain(settings.expand, _TRANSPORT))
    expand = (
        own_expand_key(settings, own)
        if own is not None
        else _key("expand", settings.seed, *texts, _inputs(settings, cache_dir))
    )
    # Other weights of the same pictures make no other candidates.
    drawn = _key("expand", settings.seed, "own", own.content) if own else expand
    wanted = settings.model
    digest = model_digest(wanted.path, config=wanted.config, vae=wanted.vae, offline=wanted.offline)
    told = [wanted.prediction_type, wanted.zero_terminal_snr, wanted.dtype, wanted.vae_dtype]
    model = digest_json([digest, *told])
    fitted = [_plain(settings.images, {"folder", "weights", "max_enlargement"})] if own else []
    generate = _key("generate", settings.seed, drawn, model, _plain(settings.generate, _BUDGET), *fitted)
    reward_keys = {
        name: reward_key(name, spec, offline=settings.model.offline, dtype=settings.score.dtype, progress=progress)
        for name, spec in settings.rewards.items()
    }
    rewards = {
        name: score_key(reward_keys[name], settings.score)
        for name, spec in settings.rewards.items()
        if not spec.held_out
    }
    score = _key("score", generate, rewards)
    # score.lazy is in no key, since it changes no verdict; that r_total may be made of fewer rewards under it is.
    asked = who_is_asked(settings.rewards, settings.filter, settings.train, settings.score)
    weights = dict(asked.weights)
    budget = [settings.generate.max_images, settings.generate.max_minutes]
    chosen = _key("filter", score, weights, budget, _plain(settings.filter), *([expand] if own else []))
    text = _key("cache", model)
    return InputKeys(expand, generate, score, chosen, text, model, rewards, reward_keys)


def output_keys(settings: Settings, keys: InputKeys, selection: str) -> OutputKeys:
    """Compute the keys from the cache on.

    Args:
        settings: of the run.
        keys: those before.
        selection: digest of the accepted candidates and their advantages.
    """
    weighting = {name: value for name, value in _plain(settings.train).items() if name in _SAMPLE_FIELDS}
    cache = _key("cache", keys.filter, keys.text, selection, weighting)
    train = _key("train", settings.seed, cache, keys.model, _plain(settings.train, _BOOKKEEPING))
    export = _key("export", train, _plain(settings.export))
    # What is drawn and judged does not depend on how many files there are, nor on their names.
    result = _key("export", train, _plain(settings.export, {"name", "format", "merged"}))
    evaluate = _key(
        "evaluate",
        settings.evaluate.seed if settings.evaluate.seed is not None else settings.seed,
        result,
        keys.expand,
        keys.all_rewards,
        _plain(settings.evaluate, {"min_win_rate", "seed"}),
        _plain(settings.generate, _BUDGET),
    )
    report = _key("report", evaluate, _plain(settings.report), _plain(settings))
    return OutputKeys(cache, train, export, evaluate, report)


def _key(stage: str, *parts: Any) -> str:
    return digest_json([stage, VERSIONS[stage], *parts])


def _plain(section: Section, exclude: set[str] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=exclude)


def own_expand_key(settings: Settings, own: OwnDigests) -> str:
    """What decides the groups of own pictures, wherever they are, and whether they fit their buckets."""
    share = settings.prompts.heldout_share if own.held_out is None else None
    wanted = [_plain(settings.prompts, {*_PROMPT_FILES, "heldout_share"}), share]
    size = [settings.generate.height_px, settings.generate.width_px]
    fitted = _plain(settings.images, {"folder", "weights"})
    return _key("expand", settings.seed, "own", wanted, own.weights, own.held_out, fitted, size)


def _inputs(settings: Settings, cache_dir: Path) -> dict[str, str]:
    """Digests of the files that decide the groups; a path that moves, with the same content, changes nothing."""
    from craft_fast.expanders import make_expander

    files = (settings.prompts.file, settings.prompts.heldout_file, settings.prompts.vocabulary)
    chosen = settings.model
    expander = make_expander(settings.expand, cache_dir=cache_dir, device=chosen.device, offline=chosen.offline)
    return {
        "expander": expander.key,
        **{str(i): sha256_file(Path(resolve_uri(file))) for i, file in enumerate(files) if file is not None},
    }
