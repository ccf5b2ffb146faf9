"""An SDXL on one device, its parts loaded when they are used: safetensors only, every weight finite.

Where memory is short, parts are there in phases: text encoders, then UNet, then VAE, each freed before the next. What
a model may be loaded from is in ``source``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from craft_fast.config import EngineSettings
from craft_fast.errors import ConfigError, EnvironmentProblem
from craft_fast.quiet import import_bitsandbytes, quiet_progress_bars, quiet_third_party
from craft_fast.sdxl.drawing_form import FORMS, UnetForm, load_in_form
from craft_fast.sdxl.identify import PARTS, WEIGHTED
from craft_fast.sdxl.prediction import PREDICTION_TYPES, make_scheduler
from craft_fast.sdxl.source import DEFAULT_CONFIG, Source, open_source
from craft_fast.sdxl.weights import free_memory, guarded, load_part, weight_files

quiet_third_party()

__all__ = [
    "PARTS",
    "PREDICTION_TYPES",
    "WEIGHTED",
    "SdxlModel",
    "free_memory",
    "load_part",
    "load_sdxl",
    "model_digest",
    "open_source",
    "pick_device",
    "pick_dtype",
    "pick_vae_dtype",
    "unload",
    "weight_files",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SdxlModel:
    """One SDXL on one device; its networks are loaded on their first use and freed by assigning None.

    Attributes:
        source: what it is loaded from; ``path`` is its folder or file.
        digest: of everything that is loaded.
        device: where the networks go.
        dtype: of the UNet and the text encoders.
        vae_dtype: of the VAE.
        prediction_type: ``epsilon`` or ``v_prediction``.
        force_zeros_for_empty_prompt: whether the empty prompt is all zeros.
        tokenizer: of the first text encoder; ``tokenizer_2`` of the second.
        scheduler: the noise schedule; samplers are made from its config.
        unet_config: the UNet's configuration, there without the UNet; ``vae_config`` the VAE's.
        engine: how the work is laid onto the machine.
        unet_form: what ``unet`` is loaded as: ``dense``, or ``nf4`` to draw with little memory; training takes the
            dense one in either case (``sdxl.unet.pristine_unet``).
        resident: whether networks stay on the device between phases.
    """

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        prediction_type: str = "auto",
        zero_terminal_snr: str = "auto",
        engine: EngineSettings | None = None,
        unet_form: UnetForm = "dense",
    ) -> None:
        if unet_form not in FORMS:
            raise ValueError(f"unet_form is {unet_form!r}; allowed: {', '.join(FORMS)}")
        self.unet_form = unet_form
        import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
        quiet_progress_bars()
        self.source = source
        self.path: Path = source.path
        self.device, self.dtype, self.vae_dtype = device, dtype, vae_dtype
        self.engine = EngineSettings() if engine is None else engine
        self.resident = self.engine.resident != "never"
        prediction = source.prediction(prediction_type, zero_terminal_snr)
        self.prediction_type = prediction.prediction_type
        self.zero_terminal_snr = prediction.zero_terminal_snr
        where = source.path / "scheduler"
        self.scheduler: Any = guarded(where, lambda: make_scheduler(source.scheduler_config(), prediction, where))
        self.force_zeros_for_empty_prompt = source.force_zeros()
        self.tokenizer: Any = source.tokenizer("tokenizer")
        self.tokenizer_2: Any = source.tokenizer("tokenizer_2")
        self.unet_config: Any = source.config("unet")
        self.vae_config: Any = source.config("vae")
        self.digest = source.digest()
        self._parts: dict[str, Any] = {}

    # ---- the networks

    @property
    def text_encoder(self) -> Any:
        """The first text encoder, a ``CLIPTextModel``."""
        return self._part("text_encoder")

    @text_encoder.setter
    def text_encoder(self, value: Any) -> None:
        self._put("text_encoder", value)

    @property
    def text_encoder_2(self) -> Any:
        """The second text encoder, a ``CLIPTextModelWithProjection``."""
        return self._part("text_encoder_2")

    @text_encoder_2.setter
    def text_encoder_2(self, value: Any) -> None:
        self._put("text_encoder_2", value)

    @property
    def unet(self) -> Any:
        """The ``UNet2DConditionModel``, loaded in ``unet_form``.

        Training changes it; ``sdxl.unet`` has the one to draw with and the one to train, whatever is here.
        """
        return self._part("unet")

    @unet.setter
    def unet(self, value: Any) -> None:
        self._put("unet", value)

    @property
    def vae(self) -> Any:
        """The ``AutoencoderKL``."""
        return self._part("vae")

    @vae.setter
    def vae(self, value: Any) -> None:
        self._put("vae", value)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the networks that are on the device now."""
        return tuple(part for part in WEIGHTED if part in self._parts)

    def use(self, *parts: str) -> None:
        """Have the named networks on the device; where they do not stay resident, all others are freed first.

        Args:
            parts: some of ``text_encoder``, ``text_encoder_2``, ``unet``, ``vae``.

        Raises:
            ValueError: another name.
            ResourceError: it does not fit the device.
        """
        if unknown := set(parts) - set(WEIGHTED):
            raise ValueError(f"no such part: {', '.join(sorted(unknown))}; allowed: {', '.join(WEIGHTED)}")
        if not self.resident:
            self._free(*(part for part in self.loaded if part not in parts))
        for part in parts:
            self._part(part)

    def rest(self) -> None:
        """Free all networks, where they do not stay resident: another phase needs the device."""
        if not self.resident:
            self._free(*self.loaded)

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            self._parts[name] = self._load(name)
        return self._parts[name]

    def _load(self, name: str) -> Any:
        dtype = self.vae_dtype if name == "vae" else self.dtype
        if name != "unet":
            return self.source.load(name, self.device, dtype)
        return load_in_form(
            lambda device: self.source.load(name, device, dtype), self.unet_form, device=self.device, dtype=dtype,
            where=self.path / name,
        )  # fmt: skip

    def _put(self, name: str, value: Any) -> None:
        if value is None:
            self._parts.pop(name, None)
        else:
            self._parts[name] = value

    def _free(self, *parts: str) -> None:
        for part in parts:
            self._parts.pop(part, None)
        if parts:
            free_memory()

    # ---- sizes

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return int(2 ** (len(self.vae_config.block_out_channels) - 1))

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """``(4, h, w)`` of the latents of an image.

        Raises:
            ConfigError: the size is not a multiple of what the UNet and VAE together divide by.
        """
        step = self.vae_scale_factor * 2 ** (len(self.unet_config.block_out_channels) - 1)
        if height_px % step or width_px % step:
            raise ConfigError(
                "The image size does not fit the model",
                where="generate.height_px, generate.width_px",
                why=f"found {height_px} x {width_px}; both must be multiples of {step}",
            )
        return int(self.unet_config.in_channels), height_px // self.vae_scale_factor, width_px // self.vae_scale_factor


