"""The judges that are measured, their pictures and prompts.

Weights are random and made on the device: cost and memory do not depend on them, and nothing is fetched. Where the
authors' package is to score too, both need the official file, and that is what both read.

Shapes: B pictures, S the network's image side in pixels.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_bench.rewards.cases import Case
from craft_bench.sdxl.problem import clean
from craft_fast.config import RewardSettings
from craft_fast.errors import EnvironmentProblem
from craft_fast.plan.judges import network_need, scoring_bytes
from craft_fast.records import Provenance
from craft_fast.rewards import catalog, loaders, published
from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.network_reward import Need, NetworkReward
from craft_fast.rewards.networks.attention import set_tower_attention
from craft_fast.rewards.networks.random_weights import random_network
from craft_fast.rewards.packages.environments import Environment
from craft_fast.rewards.pixels import normalise, shape
from craft_fast.rewards.texts import Texts
from craft_fast.rng import derive_seed, generator
from craft_fast.store.run import resolve_uri

SEED = 20261
_WORDS = "package:craft_fast.tiny/assets/rewards/h"
_TINY_PX = 32
# NetworkReward makes published scores of a network's bare ones.
_BARE = {"score_scale": 1.0, "score_mean": 0.0, "score_std": 1.0}
_PICTURES = 64
# A prompt's variants share it: here every fourth picture brings a prompt that was not seen before.
PER_PROMPT = 4


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        name: ``full``: as published, pictures of 1024 px; ``tiny``: for a CPU.
        picture_px: side of a picture.
        compared: pictures whose scores are compared.
        matmul: side of the matrices that measure the device's rate.
    """

    name: str
    picture_px: int
    compared: int
    matmul: int


SIZES = {"full": Size("full", 1024, 16, 8192), "tiny": Size("tiny", 96, 6, 512)}


