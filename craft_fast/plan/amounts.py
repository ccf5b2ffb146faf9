"""How many images, samples and bytes on disk a run comes to, and how long each stage takes by what a probe measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from craft_fast.config import Settings
from craft_fast.errors import CraftError
from craft_fast.plan.judges import to_fetch
from craft_fast.plan.stages import Costs
from craft_fast.sdxl import costs
from craft_fast.sdxl.costs_parts import vae_cost

if TYPE_CHECKING:
    from craft_fast.probe import Probe
    from craft_fast.rewards.catalog import Asset

# Share of variants that pass the filter, where no run has measured it. ASSUMED: in the tiny world 43 to 55 % pass three
# rewards (docs/lab-book.md); more rewards and real pictures agree less.
ASSUMED_ACCEPTANCE = 0.35
# A PNG of a photograph, fast compression: ESTIMATE. A report holds some pictures as JPEG and PNG: ESTIMATE.
PNG_BYTES_A_PIXEL = 1.8
REPORT_BYTES = 8 * 1024**2
# From a warm disk cache onto the device, checked for NaN on the way: ESTIMATE.
LOAD_BYTES_A_SECOND = 1.5e9


@dataclass(frozen=True)
class Amounts:
    """What a run makes.

    Attributes:
        groups: prompts used, with their variants.
        images: candidates.
        accepted: samples that pass.
        texts: prompts whose embeddings are cached.
        pairs: held-out prompts compared.
        notes: what was assumed.
        own: of the candidates, those that come from ``images.folder`` and are not drawn.
        given: weights and selection come with them, so that nothing is scored.
    """

    groups: int
    images: int
    accepted: int
    texts: int
    pairs: int
    notes: tuple[str, ...]
    own: int = 0
    given: bool = False


def amounts(settings: Settings, *, acceptance: float | None, prompt_count: int | None = None) -> Amounts:
    """Count before anything is made.

    Args:
        settings: of the run.
        acceptance: share of variants that pass, from an earlier part of the run; None: assumed.
        prompt_count: how many training prompts there are, instead of those in ``prompts.file``.

    Raises:
        CraftError: ``images.folder`` is not there or holds no picture.
    """
    if settings.images.folder is not None:
        return _own_amounts(settings, acceptance)
    notes: list[str] = []
    train, held_out = _prompts(settings, notes) if prompt_count is None else (prompt_count, None)
    share = _share(acceptance, notes)
    variants, target = settings.expand.variants, settings.filter.target_samples
    groups = train
    if settings.filter.select == "first":
        block = settings.filter.block_groups
        wanted = math.ceil(math.ceil(target / (variants * share)) / block) * block
        groups = wanted if groups is None else min(groups, wanted)
    if settings.generate.max_images is not None:
        room = settings.generate.max_images // (variants + 1)
        groups = room if groups is None else min(groups, room)
    if groups is None:
        groups = math.ceil(target / (variants * share))
    accepted = min(target, int(groups * variants * share))
    if accepted < target:
        notes.append(f"about {accepted} of {target} samples are to be expected of {groups} prompts")
    if settings.generate.max_minutes is not None:
        notes.append("generate.max_minutes is not counted in: the time is that for all images")
    texts = accepted * (2 if settings.train.condition_on == "both" else 1) + 1
    pairs = settings.evaluate.prompts if held_out is None else min(settings.evaluate.prompts, held_out)
    return Amounts(groups, groups * (variants + 1), accepted, texts, pairs, tuple(notes))


def _share(acceptance: float | None, notes: list[str]) -> float:
    if acceptance is None:
        notes.append(
            f"assumed: {ASSUMED_ACCEPTANCE:.0%} of the variants pass the filter; once the run has judged some, "
            "plan goes by those"
        )
    return max(acceptance if acceptance is not None else ASSUMED_ACCEPTANCE, 0.01)


def _own_amounts(settings: Settings, acceptance: float | None) -> Amounts:
    """Of a run on own pictures: one drawn picture a caption, or none; pictures are listed, not looked at."""
    from craft_fast.own_folder import read_folder
    from craft_fast.pipeline_own import parted

    folder = read_folder(settings.images, settings.prompts.max_chars, hashed=False)
    train, heldout, more = parted(settings, folder)
    notes = [*folder.notes, *more]
    if folder.problems:
        notes.append(f"{len(folder.problems)} of the pictures cannot be taken; craft-fast expand names them all")
    given = folder.weighted
    share = 1.0 if given else _share(acceptance, notes)
    target = math.inf if given else settings.filter.target_samples
    budget = settings.generate.max_images
    groups = own = 0
    first = settings.filter.select == "first"
    for group in train:
        # The stream stops between blocks alone.
        enough = first and own * share >= target and groups % settings.filter.block_groups == 0
        if enough or (budget is not None and not given and groups >= budget):
            break
        groups, own = groups + 1, own + len(group.prompt.meta["own"])
    accepted = own if given else min(settings.filter.target_samples, int(own * share))
    texts = accepted * (2 if settings.train.condition_on == "both" else 1) + 1
    pairs = min(settings.evaluate.prompts, len(heldout))
    return Amounts(groups, own + (0 if given else groups), accepted, texts, pairs, tuple(notes), own, given)


def _prompts(settings: Settings, notes: list[str]) -> tuple[int | None, int | None]:
    from craft_fast.prompts import load_prompts

    try:
        found = load_prompts(settings.prompts)
    except CraftError as problem:
        notes.append(f"the prompts cannot be counted: {problem.what} ({problem.where})")
        return None, None
    return len(found.train), len(found.heldout)


# ---- disk


def fetched(planned: Costs) -> dict[str, list[Asset]]:
    """Files of reward models that are to be fetched first, by the first stage that needs them."""
    first, all_ = (to_fetch(planned.judges(held_out=held_out)) for held_out in (False, True))
    return {"score": list(first.values()), "evaluate": [asset for key, asset in all_.items() if key not in first]}


def disk_bytes(planned: Costs, made: Amounts, *, fetch: bool = True) -> dict[str, int]:
    """What each stage leaves on disk.

    Args:
        planned: formulas of the run.
        made: how much it makes.
        fetch: reward models that are fetched go to the same disk.
    """
    settings, shape = planned.settings, planned.shape
    pixels = planned.size["height_px"] * planned.size["width_px"]
    picture = int(pixels * PNG_BYTES_A_PIXEL)
    latents = pixels // shape.vae_scale_factor**2 * int(shape.unet.get("in_channels", 4)) * 4
    element = planned.dtype.itemsize
    width = int(shape.text_encoder["hidden_size"]) + int(shape.text_encoder_2["hidden_size"])
    pooled = int(shape.text_encoder_2["projection_dim"])
    memory = planned.training()
    full = settings.train.method == "full"
    trained = memory.weights if full else memory.adapter
    # The newest is written beside those that are kept.
    checkpoints = (settings.train.keep_checkpoints + 1) * (trained + memory.optimizer)
    drawn = settings.train.steps // settings.train.sample_every if settings.train.sample_every else 0
    exported = {"float32": 4, "float16": 2, "bfloat16": 2}[settings.export.dtype]
    parameters = trained // (element if full else 4)
    models = {stage: sum(asset.size for asset in assets) if fetch else 0 for stage, assets in fetched(planned).items()}
    return {
        "expand": 0,
        "generate": made.images * (picture + latents),
        "score": models["score"],
        "filter": 0,
        "cache": made.texts * (shape.tokens * width + pooled) * element,
        "train": checkpoints + drawn * settings.train.sample_prompts * picture,
        "export": parameters * exported,
        "evaluate": 2 * made.pairs * picture + models["evaluate"],
        "report": REPORT_BYTES,
    }


# ---- time


def seconds(planned: Costs, made: Amounts, probed: Probe) -> dict[str, float | None]:
    """How long each stage takes; None where nothing here can tell."""
    settings = planned.settings
    image = image_seconds(planned, probed)
    train = settings.train
    drawn = train.steps // train.sample_every * train.sample_prompts if train.sample_every else 0
    step = train.grad_accum_steps * probed.train_s + probed.update_s
    load = _load_seconds(planned)
    text = sum(one.flops for one in planned.text(1)) / probed.rate_flops
    judged = _score_seconds(planned, made, probed, held_out=False)
    judged_all = _score_seconds(planned, made, probed, held_out=True)
    return {
        "expand": 0.0 if settings.expand.kind in ("template", "file") else None,
        "generate": (made.images - made.own) * image + made.own * _encode_seconds(planned, probed) + load["drawing"],
        "score": judged,
        "filter": 0.0,
        "cache": made.texts * text + (0.0 if planned.resident else load["text"]),
        "train": train.steps * step + drawn * image + load["unet"],
        "export": 0.0,
        "evaluate": None if judged_all is None else 2 * made.pairs * image + judged_all + load["drawing"],
        "report": 0.0,
    }


def image_seconds(planned: Costs, probed: Probe) -> float:
    """One image of a full batch: text, denoising, decoding, its file."""
    settings = planned.settings.generate
    low, high = settings.guidance_interval
    share = (high - low) if planned.guided else 0.0
    step = share * probed.denoise_s + (1 - share) * probed.denoise_plain_s
    decode = probed.decode_s
    if decode is None:
        one = planned.decode(tiled=planned.tiled())
        pixels = planned.size["height_px"] * planned.size["width_px"]
        decode = one.flops / probed.rate_flops / max(1, min(settings.batch_size, 1024**2 // pixels))
    text = sum(one.flops for one in planned.text(1)) / probed.rate_flops
    return settings.num_inference_steps * step / settings.batch_size + decode + text + probed.png_s


def _encode_seconds(planned: Costs, probed: Probe) -> float:
    """One own picture through the VAE's encoder, by its operations, and its file."""
    one = vae_cost(
        planned.shape.vae, **planned.size, dtype_bytes=planned.vae_element, tiled=planned.tiled(), half="encode",
        gpu=planned.gpu,
    )  # fmt: skip
    return one.flops / probed.rate_flops + probed.png_s


