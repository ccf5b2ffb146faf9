"""Candidates: what is made, under which names, and that a broken-off run ends with the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast import rng
from craft_fast.candidates import chunks, generate
from craft_fast.config import GenerateSettings
from craft_fast.progress import Silent, Task
from craft_fast.records import Candidate, Group, Prompt, Variant
from craft_fast.sdxl import drawing
from craft_fast.sdxl.drawing import KeptLatents, draw
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.sampling import Denoiser
from craft_fast.sdxl.text import PromptEmbeds
from craft_fast.sdxl.vae import Concessions, decode_latents
from craft_fast.store.run import Run, open_run, read_log
from craft_fast.store.safe_load import load_safetensors, read_image

SETTINGS = GenerateSettings(num_inference_steps=2, guidance_scale=2.0, batch_size=8)
KEY = "k" * 64


def make_groups(n: int, variants: int = 3) -> list[Group]:
    groups = []
    for i in range(n):
        prompt = Prompt(f"p{i:03d}", f"a red circle {i}")
        texts = [prompt.text, *(f"{prompt.text}, sharp, vivid {j}" for j in range(variants))]
        groups.append(Group(prompt, tuple(Variant(prompt.prompt_id, j, text) for j, text in enumerate(texts))))
    return groups


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def contents(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.path("candidates").iterdir())}


def test_what_is_made(run: Run, sdxl: SdxlModel) -> None:
    groups = make_groups(3)
    rows = generate(run, sdxl, groups, settings=SETTINGS, seed=7, key=KEY)
    assert [(row.prompt_id, row.member) for row in rows] == [(f"p{i:03d}", j) for i in range(3) for j in range(4)]
    assert rows == run.manifest.candidates(KEY)
    assert len({row.candidate_id for row in rows}) == 12
    assert len(contents(run)) == 3 + 12
    for row in rows:
        assert row.base_prompt == rows[4 * (int(row.prompt_id[1:]))].prompt
        assert row.noise_seed == rng.derive_seed(7, "generate", row.prompt_id)
        latents = load_safetensors(run.path(row.latents.path), expect_sha256=row.latents.sha256)
        assert sorted(latents) == ["0", "1", "2", "3"]
        assert latents[str(row.member)].dtype == torch.float32
        image = decode_latents(sdxl, latents[str(row.member)][None])[0]
        assert (image.int() - read_image(run.path(row.image.path)).int()).abs().max() <= 1
        assert run.ref(run.path(row.image.path)) == row.image


def test_noise_is_shared_in_a_group_or_not(run: Run, sdxl: SdxlModel) -> None:
    prompt = Prompt("same", "a star")
    group = Group(prompt, tuple(Variant("same", j, "a star") for j in range(3)))
    shared = generate(run, sdxl, [group], settings=SETTINGS, seed=0, key="shared")
    apart = SETTINGS.model_copy(update={"noise": "independent"})
    independent = generate(run, sdxl, [group], settings=apart, seed=0, key="independent")
    assert len({row.image.sha256 for row in shared}) == 1
    assert len({row.image.sha256 for row in independent}) == 3
    assert len({row.noise_seed for row in independent}) == 3


def test_chunks_depend_on_groups_and_batch_alone() -> None:
    sizes = [[len(group.variants) for group in chunk] for chunk in chunks(make_groups(5), 8)]
    assert sizes == [[4, 4], [4, 4], [4]]
    assert [len(chunk) for chunk in chunks(make_groups(3), 3)] == [1, 1, 1]
    mixed = [*make_groups(1, 5), *make_groups(2, 1), *make_groups(1, 0)]
    assert [[len(g.variants) for g in c] for c in chunks(mixed, 8)] == [[6, 2], [2, 1]]
    assert chunks([], 8) == []


def test_a_group_larger_than_the_batch_is_made_in_pieces(run: Run, sdxl: SdxlModel) -> None:
    batches: list[int] = []
    hook = sdxl.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    small = SETTINGS.model_copy(update={"batch_size": 3})
    try:
        rows = generate(run, sdxl, make_groups(1, 6), settings=small, seed=0, key=KEY)
    finally:
        hook.remove()
    assert len(rows) == 7
    assert max(batches) == 6  # three images, doubled by guidance


def drop_a_row(run: Run, rows: list[Candidate]) -> None:
    run.manifest.drop_candidates(KEY, [rows[5].prompt_id])


def drop_everything(run: Run, rows: list[Candidate]) -> None:
    run.manifest.drop_candidates(KEY, {row.prompt_id for row in rows})


def remove_an_image(run: Run, rows: list[Candidate]) -> None:
    run.path(rows[6].image.path).unlink()


def remove_latents_and_row(run: Run, rows: list[Candidate]) -> None:
    run.path(rows[0].latents.path).unlink()
    run.manifest.drop_candidates(KEY, [rows[0].prompt_id])


def cut_a_file_short(run: Run, rows: list[Candidate]) -> None:
    path = run.path(rows[9].latents.path)
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    "damage", [drop_a_row, drop_everything, remove_an_image, remove_latents_and_row, cut_a_file_short]
)
def test_resuming_makes_the_same_bytes(
    run: Run, sdxl: SdxlModel, damage: Callable[[Run, list[Candidate]], None]
) -> None:
    groups = make_groups(5)
    rows = generate(run, sdxl, groups, settings=SETTINGS, seed=1, key=KEY)
    before = contents(run)
    damage(run, rows)
    assert generate(run, sdxl, groups, settings=SETTINGS, seed=1, key=KEY) == rows
    assert contents(run) == before
    assert sorted(run.manifest.candidates(KEY), key=lambda row: row.candidate_id) == sorted(
        rows, key=lambda row: row.candidate_id
    )


def test_done_work_is_not_done_again(run: Run, sdxl: SdxlModel) -> None:
    groups = make_groups(4)
    generate(run, sdxl, groups[:2], settings=SETTINGS, seed=1, key=KEY)
    forwards: list[int] = []
    hook = sdxl.unet.register_forward_pre_hook(lambda module, args: forwards.append(args[0].shape[0]))
    try:
        generate(run, sdxl, groups[:2], settings=SETTINGS, seed=1, key=KEY)
        assert forwards == []
        generate(run, sdxl, groups, settings=SETTINGS, seed=1, key=KEY)
        assert forwards == [16, 16]
    finally:
        hook.remove()


def test_a_stop_between_chunks_keeps_what_is_done(run: Run, sdxl: SdxlModel) -> None:
    groups = make_groups(6)
    answers = iter([False, False, True])
    rows = generate(run, sdxl, groups, settings=SETTINGS, seed=1, key=KEY, should_stop=lambda: next(answers))
    assert [row.prompt_id for row in rows[::4]] == ["p000", "p001", "p002", "p003"]
    assert run.manifest.candidates(KEY) == rows
    assert len(generate(run, sdxl, groups, settings=SETTINGS, seed=1, key=KEY)) == 24


def test_keys_and_seeds_make_other_candidates(run: Run, sdxl: SdxlModel) -> None:
    groups = make_groups(1)
    a = generate(run, sdxl, groups, settings=SETTINGS, seed=1, key="a")
    b = generate(run, sdxl, groups, settings=SETTINGS, seed=2, key="b")
    assert {row.candidate_id for row in a}.isdisjoint(row.candidate_id for row in b)
    assert {row.image.path for row in a}.isdisjoint(row.image.path for row in b)
    assert a[0].image.sha256 != b[0].image.sha256


class Listening(Silent):
    """Keeps warnings and counts."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.labels: list[str] = []
        self.rates: list[float] = []
        self.total: int | None = None
        self.done = 0

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    @contextmanager
    def task(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        self.total = total
        self.labels.append(label)
        yield self

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.done += n
        self.rates += [value for name, value in metrics.items() if name == "images_per_s"]


def test_progress_and_prompts_that_are_too_long(run: Run, sdxl: SdxlModel) -> None:
    progress = Listening()
    prompt = Prompt("long", "star " * 40)
    groups = [*make_groups(2), Group(prompt, (Variant("long", 0, prompt.text),))]
    generate(run, sdxl, groups, settings=SETTINGS, seed=0, key=KEY, progress=progress)
    assert (progress.done, progress.total) == (9, 9)
    assert progress.labels == ["generate"]
    assert len(progress.rates) == 2
    assert all(rate > 0 for rate in progress.rates)
    assert len(progress.warnings) == 1
    assert "32 tokens" in progress.warnings[0]


def test_drawing_is_the_same_for_any_unet_passed(sdxl: SdxlModel) -> None:
    a: Any = draw(sdxl, ["a star", "a heart"], [1, 2], settings=SETTINGS)
    b: Any = draw(sdxl, ["a star", "a heart"], [1, 2], settings=SETTINGS, unet=sdxl.unet)
    assert torch.equal(a.latents, b.latents)
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.latents[0], a.latents[1])


