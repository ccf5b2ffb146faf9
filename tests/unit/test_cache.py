"""The cache: text encoded once, latents verified, what is damaged made again and never zeroed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast import cache as cache_module
from craft_fast.cache import FILES_KIND, LatentsError, build_cache, load_cache
from craft_fast.config import EngineSettings
from craft_fast.errors import ExitCode, IntegrityError
from craft_fast.progress import Silent
from craft_fast.records import Candidate, FileRef, Sample
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.text import encode_prompts
from craft_fast.store import atomic
from craft_fast.store.run import Run, open_run
from craft_fast.tiny.random_model import build_random_sdxl

KEY = "c" * 64
PROMPTS = ["a red circle", "a blue square left of a star", "a red circle"]


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SdxlModel:
    return load_sdxl(build_random_sdxl(tmp_path_factory.mktemp("sdxl")), device="cpu", dtype="float32")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def latents_of(row: int) -> torch.Tensor:
    return torch.full((4, 16, 16), float(row + 1))


@pytest.fixture
def stored(run: Run) -> tuple[list[Sample], list[Candidate]]:
    """Two groups; the first holds candidates 0 and 2, as members 1 and 3."""
    refs = {}
    for group, members in {"g0": {"1": latents_of(0), "3": latents_of(2)}, "g1": {"1": latents_of(1)}}.items():
        path = run.path("candidates", f"{group}.safetensors")
        refs[group] = FileRef(f"candidates/{group}.safetensors", *atomic.write_safetensors(path, members))
    image = FileRef("candidates/x.png", "0" * 64, 1)
    places = [("g0", 1), ("g1", 1), ("g0", 3)]
    candidates = [
        Candidate(f"c{i}", group, member, "base", "rich", 7, refs[group], image)
        for i, (group, member) in enumerate(places)
    ]
    samples = [Sample(f"s{i}", f"c{i}", PROMPTS[i], 0.5 + i) for i in range(3)]
    return samples, candidates


def unused() -> SdxlModel:
    raise AssertionError("the model was loaded without need")


def text_files(run: Run) -> list[Path]:
    return sorted(run.path("cache", KEY[:16]).glob("text-*.safetensors"))


def test_cached_set_is_what_training_needs(run: Run, model: SdxlModel, stored: Any) -> None:
    assert build_cache(run, model, *stored, key=KEY) == 3  # two prompts and the empty one
    cached = load_cache(run, unused, *stored, key=KEY)
    assert torch.equal(cached.latents, torch.stack([latents_of(row) for row in range(3)]))
    assert cached.weights.tolist() == [0.5, 1.5, 2.5]
    assert cached.sample_ids == ("s0", "s1", "s2")
    assert len(cached) == 3
    direct = encode_prompts(model, [*PROMPTS, ""])
    rows = [*cached.prompt_index.tolist(), cached.empty_index]
    assert torch.allclose(cached.prompt_embeds[rows], direct.prompt_embeds, atol=1e-5)
    assert torch.allclose(cached.pooled_prompt_embeds[rows], direct.pooled_prompt_embeds, atol=1e-5)
    assert len(cached.prompt_embeds) == 3


def test_each_prompt_is_encoded_once(run: Run, model: SdxlModel, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def spy(model: SdxlModel, prompts: list[str]) -> Any:
        encoded.extend(prompts)
        return encode_prompts(model, prompts)

    monkeypatch.setattr(cache_module, "encode_prompts", spy)
    build_cache(run, model, *stored, key=KEY)
    assert build_cache(run, model, *stored, key=KEY) == 0
    assert sorted(encoded) == sorted({*PROMPTS, ""})
    assert len(run.manifest.files(FILES_KIND, KEY)) == len(text_files(run)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "nan", "other"])
def test_damaged_text_entry_is_made_again(run: Run, model: SdxlModel, stored: Any, damage: str) -> None:
    build_cache(run, model, *stored, key=KEY)
    before = load_cache(run, unused, *stored, key=KEY)
    contents = {path: path.read_bytes() for path in text_files(run)}
    path = text_files(run)[1]
    data = bytearray(contents[path])
    if damage == "flip":
        data[-3] ^= 0x40
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[:100]))
    elif damage == "remove":
        path.unlink()
    else:  # with a record that agrees with the file
        value = float("nan") if damage == "nan" else 0.0
        tensors = {"prompt_embeds" if damage == "nan" else "zeros": torch.full((32, 64), value)}
        written = atomic.write_safetensors(path, tensors)
        ref = FileRef(path.relative_to(run.root).as_posix(), *written)
        entry_id = path.stem.removeprefix("text-")
        run.manifest.put_files(FILES_KIND, KEY, {entry_id: ref})
    listener = Listener()
    after = load_cache(run, lambda: model, *stored, key=KEY, progress=listener)
    assert torch.equal(after.prompt_embeds, before.prompt_embeds)
    assert torch.equal(after.pooled_prompt_embeds, before.pooled_prompt_embeds)
    assert {path: path.read_bytes() for path in text_files(run)} == contents
    assert len(listener.warnings) == 1
    assert path.name in listener.warnings[0]
    load_cache(run, unused, *stored, key=KEY)


def test_empty_cache_is_built_on_loading(run: Run, model: SdxlModel, stored: Any) -> None:
    cached = load_cache(run, lambda: model, *stored, key=KEY)
    assert cached.prompt_embeds.shape == (3, 32, 64)


# What the file of the first group comes to hold, with a record that agrees with it.
RECORDED = {
    "nan": {"1": latents_of(0), "3": latents_of(2) * float("nan")},
    "member": {"2": latents_of(0)},
    "channels": {"1": torch.zeros(3, 16, 16), "3": torch.zeros(8, 16, 16)},
    "dimensions": {"1": torch.zeros(4, 16), "3": torch.zeros(1, 4, 16, 16)},
    "empty": {"1": torch.zeros(4, 0, 16), "3": torch.zeros(4, 16, 0)},
}


def with_file(run: Run, candidates: list[Candidate], tensors: dict[str, torch.Tensor]) -> list[Candidate]:
    """The first group's file written anew, and its candidates with a record of that."""
    path = run.path("candidates", "g0.safetensors")
    ref = FileRef("candidates/g0.safetensors", *atomic.write_safetensors(path, tensors))
    return [replace(c, latents=ref) if c.prompt_id == "g0" else c for c in candidates]


