"""What a model's UNet predicts, and whether its noise schedule ends in pure noise: read, asked for, never guessed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_fast.errors import ConfigError, EnvironmentProblem
from craft_fast.sdxl.identify import Header

PREDICTION_TYPES = ("epsilon", "v_prediction")
_EPSILON, _V = PREDICTION_TYPES
_WORDS = {"epsilon": _EPSILON, "eps": _EPSILON, "v": _V, "v_prediction": _V, "v-prediction": _V, "v_pred": _V}
# The ModelSpec standard's key, and the one that some tools write instead.
_METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_ASK = (
    "--set model.prediction_type=epsilon or v_prediction: SDXL base, Pony and Illustrious predict epsilon, NoobAI "
    "v-pred v_prediction; the page you had the file from says which"
)


@dataclass(frozen=True)
class Prediction:
    """How a UNet predicts.

    Attributes:
        prediction_type: ``epsilon`` or ``v_prediction``.
        zero_terminal_snr: whether the schedule's last step is pure noise (arXiv 2305.08891).
    """

    prediction_type: str
    zero_terminal_snr: bool


def of_file(header: Header, *, prediction_type: str, zero_terminal_snr: str) -> Prediction:
    """From the settings, else from the file's marker tensors (``v_pred``, ``ztsnr``) and metadata.

    A metadata entry that calls the architecture SDXL base is no answer: tools write it for v-prediction models too.

    Raises:
        ConfigError: the file says nothing and was not told, or says two things.
    """
    said: dict[str, str] = {}
    if "v_pred" in header.shapes:
        said["tensor v_pred"] = _V
    for key in _METADATA:
        if key in header.metadata:
            said[f"metadata {key}"] = _word(header.metadata[key], f"{header.path} ({key})", prediction_type)
    if prediction_type == "auto" and len(set(said.values())) > 1:
        raise ConfigError(
            "The file contradicts itself about what its UNet predicts",
            where=str(header.path),
            why="; ".join(f"{source}: {value}" for source, value in said.items()),
            hint=_ASK,
        )
    if prediction_type == "auto" and not said:
        raise ConfigError(
            "The file does not say what its UNet predicts, and a wrong guess would train it on the wrong target",
            where=str(header.path),
            why="no tensor v_pred, no metadata modelspec.prediction_type",
            hint=_ASK,
        )
    found = prediction_type if prediction_type != "auto" else next(iter(said.values()))
    return _checked(found, _zero(zero_terminal_snr, "ztsnr" in header.shapes), header.path)


def of_folder(config: Mapping[str, Any], where: Path, *, prediction_type: str, zero_terminal_snr: str) -> Prediction:
    """From the settings, else from a scheduler's config.

    Raises:
        ConfigError: a kind of prediction that is not supported.
    """
    # Absent means what diffusers means by it: every scheduler's default is epsilon.
    found = config.get("prediction_type", _EPSILON) if prediction_type == "auto" else prediction_type
    return _checked(found, _zero(zero_terminal_snr, config.get("rescale_betas_zero_snr") is True), where)


def make_scheduler(config: Mapping[str, Any], prediction: Prediction, where: Path) -> Any:
    """A scheduler with the model's own noise schedule, from whose config samplers can be made.

    Raises:
        EnvironmentProblem: its class is not there, or it has no schedule of betas.
    """
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    values = {**config, "prediction_type": prediction.prediction_type}
    name = str(config.get("_class_name", "EulerDiscreteScheduler"))
    if prediction.zero_terminal_snr:
        # Only some schedulers rescale their betas. With "leading" spacing none would begin at the last, noisiest step.
        values |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        name = "EulerDiscreteScheduler"
    elif config.get("rescale_betas_zero_snr"):
        values["rescale_betas_zero_snr"] = False
    found = getattr(diffusers, name, None)
    if not inspect.isclass(found) or not issubclass(found, SchedulerMixin):
        raise EnvironmentProblem("There is no such scheduler in diffusers", where=str(where), why=f"found {name!r}")
    cls: Any = found
    scheduler = cls.from_config({key: value for key, value in values.items() if key != "_class_name"})
    if not hasattr(scheduler, "alphas_cumprod") or name.startswith("EDM"):
        raise EnvironmentProblem(
            "The model's noise schedule is not SDXL's",
            where=str(where),
            why=f"{name} is for EDM or flow matching",
            hint="use an SDXL that predicts epsilon or v",
        )
    return scheduler


def _word(value: str, where: str, prediction_type: str) -> str:
    found = _WORDS.get(value.strip().lower())
    if found is None:
        if prediction_type != "auto":
            return value
        raise ConfigError("This kind of prediction is not supported", where=where, why=f"found {value!r}", hint=_ASK)
    return found


def _zero(wanted: str, found: bool) -> bool:
    return found if wanted == "auto" else wanted == "yes"


def _checked(prediction_type: Any, zero: bool, where: Path) -> Prediction:
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            "This kind of prediction is not supported",
            where=str(where),
            why=f"found {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}",
            hint="--set model.prediction_type=epsilon, if the model was trained that way",
        )
    if zero and prediction_type == _EPSILON:
        raise ConfigError(
            "A schedule that ends in pure noise cannot be had with epsilon",
            where=str(where),
            why="at the last step the picture cannot be computed from the noise (arXiv 2305.08891, section 3.2)",
            hint="--set model.prediction_type=v_prediction, or --set model.zero_terminal_snr=no",
        )
    return Prediction(prediction_type, zero)
