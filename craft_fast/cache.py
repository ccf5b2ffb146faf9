"""What training reads again and again, made once: text embeddings, and links to the candidates' own latents.

Candidates keep their final latents, so training never needs the VAE; here they are only verified. Every prompt is
encoded once, alone, so that an entry that is damaged later comes back with the same bytes.

Shapes: N samples, P distinct prompts (the empty one among them), T tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.progress import Progress, Silent
from craft_fast.records import Candidate, FileRef, Sample
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.text import encode_prompts
from craft_fast.store import atomic
from craft_fast.store.digest import digest_json
from craft_fast.store.run import Run
from craft_fast.store.safe_load import load_safetensors

FILES_KIND = "text"
_BLOCK = 64
_CHANNELS = 4
_ENTRY = {"prompt_embeds": 2, "pooled_prompt_embeds": 1}


class LatentsError(IntegrityError):
    """Latents of candidates that can not be used; they must be generated again.

    Attributes:
        candidate_ids: whose latents are missing, altered or not finite.
        prompt_ids: the groups they belong to, each once.
    """

    def __init__(self, bad: Sequence[tuple[Candidate, IntegrityError]]) -> None:
        first, error = bad[0]
        super().__init__(
            f"The latents of {len(bad)} training samples can not be used.",
            where=error.where or first.latents.path,
            why=f"{error.what} {error.why}".strip(),
            hint="Type `craft-fast generate` again: the damaged groups, and only those, are made again.",
        )
        self.candidate_ids = [candidate.candidate_id for candidate, _ in bad]
        self.prompt_ids = list(dict.fromkeys(candidate.prompt_id for candidate, _ in bad))


@dataclass(frozen=True)
class CachedSet:
    """All that training reads, on the CPU.

    Attributes:
        latents: UNet space, float32 [N, 4, h, w]; N of [4, h, w] where samples are of several sizes.
        prompt_embeds: [P, T, D].
        pooled_prompt_embeds: [P, D2].
        prompt_index: int64 [N], each sample's row in the two above.
        empty_index: row of the empty prompt, for prompt dropout.
        weights: float32 [N], as the filter made them.
        sample_ids: N ids, in order.
    """

    latents: Tensor | tuple[Tensor, ...]
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    prompt_index: Tensor
    empty_index: int
    weights: Tensor
    sample_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sample_ids)


def build_cache(
    run: Run,
    model: SdxlModel,
    samples: Sequence[Sample],
    candidates: Sequence[Candidate],
    *,
    key: str,
    progress: Progress | None = None,
) -> int:
    """Encode every prompt that has no good entry yet, and verify the latents of every sample.

    Args:
        run: the open run.
        model: its text encoders are used.
        samples: training samples; each names a candidate.
        candidates: at least those that the samples name.
        key: the cache stage's key.
        progress: told about entries that had to be made again.

    Returns:
        How many prompts were encoded now.

    Raises:
        LatentsError: latents that can not be used.
        IntegrityError: latents of a size that the UNet does not take, or a sample without its candidate.
    """
    progress = progress or Silent()
    _check_sizes(model, samples, _read_latents(run, samples, candidates))
    _, made = _text_entries(run, lambda: model, _prompts(samples), key, progress)
    return made


def load_cache(
    run: Run,
    model_factory: Callable[[], SdxlModel],
    samples: Sequence[Sample],
    candidates: Sequence[Candidate],
    *,
    key: str,
    progress: Progress | None = None,
) -> CachedSet:
    """Read what ``build_cache`` made; a text entry that is missing or damaged is made again, never zeroed.

    Args:
        run: the open run.
        model_factory: called only when a prompt must be encoded.
        samples: training samples, in training order.
        candidates: at least those that the samples name.
        key: the cache stage's key.
        progress: told about entries that had to be made again.

    Raises:
        LatentsError: latents that can not be used.
    """
    progress = progress or Silent()
    latents = _read_latents(run, samples, candidates)
    prompts = _prompts(samples)
    entries, _ = _text_entries(run, model_factory, prompts, key, progress)
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    return CachedSet(
        latents=latents,
        prompt_embeds=torch.stack([entries[prompt]["prompt_embeds"] for prompt in prompts]),
        pooled_prompt_embeds=torch.stack([entries[prompt]["pooled_prompt_embeds"] for prompt in prompts]),
        prompt_index=torch.tensor([row_of[sample.prompt] for sample in samples], dtype=torch.int64),
        empty_index=row_of[""],
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def _prompts(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys([*(sample.prompt for sample in samples), ""]))


def _read_latents(run: Run, samples: Sequence[Sample], candidates: Sequence[Candidate]) -> Tensor | tuple[Tensor, ...]:
    by_id = {candidate.candidate_id: candidate for candidate in candidates}
    files: dict[FileRef, dict[str, Tensor] | IntegrityError] = {}
    rows: list[Tensor] = []
    bad: dict[str, tuple[Candidate, IntegrityError]] = {}
    for sample in samples:
        if sample.candidate_id not in by_id:
            raise IntegrityError(
                "A training sample names a candidate that is not there.",
                where=f"sample {sample.sample_id}, candidate {sample.candidate_id}",
                hint="Type `craft-fast filter`: it chooses the samples again.",
            )
        candidate = by_id[sample.candidate_id]
        found = files.get(candidate.latents)
        if found is None:
            found = files[candidate.latents] = _read(run, candidate.latents)
        row = found if isinstance(found, IntegrityError) else found.get(str(candidate.member))
        if isinstance(row, Tensor) and row.ndim == 3 and len(row) == _CHANNELS and row.numel():
            rows.append(row.to(torch.float32))
            continue
        bad[candidate.candidate_id] = (candidate, row if isinstance(row, IntegrityError) else _unfit(candidate, row))
    if bad:
        raise LatentsError(list(bad.values()))
    one_size = len({row.shape for row in rows}) == 1
    return torch.stack(rows) if one_size else tuple(rows)


def _unfit(candidate: Candidate, row: Tensor | None) -> IntegrityError:
    """What to say of a candidate's tensor that is not there or no latents."""
    what = "A tensor is missing." if row is None else "A tensor has a shape that latents do not have."
    why = f"no key {candidate.member}" if row is None else f"key {candidate.member} is {list(row.shape)}, no [4, h, w]"
    return IntegrityError(what, where=candidate.latents.path, why=why)


