"""Generate: every member of every group becomes an image ``x_ij = G(e_ij; z_i)`` (design.md section 1).

A block of groups is cut into fixed chunks; a chunk is denoised together, written, and only then recorded. Chunks
depend on the groups and the batch size alone, never on what is already done, so a resumed run makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from craft_fast.config import GenerateSettings
from craft_fast.progress import Progress, Silent
from craft_fast.records import Candidate, FileRef, Group, Variant
from craft_fast.rng import derive_seed
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.sampling import Drawn, draw
from craft_fast.sdxl.vae import png_bytes
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
        should_stop: asked between chunks; when true, what is done is returned.

    Returns:
        Candidates of ``groups`` in group and member order; all of them unless stopped.
    """
    progress = progress or Silent()
    done = {(row.prompt_id, row.member): row for row in run.manifest.candidates(key) if _files_there(run, row)}
    images = sum(len(group.variants) for group in groups)
    cut: list[str] = []
    with progress.task("generate", images, "images") as task:
        for chunk in chunks(groups, settings.batch_size):
            size = sum(len(group.variants) for group in chunk)
            if not all((v.prompt_id, v.member) in done for group in chunk for v in group.variants):
                if should_stop():
                    break
                rows, truncated = _generate_chunk(run, model, chunk, settings, seed, key)
                cut += truncated
                done.update({(row.prompt_id, row.member): row for row in rows})
            task.advance(size)
    if cut:
        limit = model.tokenizer.model_max_length
        progress.warn(
            f"{len(cut)} prompts are longer than the model's {limit} tokens; their ends are not seen: {cut[0]!r}"
        )
    members = [(v.prompt_id, v.member) for group in groups for v in group.variants]
    return [done[member] for member in members if member in done]


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


def _generate_chunk(
    run: Run, model: SdxlModel, chunk: Sequence[Group], settings: GenerateSettings, seed: int, key: str
) -> tuple[list[Candidate], list[str]]:
    variants = [variant for group in chunk for variant in group.variants]
    seeds = [noise_seed(seed, variant, settings.noise) for variant in variants]
    drawn = draw(model, [variant.text for variant in variants], seeds, settings=settings)
    truncated = [variant.text for variant, is_cut in zip(variants, drawn.truncated, strict=True) if is_cut]
    candidates = _write(run, chunk, seeds, drawn, key)
    run.manifest.put_candidates(key, candidates)
    return candidates, truncated


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