def default_dtypes(device: torch.device) -> list[str]:
    """What runs on a GPU, and what a CPU is fast in beside one that is rounded."""
    return ["float16", "bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]


def make_pictures(size: Size, count: int) -> Tensor:
    """Smooth pictures with grain that differ from one another, uint8 [count, 3, H, W] on the CPU; 64, then again."""
    made = _pictures(size)
    return made[:count] if count <= len(made) else made[torch.arange(count) % len(made)]


@lru_cache(maxsize=2)
def _pictures(size: Size) -> Tensor:
    draw = generator(derive_seed(SEED, "bench", "pictures"))
    made = torch.empty((_PICTURES, 3, size.picture_px, size.picture_px), dtype=torch.uint8)
    for picture in made:
        coarse = torch.rand((1, 3, 6, 6), generator=draw) * 223
        smooth = torch.nn.functional.interpolate(coarse, tuple(picture.shape[1:]), mode="bilinear")[0]
        grain = torch.randint(33, picture.shape, generator=draw, dtype=torch.uint8)
        picture.copy_(smooth.to(torch.uint8) + grain)
    return made


def make_prompts(call: int, count: int) -> list[str]:
    """Prompts of a call, each for ``PER_PROMPT`` pictures; no other call has them."""
    colours, things = ("red", "blue", "green", "yellow", "black"), ("circle", "square", "star", "triangle")
    numbers = [call * count + index // PER_PROMPT for index in range(count)]
    return [f"a {colours[n % 5]} {things[n % 4]} beside {n + 2} {colours[n % 3]} {things[n % 3]}s" for n in numbers]


# ---- small ones of the same kinds


def tiny_config(family: str, words: int) -> dict[str, Any]:
    """A configuration of the family for a CPU; ``words`` is the vocabulary's size."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**layers, "image_size": _TINY_PX, "patch_size": 8, "projection_dim": 32}
    ids = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    text = {**layers, "vocab_size": words, "max_position_embeddings": 77, "projection_dim": 32, **ids}
    clip = {"projection_dim": 32, "vision_config": vision, "text_config": text}
    if family == "aesthetic":
        return {"tower": vision, "head": [32, 16, 8, 8]}
    if family == "image_reward":
        seen = {**layers, "image_size": _TINY_PX, "patch_size": 8, "layer_norm_eps": 1e-6}
        ids = {"pad_token_id": 0, "bos_token_id": words - 2, "sep_token_id": words - 1}
        read = {**layers, "vocab_size": words, "max_position_embeddings": 77, **ids}
        return {"vision": seen, "text": read, "mlp": [32, 16, 8, 8]}
    if family == "mps":
        return {"clip": clip, "cross": {"dim": 32, "layers": 2, "heads": 2, "head_dim": 16, "ff_mult": 2}}
    return clip


def _full_config(reward: str, words: int) -> dict[str, Any]:
    """As published, but that texts end where the small tokenizer ends them: else every text would be pooled alike."""
    config = copy.deepcopy(published.OFFICIAL[reward])
    for text in (config.get("text_config"), (config.get("clip") or {}).get("text_config")):
        if text is not None:
            text.update(bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1)
    return config


# ---- one judge


@dataclass
class Subject:
    """A judge in float32 on the CPU, from which its other forms are made.

    Attributes:
        reward: the published model's name.
        spec: preprocessing.
        network: float32, on the CPU.
        config: of the network, as in ``published.OFFICIAL``.
        texts: prompts to tokens; None where text is not looked at.
        tokenizer: behind ``texts``.
        device: where it is measured.
        source: the official files, where they are used.
        notes: what is worth saying of it.
        forms: in which it was at work, by dtype and attention.
        architecture: sizes, in the words of the authors' package, where they are not the published ones.
    """

    reward: str
    spec: Preprocessing
    network: Any
    config: Mapping[str, Any]
    texts: Texts | None
    tokenizer: Any
    device: torch.device
    source: loaders.RewardSource | None = None
    notes: list[str] = field(default_factory=list)
    forms: dict[tuple[str, str], Judge] = field(default_factory=dict)
    architecture: dict[str, Any] | None = None

    @property
    def need(self) -> Need:
        """Of the network in half precision."""
        return self.need_in(torch.float16)

    def need_in(self, dtype: torch.dtype) -> Need:
        """Bytes and operations by formula."""
        return network_need(self.spec.family, self.config, element=dtype.itemsize, tokens=self.spec.max_tokens)

    @property
    def unit(self) -> float | None:
        """Score of a cosine of 1; None where a head ends the network."""
        if self.spec.family not in ("clip", "mps"):
            return None
        scale = self.spec.score_scale
        return float(self.network.logit_scale()) if scale == "logit_scale" else float(scale)

    def xformers(self, dtypes: Sequence[str]) -> bool:
        """Whether a probe call of xformers works here in half precision; why not is a note."""
        halves = [dtype for dtype in dtypes if dtype != "float32"]
        if self.device.type != "cuda" or not halves:
            return False
        try:
            with self.at_work(halves[0], "xformers"):
                return True
        except EnvironmentProblem as missing:
            self.notes.append(f"xformers is not timed: {missing.what} {missing.why}".strip())
            return False

    @contextmanager
    def at_work(self, dtype: str, attention: str) -> Iterator[Judge]:
        """The network in a form; it leaves the device afterwards and rests on the CPU."""
        judge = self.forms.get((dtype, attention)) or Judge(self, getattr(torch, dtype), attention)
        self.forms[dtype, attention] = judge
        try:
            yield judge
        finally:
            judge.reward.rest()
            clean(self.device)

    def close(self) -> None:
        """Let go of all networks."""
        for judge in self.forms.values():
            judge.close()
        self.forms.clear()
        self.network = None
        clean(self.device)

    def score_once(self, dtype: str, attention: str, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of pictures by a copy in ``dtype``, float32 [N] on the CPU."""
        with self.at_work(dtype, attention) as judge:
            return judge.reward.score(pictures, prompts)


class Judge:
    """A subject's network in one form on the device, ready to be timed.

    Args:
        subject: whose.
        dtype: of the weights.
        attention: kernel.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype, attention: str) -> None:
        self.subject, self.dtype, self.device = subject, dtype, subject.device
        shared = dtype == torch.float32 and attention == "sdpa"
        network = subject.network if shared else copy.deepcopy(subject.network).to(dtype)
        for module in (getattr(network, "head", None), getattr(network, "mlp", None)):
            if module is not None:
                module.float()
        set_tower_attention(network, attention, device=self.device)  # type: ignore[arg-type]
        self.weight_bytes = sum(value.nbytes for value in network.state_dict().values())
        self.reward = NetworkReward(
            subject.reward, False, subject.reward, lambda: network, subject.spec, subject.texts, self.device,
            provenance=Provenance("native", "random"), dtype=dtype, resident=True,
            need=subject.need_in(dtype),
        )  # fmt: skip
        self.network = network

    def close(self) -> None:
        """Let go of the network."""
        self.reward.close()
        self.network = None

    def planned_bytes(self, images: int, size: Size) -> int:
        """What plan says that scoring takes."""
        spec = self.subject.spec
        return scoring_bytes(
            self.reward.need, images=images, images_at_once=images, height_px=size.picture_px,
            width_px=size.picture_px, side_px=spec.image_size, pads=spec.fit == "pad", gpu=self.device.type == "cuda",
        )  # fmt: skip

    def call(self, case: Case, size: Size) -> Callable[[int], object]:
        """What is timed for a case."""
        if case.mode == "score":
            pictures = make_pictures(size, case.batch)
            return lambda number: self.reward.score(pictures, make_prompts(number, case.batch))
        return self._network_call(case, size)

    def _network_call(self, case: Case, size: Size) -> Callable[[int], object]:
        """From normalised pixels on the device to scores; texts are encoded before, as in a run."""
        spec = self.subject.spec
        self.reward.score(make_pictures(size, 1), make_prompts(0, 1))  # brings the network onto the device
        with torch.inference_mode():
            pixels = normalise(shape(make_pictures(size, case.batch), self.reward.pixel_form), spec, self.dtype)
            pixels = pixels.to(self.device)
            given: tuple[Tensor, ...] = ()
            if self.subject.texts is not None:
                pairs = [self.subject.texts.tokens(prompt) for prompt in make_prompts(0, case.batch)]
                ids, mask = (torch.stack(part).to(self.device) for part in zip(*pairs, strict=True))
                given = self.network.encode_text(ids, mask)

        @torch.inference_mode()
        def call(_: int) -> Tensor:
            found: Tensor = self.network.score_encoded(pixels, *given)
            return found

        return call


@contextmanager
def open_subject(
    reward: str, size: Size, device: torch.device, *, environment: Environment | None = None
) -> Iterator[Subject]:
    """A judge: random weights, or the official files where the authors' package is to read them too and they are here.

    Args:
        reward: the published model's name.
        size: how large.
        device: where it is measured, and random weights are drawn.
        environment: of the authors' package; with it, files are looked for, or made for hpsv2 where there are none.

    Raises:
        CraftError: the files are damaged, or the environment is.
    """
    spec = catalog.get(reward).spec
    with tempfile.TemporaryDirectory(prefix="craft-bench-") as folder:
        subject = _from_files(reward, spec, device) if environment is not None and size.name == "full" else None
        if subject is None and environment is not None and environment.package == "hpsv2":
            subject = _with_a_file(reward, spec, size, device, environment, Path(folder))
        subject = subject or _random(reward, spec, size, device)
        try:
            yield subject
        finally:
            subject.close()


def _with_a_file(
    reward: str, spec: Preprocessing, size: Size, device: torch.device, environment: Environment, folder: Path
) -> Subject:
    """Random weights, written as hpsv2 reads them and read back, with the package's own vocabulary."""
    from craft_bench.rewards import official_file
    from craft_fast.rewards.networks.build import read_network

    words = official_file.write_words(environment.folder, folder)
    config = copy.deepcopy(published.OFFICIAL[reward])
    if size.name == "tiny":
        spec = spec.model_copy(update={"image_size": _TINY_PX})
        small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
        config["vision_config"].update(small, image_size=_TINY_PX, patch_size=8, projection_dim=32)
        config["text_config"].update(small, projection_dim=32)
        config["projection_dim"] = 32
    made: Any = random_network("clip", config, device=device, dtype=torch.float32, seed=SEED).to("cpu")
    files = {"weights": folder / "HPS.pt", "config": folder / "config.json"}
    official_file.write_hpsv2(made.clip, files["weights"])
    files["config"].write_text(json.dumps(config), encoding="utf-8")
    texts, tokenizer = _texts(spec, folder)
    source = loaders.RewardSource(spec, files, folder, "random weights", tuple(words))
    architecture = official_file.small_architecture(config) if size.name == "tiny" else None
    network = read_network(spec.model_copy(update=_BARE), files)
    return Subject(reward, spec, network, config, texts, tokenizer, device, source, architecture=architecture)


def _from_files(reward: str, spec: Preprocessing, device: torch.device) -> Subject | None:
    from craft_fast.rewards.networks.build import read_network

    try:
        source = loaders.open_source(reward, RewardSettings(kind=reward), offline=True)
    except EnvironmentProblem:
        return None
    texts, tokenizer = _texts(spec, source.tokenizer)
    network: Any = read_network(spec.model_copy(update=_BARE), source.files)
    if spec.condition and texts is not None:
        network.set_condition(texts.tokens(spec.condition)[0])
    return Subject(
        reward, spec, network, published.OFFICIAL[reward], texts, tokenizer, device, source,
        [f"{reward}: the official files, from {source.files['weights'].parent}"],
    )  # fmt: skip


def _random(reward: str, spec: Preprocessing, size: Size, device: torch.device) -> Subject:
    # Cosines of random weights may all be below the floor, and then there is nothing to compare.
    spec = spec.model_copy(update={"score_floor": None})
    if size.name == "tiny":
        spec = spec.model_copy(update={"image_size": _TINY_PX})
    folder = resolve_uri(_WORDS)
    assert isinstance(folder, Path)
    texts, tokenizer = _texts(spec, None if spec.family == "aesthetic" else folder)
    words = len(tokenizer) if tokenizer is not None else 0
    config = tiny_config(spec.family, words) if size.name == "tiny" else _full_config(reward, words)
    network: Any = random_network(spec.family, config, device=device, dtype=torch.float32, seed=SEED).to("cpu")
    if spec.condition and texts is not None:
        network.set_condition(texts.tokens(spec.condition)[0])
    if spec.family == "mps":
        network.threshold = spec.threshold
    clean(device)
    return Subject(reward, spec, network, config, texts, tokenizer, device)


def _texts(spec: Preprocessing, folder: Path | None) -> tuple[Texts | None, Any]:
    if folder is None:
        return None, None
    files = {path.name for path in folder.iterdir()}
    tokenizer = loaders._read_tokenizer(folder, files)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Texts(tokenizer, spec), tokenizer