# ---- phases


class Uses:
    """Notes the phases of a model, and what is denoised and decoded in them."""

    def __init__(self, model: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        use, rest = model.use, model.rest

        def noted(*parts: str) -> None:
            use(*parts)
            self.seen.append("+".join(model.loaded))

        def rested() -> None:
            rest()
            self.seen.append("+".join(model.loaded))

        monkeypatch.setattr(model, "use", noted)
        monkeypatch.setattr(model, "rest", rested)

    @property
    def phases(self) -> list[str]:
        return [after for before, after in zip(["", *self.seen], self.seen, strict=False) if after != before]


def test_phases_give_the_same_bytes(
    run: Run, sdxl: SdxlModel, apart: SdxlModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(5)
    rows = generate(run, sdxl, groups, settings=SETTINGS, seed=1, key=KEY)
    uses, progress = Uses(apart, monkeypatch), Listening()
    with open_run(tmp_path / "apart", create=True) as other:
        assert generate(other, apart, groups, settings=SETTINGS, seed=1, key=KEY, progress=progress) == rows
        assert contents(other) == contents(run)
        assert list(other.path(drawing.FOLDER).iterdir()) == []
        assert other.manifest.files(KeptLatents.kind, KEY) == {}
    assert [phase for phase in uses.phases if phase] == ["text_encoder+text_encoder_2", "vae"]  # the UNet by itself
    assert apart.loaded == ()
    assert progress.labels == ["generate", "encode prompts", "decode"]
    assert progress.done == 60  # each image's prompt encoded, its latents denoised, and decoded


class Dying(Exception):
    """Stands for whatever ends a process."""


def test_what_is_denoised_survives_the_process(
    run: Run, apart: SdxlModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(5)
    with open_run(tmp_path / "whole", create=True) as whole:
        expected = generate(whole, apart, groups, settings=SETTINGS, seed=1, key=KEY)
        before = contents(whole)

    def die(*_: Any, **options: Any) -> None:
        raise Dying

    monkeypatch.setattr(drawing, "decode_latents", die)
    with pytest.raises(Dying):
        generate(run, apart, groups, settings=SETTINGS, seed=1, key=KEY)
    monkeypatch.undo()
    assert run.manifest.candidates(KEY) == []
    kept = run.manifest.files(KeptLatents.kind, KEY)
    assert len(kept) == 3
    # One is damaged meanwhile: that chunk, and no other, is denoised again.
    damaged = run.path(next(iter(kept.values())).path)
    data = bytearray(damaged.read_bytes())
    data[-2] ^= 1
    damaged.write_bytes(bytes(data))
    orphan = damaged.with_name("0" * 20 + ".safetensors")
    orphan.write_bytes(b"of a process that died before it removed this")
    denoised: list[int] = []
    draw_of = Denoiser.draw

    def spy(self: Denoiser, embeds: PromptEmbeds, *args: Any) -> torch.Tensor:
        denoised.append(len(embeds))
        return draw_of(self, embeds, *args)

    monkeypatch.setattr(Denoiser, "draw", spy)
    assert generate(run, apart, groups, settings=SETTINGS, seed=1, key=KEY) == expected
    assert denoised == [8]
    assert contents(run) == before
    assert list(run.path(drawing.FOLDER).iterdir()) == []


def test_a_stop_in_phases_finishes_what_is_denoised(run: Run, apart: SdxlModel) -> None:
    groups = make_groups(6)
    answers = iter([False, False, True])
    rows = generate(run, apart, groups, settings=SETTINGS, seed=1, key=KEY, should_stop=lambda: next(answers))
    assert [row.prompt_id for row in rows[::4]] == ["p000", "p001", "p002", "p003"]
    assert run.manifest.candidates(KEY) == rows
    assert len(generate(run, apart, groups, settings=SETTINGS, seed=1, key=KEY)) == 24


def test_a_stop_at_once_loads_nothing(run: Run, apart: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = Uses(apart, monkeypatch)
    assert generate(run, apart, make_groups(2), settings=SETTINGS, seed=1, key=KEY, should_stop=lambda: True) == []
    assert uses.seen == []


def test_the_negative_prompt_is_encoded_once_and_prompts_before_pictures(
    run: Run, sdxl: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    encode = drawing.encode_prompts

    def spy(model: SdxlModel, prompts: list[str]) -> PromptEmbeds:
        events.append(len(prompts))
        return encode(model, prompts)

    monkeypatch.setattr(drawing, "encode_prompts", spy)
    hook = sdxl.unet.register_forward_pre_hook(lambda module, args: events.append("unet"))
    try:
        generate(run, sdxl, make_groups(5), settings=SETTINGS, seed=1, key=KEY)
    finally:
        hook.remove()
    assert events == [8, 8, 4, 1, *["unet"] * 6]


def test_a_unet_that_training_has_changed_makes_no_candidates(run: Run, sdxl_folder: Path, tmp_path: Path) -> None:
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    rows = generate(run, model, make_groups(1), settings=SETTINGS, seed=1, key=KEY)
    model.unet.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.1)
    with open_run(tmp_path / "after", create=True) as after:
        assert generate(after, model, make_groups(1), settings=SETTINGS, seed=1, key=KEY) == rows


def test_halved_batches_are_said_and_logged(run: Run, sdxl: SdxlModel) -> None:
    concessions, progress = Concessions(), Listening()

    def too_many(module: Any, args: Any) -> None:
        if args[0].shape[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = sdxl.unet.register_forward_pre_hook(too_many)
    options: dict[str, Any] = {"settings": SETTINGS, "seed": 1, "progress": progress, "concessions": concessions}
    try:
        assert len(generate(run, sdxl, make_groups(4), key=KEY, **options)) == 16
        assert len(generate(run, sdxl, make_groups(2), key="other", **options)) == 8
    finally:
        hook.remove()
    assert len(progress.warnings) == 1
    assert concessions.images_at_once == 4
    events = [event for event in read_log(run) if event["event"] == "images_at_once"]
    assert [(event["asked"], event["used"]) for event in events] == [(8, 4)]
