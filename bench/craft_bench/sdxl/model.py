"""An SDXL with random weights behind the interface that the engine loads models by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from craft_bench.sdxl.problem import SEED, TINY, Size, random_unet, text_configs
from craft_fast.budget import ModelShape
from craft_fast.config import EngineSettings
from craft_fast.sdxl import published
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.source import FolderPart, Source
from craft_fast.store.run import resolve_uri


class RandomParts(FolderPart):
    """Networks of a size with random weights; tokenizers and noise schedule are the packaged model's, SDXL's own.

    Args:
        size: of the networks.
        device: where values are drawn, wherever the network then is.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__(Path(resolve_uri(TINY)))
        self.size, self.device = size, device
        texts = text_configs(size)
        self._configs = {
            "unet": size.unet, "vae": size.vae, "text_encoder": texts["config"], "text_encoder_2": texts["config_2"],
        }  # fmt: skip

    def config(self, part: str) -> dict[str, Any]:
        """The size's own."""
        return {key: value for key, value in self._configs[part].items() if not key.startswith("_")}

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """A UNet or a VAE."""
        if part == "unet":
            return random_unet(self.size, self.device, dtype, wait_on_cpu=device.type == "cpu")
        if part == "vae":
            return published.random_vae(device=device, dtype=dtype, seed=SEED, config=self.size.vae)
        raise ValueError(f"no case encodes text by a whole model, got {part!r}")


def random_model(
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    engine: EngineSettings,
    *,
    vae_dtype: torch.dtype = torch.float32,
) -> SdxlModel:
    """The model; nothing is made before it is used, and with ``engine.resident: always`` nothing is freed."""
    parts = RandomParts(size, device)
    return SdxlModel(
        Source(parts, parts.path), device=device, dtype=dtype, vae_dtype=vae_dtype, engine=engine
    )  # fmt: skip


def shape_of(size: Size) -> ModelShape:
    """The same for formulas."""
    texts = text_configs(size)
    return ModelShape(size.unet, size.vae, texts["config"], texts["config_2"])
