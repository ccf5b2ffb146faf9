"""A reward network at work: pixels and tokens in, scores out, within the memory there is.

Shapes: B batch, H, W picture, S the network's image side in pixels, T tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from craft_fast.errors import CraftError, ResourceError
from craft_fast.records import Provenance
from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.pixels import Pictures, PixelForm, normalise, pixel_form
from craft_fast.sdxl.weights import free_memory

if TYPE_CHECKING:
    from craft_fast.rewards.texts import Texts

# A text tower's work on one prompt (54 GFLOP for ViT-H) is small beside the launches of its 24 layers on a GPU. The
# number is fixed, and a block that is not full is filled up, so that the same kernels run whatever was scored before.
TEXTS_AT_ONCE = 16
# What is kept of prompts seen, so that a prompt of many candidates is encoded once; MPS keeps 158 KB of each.
_KEPT_TEXT_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Need:
    """What a network takes; 0 where it is not known.

    Attributes:
        weight_bytes: of the weights in the dtype they are held in.
        image_bytes: activations for each picture.
        image_gflop: operations for each picture.
    """

    weight_bytes: int = 0
    image_bytes: int = 0
    image_gflop: float = 0.0


class NetworkReward:
    """A reward network with its preprocessing.

    Scores do not depend on what was scored before: a text is tokenised once and, where the network reads it by itself,
    encoded once.

    Args:
        name: short name.
        held_out: see ``Reward``.
        key: see ``Reward``.
        load: reads the network, one of the families of ``networks``, onto the CPU.
        spec: preprocessing.
        texts: prompts to tokens; None for the aesthetic family.
        device: to score on; elsewhere than on a CPU the network is there only between ``score`` and ``rest``.
        provenance: see ``Reward``.
        dtype: of the weights and of what is computed with them.
        resident: the network is read now and rests in the machine's memory; otherwise it is read by the first
            ``score`` and forgotten by ``rest``, so that one reward at a time takes memory at all.
        stay: it stays on the device when it rests.
        need: what it takes.
        memory_budget: bytes on the device for weights and activations; None: no limit. It decides how many pictures
            go through the network at once.
    """

    def __init__(
        self,
        name: str,
        held_out: bool,
        key: str,
        load: Callable[[], Any],
        spec: Preprocessing,
        texts: Texts | None,
        device: torch.device,
        *,
        provenance: Provenance,
        dtype: torch.dtype = torch.float32,
        resident: bool = True,
        stay: bool = False,
        need: Need | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.name = name
        self.held_out = held_out
        self.key = key
        self.provenance = provenance
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.stay = stay
        self.need = need or Need()
        self.memory_budget = memory_budget
        self._load: Callable[[], Any] | None = load
        self._resident = resident
        self._network: Any = None
        self._weights: dict[str, Tensor] | None = None
        self._texts = texts
        self._encoded: dict[str, tuple[Tensor, ...]] = {}
        self._at_most: int | None = None
        if resident:
            self._ready()

    # ---- what others ask

    @cached_property
    def pixel_form(self) -> PixelForm:
        """How pictures become its pixels before they are normalised; rewards of an equal one share them."""
        return pixel_form(self.spec)

    @property
    def cut(self) -> dict[str, int]:
        """Prompts that were longer than the network reads, and how many tokens each lost."""
        return dict(self._texts.cut) if self._texts is not None else {}

    def images_at_once(self, images: int) -> int:
        """How many of ``images`` pictures go through the network at a time."""
        most = min(images, self._at_most or images)
        if self.memory_budget is not None and self.need.image_bytes > 0:
            room = (self.memory_budget - self.need.weight_bytes) // self.need.image_bytes
            most = min(most, max(1, room))
        return most

    def memory_bytes(self, images: int) -> int:
        """Weights and activations for ``images`` at once, as far as they go through the network at once."""
        return self.need.weight_bytes + self.images_at_once(images) * self.need.image_bytes

    def cost(self) -> float:
        """GFLOP for one picture; its text is not counted, as it is encoded once."""
        return self.need.image_gflop

    # ---- scoring

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures uint8 [B, 3, H, W] against B prompts; float32 [B] on the CPU. As ``score_pictures``."""
        return self.score_pictures(Pictures.of(images), prompts)

    def score_pictures(self, pictures: Pictures, prompts: Sequence[str]) -> Tensor:
        """Judge pictures that other rewards may share.

        Args:
            pictures: B of them.
            prompts: B texts.

        Returns:
            float32 [B] on the CPU.

        Raises:
            CraftError: closed before, numbers of pictures and prompts differ, or a score is not finite.
            ResourceError: one picture does not fit the device.
        """
        if len(prompts) != len(pictures):
            raise CraftError("Pictures and prompts differ in number.", where=f"reward {self.name}")
        self._ready()
        if not prompts:
            return torch.zeros(0)
        try:
            self._move_in()
            with torch.inference_mode(), full_float32():
                pixels = pictures.pixels(self.pixel_form, self.device)
                texts = self._texts_of(prompts)
        except torch.OutOfMemoryError as error:
            raise self._no_room(error) from error
        scores = self._within_memory(pixels, texts)
        self._refuse_non_finite(scores, prompts)
        return scores

    def _ready(self) -> None:
        """Have the network in memory."""
        if self._load is None:
            raise CraftError("A closed reward cannot score.", where=f"reward {self.name}")
        if self._network is None:
            self._network = self._load().eval().requires_grad_(False)

    def _move_in(self) -> None:
        """Have the network on its device; where it is to come back, its weights stay in the machine's memory too."""
        if self._resident and self._weights is None and self.device.type != "cpu":
            network = self._network
            named = chain(
                network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)
            )
            self._weights = {name: value.detach() for name, value in named}
        self._network.to(self.device)

    def _move_out(self) -> None:
        """Give the device's memory back. Nothing is copied, as no weight has changed."""
        for name, value in (self._weights or {}).items():
            owner, _, key = name.rpartition(".")
            module = self._network.get_submodule(owner)
            was_parameter = isinstance(getattr(module, key), nn.Parameter)
            setattr(module, key, nn.Parameter(value, requires_grad=False) if was_parameter else value)
        self._weights = None

    def _within_memory(self, pixels: Tensor, texts: list[tuple[Tensor, ...]]) -> Tensor:
        """Scores of all, in as many pictures at a time as fit; fewer from then on when they did not after all."""
        while True:
            at_once = self.images_at_once(len(pixels))
            try:
                with torch.inference_mode(), full_float32():
                    parts = range(0, len(pixels), at_once)
                    raw = torch.cat([self._part(pixels, texts, i, i + at_once) for i in parts])
                    return self._to_score(raw.cpu())
            except torch.OutOfMemoryError as error:
                if at_once == 1:
                    raise self._no_room(error) from error
            # Out of the except block: what it holds keeps the failed call's tensors alive.
            self._at_most = at_once // 2
            free_memory()

    def _part(self, pixels: Tensor, texts: list[tuple[Tensor, ...]], begin: int, end: int) -> Tensor:
        """What the network makes of some pictures, float32 on its device."""
        shaped = normalise(pixels[begin:end], self.spec, self.dtype)
        given = [torch.stack(column).to(self.device) for column in zip(*texts[begin:end], strict=True)]
        raw: Tensor = self._network.score_encoded(shaped, *given)
        return raw.float()

    def _to_score(self, raw: Tensor) -> Tensor:
        """The network's output float32 [B] to the published score: scaled, not below its floor, standardised."""
        spec = self.spec
        score = raw * (self._network.logit_scale() if spec.score_scale == "logit_scale" else float(spec.score_scale))
        if spec.score_floor is not None:
            score = score.clamp(min=spec.score_floor)
        return (score - spec.score_mean) / spec.score_std

    # ---- texts

    def _texts_of(self, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """What the network's ``score_encoded`` takes of each prompt, on the CPU; nothing where it reads no text."""
        if self._texts is None:
            return [()] * len(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        at_once = TEXTS_AT_ONCE if self.device.type == "cuda" else 1
        for start in range(0, len(new), at_once):
            self._encode(new[start : start + at_once], at_once)
        found = [self._encoded[prompt] for prompt in prompts]
        self._forget()
        return found

    def _encode(self, block: list[str], size: int) -> None:
        """Keep what the network makes of some prompts; the block is filled up to ``size``."""
        assert self._texts is not None
        pairs = [self._texts.tokens(prompt) for prompt in block]
        pairs += pairs[:1] * (size - len(pairs))
        ids, mask = (torch.stack(part).to(self.device) for part in zip(*pairs, strict=True))
        made = [part.cpu() for part in self._network.encode_text(ids, mask)]
        for index, prompt in enumerate(block):
            # Copies: a row of a block would keep the whole block.
            self._encoded[prompt] = tuple(part[index].clone() for part in made)

    def _forget(self) -> None:
        """Let go of the prompts seen longest ago, beyond what may be kept."""
        size = sum(part.nbytes for parts in self._encoded.values() for part in parts)
        for text in list(self._encoded):
            if size <= _KEPT_TEXT_BYTES:
                return
            size -= sum(part.nbytes for part in self._encoded.pop(text))

    # ---- errors and ends

    def _refuse_non_finite(self, scores: Tensor, prompts: Sequence[str]) -> None:
        bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        if not bad:
            return
        precision = str(self.dtype).removeprefix("torch.")
        raise CraftError(
            "A reward gave a score that is not a number.",
            where=f"reward {self.name}, prompt {prompts[bad[0]][:200]!r}",
            why=f"{scores[bad[0]].item()} for {len(bad)} of {len(scores)} pictures, computed in {precision}",
            hint="" if self.dtype == torch.float32 else "--set score.dtype=float32",
        )

    def _no_room(self, error: torch.OutOfMemoryError) -> ResourceError:
        hints = ["--set engine.resident=never"] if self._resident else []
        hints += ["--set score.dtype=float16"] if self.dtype == torch.float32 else []
        return ResourceError(
            "A reward does not fit the memory.",
            where=f"reward {self.name} on {self.device}",
            why=str(error).splitlines()[0],
            hint=", or ".join([*hints, f"take it out: --set rewards.{self.name}=null"]),
        )

    def rest(self) -> None:
        """Move the network off the accelerator, or forget it."""
        if self._network is None or self.stay:
            return
        if not self._resident:
            self._network = None
            free_memory()
        else:
            self._move_out()

    def close(self) -> None:
        """Free the network."""
        self._network = self._load = self._weights = None
        self._encoded.clear()


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 convolutions as exact as float32 products: PyTorch cuts their inputs to TF32's 10 bits on a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