@pytest.mark.parametrize("damage", ["flip", "remove", "another size", *RECORDED])
def test_latents_that_can_not_be_used_are_named(run: Run, model: SdxlModel, stored: Any, damage: str) -> None:
    samples, candidates = stored
    path = run.path("candidates", "g0.safetensors")
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "remove":
        path.unlink()
    elif damage == "another size":  # with the record of what was there
        atomic.write_safetensors(path, {"1": torch.zeros(4, 8, 16), "3": torch.zeros(4, 8, 16)})
    else:
        candidates = with_file(run, candidates, RECORDED[damage])
    for call in (
        lambda: build_cache(run, model, samples, candidates, key=KEY),
        lambda: load_cache(run, lambda: model, samples, candidates, key=KEY),
    ):
        with pytest.raises(LatentsError) as caught:
            call()
        assert caught.value.prompt_ids == ["g0"]
        assert caught.value.candidate_ids == ["c0", "c2"]
        assert caught.value.exit_code == ExitCode.INTEGRITY
        assert "craft-fast generate" in caught.value.hint


def test_latents_of_several_sizes(run: Run, model: SdxlModel, stored: Any) -> None:
    samples, candidates = stored
    candidates = with_file(run, candidates, {"1": torch.ones(4, 8, 24), "3": torch.ones(4, 24, 8, dtype=torch.float16)})
    build_cache(run, model, samples, candidates, key=KEY)
    latents = load_cache(run, unused, samples, candidates, key=KEY).latents
    assert isinstance(latents, tuple)
    assert [tuple(row.shape) for row in latents] == [(4, 8, 24), (4, 16, 16), (4, 24, 8)]
    assert {row.dtype for row in latents} == {torch.float32}
    assert torch.equal(latents[1], latents_of(1))


@pytest.mark.parametrize("size", [(16, 15), (3, 16)])
def test_a_size_that_the_unet_does_not_take_is_refused(
    run: Run, model: SdxlModel, stored: Any, size: tuple[int, int]
) -> None:
    samples, candidates = stored
    candidates = with_file(run, candidates, {"1": latents_of(0), "3": torch.zeros(4, *size)})
    with pytest.raises(IntegrityError, match="do not fit the UNet") as caught:
        build_cache(run, model, samples, candidates, key=KEY)
    assert not isinstance(caught.value, LatentsError)  # made again they would be the same
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert caught.value.where == "candidate c2"
    assert str([4, *size]) in caught.value.why
    assert "images.bucket_step_px" in caught.value.hint
    assert text_files(run) == []


def test_sample_without_its_candidate(run: Run, model: SdxlModel, stored: Any) -> None:
    samples, candidates = stored
    with pytest.raises(IntegrityError, match="not there") as caught:
        load_cache(run, lambda: model, samples, candidates[:2], key=KEY)
    assert "c2" in caught.value.where


def test_text_encoder_that_gives_nan_is_an_error(
    run: Run, model: SdxlModel, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: SdxlModel, prompts: list[str]) -> Any:
        embeds = encode_prompts(model, prompts)
        embeds.prompt_embeds[0, 0, 0] = float("nan")
        return embeds

    monkeypatch.setattr(cache_module, "encode_prompts", broken)
    with pytest.raises(IntegrityError, match="text encoder"):
        build_cache(run, model, *stored, key=KEY)
    assert text_files(run) == []


def test_only_text_encoders_are_loaded_and_freed_again(run: Run, model: SdxlModel, stored: Any, tmp_path: Path) -> None:
    apart = load_sdxl(model.path, device="cpu", dtype="float32", engine=EngineSettings(resident="never"))
    seen: list[tuple[str, ...]] = []
    apart.use("unet")
    use = apart.use

    def noted(*parts: str) -> None:
        use(*parts)
        seen.append(apart.loaded)

    apart.use = noted  # type: ignore[method-assign]
    assert build_cache(run, apart, *stored, key=KEY) == 3
    assert seen == [("text_encoder", "text_encoder_2")]
    assert apart.loaded == ()
    with open_run(tmp_path / "resident", create=True) as other:
        for candidate in stored[1]:
            atomic.write_bytes(other.path(candidate.latents.path), run.path(candidate.latents.path).read_bytes())
        build_cache(other, model, *stored, key=KEY)
        assert [path.read_bytes() for path in text_files(other)] == [path.read_bytes() for path in text_files(run)]
