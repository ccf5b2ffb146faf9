"""Generate: every member of every group becomes an image ``x_ij = G(e_ij; z_i)`` (design.md section 1).

A block of groups is cut into fixed chunks; a chunk is denoised together, written, and only then recorded. Chunks
depend on the groups and the batch size alone, never on what is already done, so a resumed run makes the same bytes.
The prompts of all chunks are encoded first, so that each of the model's parts is needed in one phase of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from craft_fast.config import GenerateSettings
from craft_fast.progress import Progress, Silent
from craft_fast.records import Candidate, FileRef, Group, Variant
from craft_fast.rng import derive_seed
from craft_fast.sdxl.drawing import Drawn, Job, KeptLatents, draw_jobs, encode_jobs
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.text import PromptEmbeds
from craft_fast.sdxl.unet import drawing_unet
from craft_fast.sdxl.vae import Concessions, png_bytes
from craft_fast.store import atomic
from craft_fast.store.digest import digest_json
from craft_fast.store.run import Run

FOLDER = "candidates"


def generate(
    run: Run,
    model: SdxlModel,
    groups: Sequence[Group],
    *,
    settings: GenerateSettings,
    seed: int,
    key: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    concessions: Concessions | None = None,
) -> list[Candidate]:
    """Make the candidates of ``groups`` that the run does not have yet.

    Args:
        run: the open run; gets ``candidates/<group>.safetensors`` with float32 [4, h, w] by member, one PNG each,
            and then the manifest's rows, one transaction a chunk.
        model: the SDXL.
        groups: in order; call with the same groups to resume.
        settings: how to denoise.
        seed: the run's seed.
        key: the generate stage's key.
        progress: told about images done.
        should_stop: asked between chunks; when true, what is denoised by then is finished and returned.
        concessions: to memory and precision, of the whole run.

    Returns:
        Candidates of ``groups`` in group and member order; all of them unless stopped.

    Raises:
        ResourceError: one image does not fit. CraftError: NaN or infinity came out.
    """
    progress, concessions = progress or Silent(), concessions or Concessions()
    done = {(row.prompt_id, row.member): row for row in run.manifest.candidates(key) if _files_there(run, row)}
    missing = [
        chunk
        for chunk in chunks(groups, settings.batch_size)
        if not all((v.prompt_id, v.member) in done for v in _variants(chunk))
    ]
    cut: list[str] = []
    at_once = concessions.images_at_once

    def write(number: int, drawn: Drawn) -> None:
        chunk = missing[number]
        rows = _write(run, chunk, [noise_seed(seed, v, settings.noise) for v in _variants(chunk)], drawn, key)
        run.manifest.put_candidates(key, rows)
        cut.extend(v.text for v, is_cut in zip(_variants(chunk), drawn.truncated, strict=True) if is_cut)
        done.update({(row.prompt_id, row.member): row for row in rows})

    with progress.task("generate", len(_variants(groups)), "images") as task:
        if already := len(_variants(groups)) - sum(len(_variants(chunk)) for chunk in missing):
            task.advance(already)
        if missing and not should_stop():
            jobs, negative = _jobs(model, missing, settings, seed, progress)
            first = iter([False])  # asked already
            draw_jobs(
                model, jobs, negative, settings=settings, done=write, unet=lambda: nullcontext(drawing_unet(model)),
                kept=KeptLatents(run, key), concessions=concessions, progress=progress, task=task,
                should_stop=lambda: next(first, None) is None and should_stop(),
            )  # fmt: skip
    if concessions.images_at_once != at_once:
        run.log("images_at_once", asked=settings.batch_size, used=concessions.images_at_once)
    if cut:
        limit = model.tokenizer.model_max_length
        progress.warn(
            f"{len(cut)} prompts are longer than the model's {limit} tokens; their ends are not seen: {cut[0]!r}"
        )
    members = [(v.prompt_id, v.member) for v in _variants(groups)]
    return [done[member] for member in members if member in done]


def _variants(groups: Sequence[Group]) -> list[Variant]:
    return [variant for group in groups for variant in group.variants]


def _jobs(
    model: SdxlModel, missing: Sequence[Sequence[Group]], settings: GenerateSettings, seed: int, progress: Progress
) -> tuple[list[Job], PromptEmbeds]:
    """A job for each chunk, its text encoded."""
    variants = [_variants(chunk) for chunk in missing]
    texts = [[v.text for v in some] for some in variants]
    embeds, negative = encode_jobs(model, texts, settings.negative_prompt, progress=progress)
    jobs = []
    for some, text in zip(variants, embeds, strict=True):
        seeds = [noise_seed(seed, v, settings.noise) for v in some]
        jobs.append(Job(digest_json([[v.text, s] for v, s in zip(some, seeds, strict=True)]), text, seeds))
    return jobs, negative


def chunks(groups: Sequence[Group], batch_size: int) -> list[list[Group]]:
    """Cut groups, in order, into chunks of at most ``batch_size`` images; a larger group is a chunk of its own."""
    result: list[list[Group]] = []
    room = 0
    for group in groups:
        size = len(group.variants)
        if not result or size > room:
            result.append([])
            room = batch_size
        result[-1].append(group)
        room -= size
    return result


def noise_seed(seed: int, variant: Variant, noise: str) -> int:
    """Seed of a member's initial noise: one for the group when ``noise`` is ``shared``, else one each."""
    if noise == "shared":
        return derive_seed(seed, "generate", variant.prompt_id)
    return derive_seed(seed, "generate", variant.prompt_id, variant.member)


def _write(run: Run, chunk: Sequence[Group], seeds: Sequence[int], drawn: Drawn, key: str) -> list[Candidate]:
    """Write a chunk's files, with one folder fsync, and return their records."""
    rows: list[Candidate] = []
    with atomic.batch(run.path(FOLDER)) as batch:
        for group in chunk:
            first = len(rows)
            name = f"{digest_json([key, group.prompt.prompt_id])[:20]}.safetensors"
            tensors = {str(v.member): drawn.latents[first + i] for i, v in enumerate(group.variants)}
            latents_ref = FileRef(f"{FOLDER}/{name}", *batch.write_safetensors(name, tensors))
            for variant in group.variants:
                row = len(rows)
                identity = [key, variant.prompt_id, variant.member, variant.text]
                candidate_id = digest_json(identity)[:20]
                written = batch.write_bytes(f"{candidate_id}.png", png_bytes(drawn.images[row]))
                image_ref = FileRef(f"{FOLDER}/{candidate_id}.png", *written)
                rows.append(
                    Candidate(
                        candidate_id,
                        variant.prompt_id,
                        variant.member,
                        group.prompt.text,
                        variant.text,
                        seeds[row],
                        latents_ref,
                        image_ref,
                    )
                )
    return rows


def _files_there(run: Run, row: Candidate) -> bool:
    """A cheap look at existence and size; ``craft-fast verify`` and the cache compare content."""
    for ref in (row.latents, row.image):
        path = run.path(ref.path)
        if not path.is_file() or path.stat().st_size != ref.size:
            return False
    return True
