"""Sample pictures during training: fixed seeds, and training as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_fast import rng
from craft_fast.config import GenerateSettings, ModelSettings, Settings
from craft_fast.errors import ResourceError
from craft_fast.evaluate import SampleDrawer
from craft_fast.qlora.lora import add_lora
from craft_fast.qlora.nf4 import quantize_nf4
from craft_fast.records import Prompt
from craft_fast.sdxl import drawing
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.vae import Concessions
from craft_fast.store.run import Run, open_run

GENERATE = GenerateSettings(num_inference_steps=3, guidance_scale=2.0, batch_size=4)
PROMPTS = [Prompt(f"h{i}", f"a blue star {i}", "heldout") for i in range(2)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def test_sample_pictures_have_fixed_seeds(run: Run, sdxl: SdxlModel, sdxl_folder: Path) -> None:
    settings = Settings(seed=3, model=ModelSettings(path=str(sdxl_folder)), generate=GENERATE)
    draw = SampleDrawer(run, sdxl, PROMPTS[:2], settings)
    draw(100, sdxl.unet)
    draw(200, sdxl.unet)
    files = run.manifest.files("sample", "train")
    assert sorted(files) == ["000100/h0", "000100/h1", "000200/h0", "000200/h1"]
    assert files["000100/h0"].sha256 == files["000200/h0"].sha256
    assert files["000100/h0"].sha256 != files["000100/h1"].sha256
    assert run.ref(run.path("samples", "train", "step-000100", "h0.png")) == files["000100/h0"]
    SampleDrawer(run, sdxl, [], settings)(300, sdxl.unet)
    assert not run.path("samples", "train", "step-000300").exists()


def test_sample_pictures_leave_training_as_it_was(run: Run, sdxl_folder: Path) -> None:
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    settings = Settings(seed=3, model=ModelSettings(path=str(sdxl_folder)), generate=GENERATE)
    quantize_nf4(model.unet, compute_dtype=torch.float32)
    add_lora(model.unet, rank=2, lora_alpha=2.0, target_modules=["to_q"], seed=9)
    with torch.no_grad():
        SampleDrawer(run, model, PROMPTS[:1], settings)(1, model.unet.eval())
    model.unet.train()
    output = model.unet(
        rng.normal((1, 4, 16, 16), 0),
        torch.tensor([5]),
        encoder_hidden_states=rng.normal((1, 32, 64), 1),
        added_cond_kwargs={"text_embeds": rng.normal((1, 32), 2), "time_ids": torch.full((1, 6), 64.0)},
    ).sample
    output.square().mean().backward()
    gradients = [p.grad for p in model.unet.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_sample_pictures_need_the_vae_alone_once_prepared(run: Run, sdxl_folder: Path, apart: SdxlModel) -> None:
    settings = Settings(seed=3, model=ModelSettings(path=str(sdxl_folder)), generate=GENERATE)
    drawer = SampleDrawer(run, apart, PROMPTS[:2], settings)
    drawer.prepare()
    assert apart.loaded == ()
    unet = apart.unet  # as training holds it
    forwards: list[tuple[str, ...]] = []
    hook = unet.register_forward_pre_hook(lambda module, args: forwards.append(apart.loaded))
    try:
        drawer(100, unet)
    finally:
        hook.remove()
    assert set(forwards) == {()}
    assert apart.loaded == ()
    assert not unet.conv_in.weight.is_meta
    with open_run(run.root.parent / "resident", create=True) as other:
        model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
        SampleDrawer(other, model, PROMPTS[:2], settings)(100, model.unet)
        a, b = (opened.manifest.files("sample", "train") for opened in (run, other))
    assert {name: ref.sha256 for name, ref in a.items()} == {name: ref.sha256 for name, ref in b.items()}


def test_a_vae_that_does_not_fit_beside_training_is_gone_afterwards(
    run: Run, sdxl_folder: Path, apart: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(seed=3, model=ModelSettings(path=str(sdxl_folder)), generate=GENERATE)

    def fail(*_: Any, **options: Any) -> Tensor:
        assert apart.loaded == ("vae",)
        raise ResourceError("no room") from torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(drawing, "decode_latents", fail)
    with pytest.raises(torch.OutOfMemoryError):
        SampleDrawer(run, apart, PROMPTS[:2], settings)(100, apart.unet)
    assert apart.loaded == ()


def test_sample_pictures_that_do_not_fit_are_torchs_own_error(run: Run, sdxl: SdxlModel, sdxl_folder: Path) -> None:
    settings = Settings(seed=3, model=ModelSettings(path=str(sdxl_folder)), generate=GENERATE)
    concessions = Concessions()

    def too_many(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = sdxl.unet.register_forward_pre_hook(too_many)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            SampleDrawer(run, sdxl, PROMPTS[:2], settings, concessions)(100, sdxl.unet)
    finally:
        hook.remove()
    # Beside training there is less room than there will be in evaluation: what is learnt here does not hold there.
    assert concessions == Concessions()