def pick_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is there.

    Raises:
        EnvironmentProblem: a GPU was asked for and torch sees none.
        ConfigError: the name is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            "No such device", where="model.device", why=f"found {name!r}; allowed: auto, cpu, cuda, cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(
            "The GPU is not there",
            where="model.device",
            why=f"asked for {name}; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs",
            hint="craft-fast doctor, or --set model.device=cpu",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU that computes in it, else float32."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if bf16 else torch.float32
    return _dtype(name, "model.dtype")


def pick_vae_dtype(name: str, dtype: torch.dtype, *, own: bool) -> torch.dtype:
    """``auto`` is float32 for the model's own VAE, and the model's ``dtype`` for another one.

    SDXL's decoder was trained with activations that overflow float16 and lose detail in bfloat16; who brings another
    VAE brings one that was made for half precision.
    """
    if name == "auto":
        return torch.float32 if own else dtype
    return _dtype(name, "model.vae_dtype")


def _dtype(name: str, setting: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError("No such dtype", where=setting, why=f"found {name!r}; allowed: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def model_digest(
    path: Path | str, *, config: str = DEFAULT_CONFIG, vae: Path | str | None = None, offline: bool = False
) -> str:
    """Digest of all parts that are used, without loading them; arguments as in ``load_sdxl``."""
    return open_source(path, config=config, vae=vae, offline=offline).digest()


def load_sdxl(
    path: Path | str,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    prediction_type: str = "auto",
    config: str = DEFAULT_CONFIG,
    vae: Path | str | None = None,
    vae_dtype: torch.dtype | str = "auto",
    zero_terminal_snr: str = "auto",
    offline: bool = False,
    engine: EngineSettings | None = None,
    unet_form: UnetForm = "dense",
) -> SdxlModel:
    """Open a model for inference: eval mode, no gradients.

    With ``engine.resident`` ``never``, networks are loaded when they are used; otherwise all at once, here.

    Args:
        path: diffusers folder, ``package:NAME/FOLDER``, hub id, or one safetensors file with the whole model.
        device: a device, or ``auto``.
        dtype: a dtype, its name, or ``auto``.
        prediction_type: what the UNet predicts; ``auto`` reads the scheduler's config, or a file's keys and metadata.
        config: of a single file: folder or hub id of its tokenizers and configurations.
        vae: another VAE: folder, hub id or file.
        vae_dtype: a dtype, its name, or ``auto``, see ``pick_vae_dtype``.
        zero_terminal_snr: ``yes``, ``no``, or ``auto`` as for ``prediction_type``.
        offline: ask no network.
        engine: how the work is laid onto the machine.
        unet_form: ``dense``, or ``nf4``: the UNet is quantised on its way to the device.

    Raises:
        EnvironmentProblem: missing, or not an SDXL; IntegrityError: pickled, damaged or non-finite weights;
        ConfigError: a file that does not say what its UNet predicts, or a VAE of another kind of model;
        ResourceError: it does not fit the device.
    """
    source = open_source(path, config=config, vae=vae, offline=offline)
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if isinstance(dtype, str) else dtype
    if isinstance(vae_dtype, str):
        vae_dtype = pick_vae_dtype(vae_dtype, dtype, own=vae is None)
    model = SdxlModel(
        source, device=device, dtype=dtype, vae_dtype=vae_dtype, prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr, engine=engine, unet_form=unet_form,
    )  # fmt: skip
    source.check()
    if model.resident:
        model.use(*WEIGHTED)
    return model


def unload(model: SdxlModel) -> None:
    """Free all networks' memory; the next use of one loads it again."""
    for part in model.loaded:
        setattr(model, part, None)
    free_memory()