def _score_seconds(planned: Costs, made: Amounts, probed: Probe, *, held_out: bool) -> float | None:
    """All candidates through the judges, or all pairs with ``held_out``; networks that do not stay are read each block.

    Texts are encoded once for all pictures of a prompt, which is little beside the pictures.
    """
    found = planned.judges(held_out=held_out)
    known = [judge for judge in found.values() if judge is not None]
    if len(known) < len(found) or planned.plugins:
        return None
    if made.given and not held_out:
        return 0.0
    images = 2 * made.pairs if held_out else made.images
    blocks = 1
    if not (planned.resident or held_out):
        blocks = math.ceil(made.groups / planned.settings.filter.block_groups)
    read = blocks * sum(judge.stored_bytes for judge in known) / LOAD_BYTES_A_SECOND
    return read + images * sum(judge.need.image_gflop for judge in known) * 1e9 / probed.rate_flops


def _load_seconds(planned: Costs) -> dict[str, float]:
    """Reading models from disk; those that stay are read once, in the first stage that draws."""
    # What is quantised is read dense.
    unet, text = planned.dense_unet_weights(), planned.text_weights()
    vae = planned.decode(tiled=True).weight_bytes
    parts = {"drawing": unet + text + vae, "text": text, "unet": unet}
    return {name: size / LOAD_BYTES_A_SECOND for name, size in parts.items()}


def recompute_factor(planned: Costs) -> float:
    """Time of a training step that recomputes everything, against one that recomputes nothing, by its operations."""
    options = planned.training_options()
    batch = options.pop("micro_batch")
    for name in ("grad_accum_steps", "gpu"):
        options.pop(name)
    setup = costs.unet_setup(batch=batch, workspaces=False, **options)
    with_it, without = costs.step_flops(planned.shape.unet, setup=setup, kept=())
    return with_it / without