def _check_sizes(model: SdxlModel, samples: Sequence[Sample], latents: Tensor | tuple[Tensor, ...]) -> None:
    """Refuse sizes that can not be halved as often as the UNet halves them; what it draws itself never has one."""
    step = 2 ** (len(model.unet_config.block_out_channels) - 1)
    for sample, row in zip(samples, latents, strict=True):
        height, width = row.shape[-2:]
        if height % step or width % step:
            step_px = step * model.vae_scale_factor
            raise IntegrityError(
                "The latents of a training sample do not fit the UNet.",
                where=f"candidate {sample.candidate_id}",
                why=f"found [4, {height}, {width}]; both sides must be multiples of {step}",
                hint=f"Set images.bucket_step_px to a multiple of {step_px}, then type `craft-fast run` again.",
            )


def _read(run: Run, ref: FileRef) -> dict[str, Tensor] | IntegrityError:
    try:
        return load_safetensors(run.path(ref.path), expect_sha256=ref.sha256)
    except IntegrityError as error:
        return error


def _text_entries(
    run: Run, model_factory: Callable[[], SdxlModel], prompts: Sequence[str], key: str, progress: Progress
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The entry of each prompt, and how many had to be encoded."""
    known = run.manifest.files(FILES_KIND, key)
    entries: dict[str, dict[str, Tensor]] = {}
    damaged = 0
    for prompt in prompts:
        ref = known.get(_entry_id(prompt))
        found = _read_entry(run, ref) if ref else None
        if isinstance(found, IntegrityError):
            damaged += 1
            progress.warn(f"Text cache entry rebuilt: {found.where}: {found.what} {found.why}".rstrip())
        elif found is not None:
            entries[prompt] = found
    missing = [prompt for prompt in prompts if prompt not in entries]
    if damaged:
        run.log("cache_rebuilt", entries=damaged)
    if missing:
        entries.update(_encode(run, model_factory(), missing, key, progress))
    return entries, len(missing)


def _read_entry(run: Run, ref: FileRef) -> dict[str, Tensor] | IntegrityError:
    found = _read(run, ref)
    if isinstance(found, IntegrityError) or {name: t.ndim for name, t in found.items()} == _ENTRY:
        return found
    return IntegrityError("A cache entry holds other tensors than it should.", where=ref.path)


def _encode(
    run: Run, model: SdxlModel, prompts: Sequence[str], key: str, progress: Progress
) -> dict[str, dict[str, Tensor]]:
    folder = run.path("cache", key[:16])
    entries: dict[str, dict[str, Tensor]] = {}
    model.use("text_encoder", "text_encoder_2")
    with progress.task("text cache", len(prompts), "prompts") as task:
        for start in range(0, len(prompts), _BLOCK):
            refs: dict[str, FileRef] = {}
            with atomic.batch(folder):
                for prompt in prompts[start : start + _BLOCK]:
                    entries[prompt] = _encode_one(model, prompt)
                    refs[_entry_id(prompt)] = _write(run, folder, prompt, entries[prompt])
            run.manifest.put_files(FILES_KIND, key, refs)
            task.advance(len(refs))
    model.rest()  # what comes next is training, which needs another part
    return entries


def _encode_one(model: SdxlModel, prompt: str) -> dict[str, Tensor]:
    embeds = encode_prompts(model, [prompt])
    entry = {"prompt_embeds": embeds.prompt_embeds[0], "pooled_prompt_embeds": embeds.pooled_prompt_embeds[0]}
    if not all(bool(torch.isfinite(value).all()) for value in entry.values()):
        raise IntegrityError(
            "A text encoder gives values that are not finite.",
            where=f"{model.path}, prompt {prompt[:80]!r}",
            hint="Set model.dtype to bfloat16 or float32, or check the model's files.",
        )
    return {name: value.to("cpu", copy=True) for name, value in entry.items()}


def _write(run: Run, folder: Path, prompt: str, entry: Mapping[str, Tensor]) -> FileRef:
    path = folder / f"text-{_entry_id(prompt)}.safetensors"
    sha256, size = atomic.write_safetensors(path, entry, {"prompt": prompt})
    return FileRef(path.relative_to(run.root).as_posix(), sha256, size)


def _entry_id(prompt: str) -> str:
    return digest_json(prompt)[:32]
