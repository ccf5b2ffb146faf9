"""What to change where a run does not fit, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from craft_fast.budget import with_changes
from craft_fast.plan.amounts import recompute_factor
from craft_fast.plan.stages import Costs

GIB = 1024**3


@dataclass(frozen=True)
class Change:
    """One step towards a run that fits.

    Attributes:
        settings: dotted keys with their new values.
        peak_gib: highest peak of the run with this change and those before it.
        time: what it costs, in words.
    """

    settings: Mapping[str, Any]
    peak_gib: float
    time: str

    def options(self) -> list[str]:
        """As options of a command line."""
        return [f"--set {key}={_text(value)}" for key, value in self.settings.items()]


@dataclass(frozen=True)
class _Step:
    settings: Mapping[str, Any]
    time: str


def _text(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


def over(planned: Costs) -> dict[str, int]:
    """Stages that need more than there is, and by how many bytes."""
    found = {name: peak.reserved - planned.budget for name, peak in planned.peaks().items() if peak is not None}
    return {name: excess for name, excess in found.items() if excess > 0}


def ways_to_fit(planned: Costs) -> tuple[list[Change], bool]:
    """The cheapest settings that fit, and whether there are such; otherwise all that helps.

    Each kind of change is taken only if a stage that does not fit needs less by it; at the end, those that turn out to
    be needless are dropped again.
    """
    by_kind: dict[int, _Step] = {}
    current = planned
    # Twice: where the UNet took the most, strips help only once that is smaller.
    for number, kind in [*enumerate(_KINDS)] * 2:
        for step in kind(planned):
            excess = over(current)
            if not excess:
                break
            tried = _with(current, step.settings)
            after = over(tried)
            if any(after.get(name, 0) < bytes_ for name, bytes_ in excess.items()):
                by_kind[number] = step
                current = tried
    taken = [step for _, step in sorted(by_kind.items())]
    fits = not over(current)
    if fits:
        taken = _without_needless(planned, taken)
    return _described(planned, taken), fits


def _without_needless(planned: Costs, steps: list[_Step]) -> list[_Step]:
    for step in reversed(steps):
        fewer = [other for other in steps if other is not step]
        if not over(_with(planned, _merged(fewer))):
            steps = fewer
    return steps


def _described(planned: Costs, steps: list[_Step]) -> list[Change]:
    changes = []
    for index, step in enumerate(steps):
        so_far = _with(planned, _merged(steps[: index + 1]))
        changes.append(Change(step.settings, so_far.highest_peak() / GIB, step.time))
    return changes


def _merged(steps: list[_Step]) -> dict[str, Any]:
    return {key: value for step in steps for key, value in step.settings.items()}


def _with(planned: Costs, changes: Mapping[str, Any]) -> Costs:
    return replace(planned, settings=with_changes(planned.settings, changes))


# ---- what there is to change, in order of what it costs


def _tiles(planned: Costs) -> Iterator[_Step]:
    if planned.settings.engine.vae_tiling != "always":
        factor = planned.decode(tiled=True).flops / planned.decode(tiled=False).flops
        yield _Step({"engine.vae_tiling": "always"}, f"decoding {factor:.1f}x")


def _one_at_a_time(planned: Costs) -> Iterator[_Step]:
    if planned.settings.engine.resident != "never":
        yield _Step({"engine.resident": "never"}, "models are loaded anew for each phase")


def _recompute(planned: Costs) -> Iterator[_Step]:
    if planned.settings.train.gradient_checkpointing == "none":
        yield _Step({"train.gradient_checkpointing": "all"}, f"training {recompute_factor(planned):.2f}x")


def _smaller_batches(planned: Costs) -> Iterator[_Step]:
    size = planned.settings.generate.batch_size
    while size > 1:
        size //= 2
        yield _Step({"generate.batch_size": size}, "generation somewhat slower; images differ in their last bits")


def _smaller_scoring(planned: Costs) -> Iterator[_Step]:
    size = planned.settings.score.batch_size
    while size > 1:
        size //= 2
        yield _Step({"score.batch_size": size}, "scoring somewhat slower")


def _half_scoring(planned: Costs) -> Iterator[_Step]:
    if planned.gpu and planned.score_element > 2:
        yield _Step({"score.dtype": "auto"}, "no slower; scores differ in their last digits")


def _smaller_micro_batches(planned: Costs) -> Iterator[_Step]:
    train = planned.settings.train
    total, size = train.micro_batch_size * train.grad_accum_steps, train.micro_batch_size
    while size > 1:
        size //= 2
        if total % size == 0:
            changes = {"train.micro_batch_size": size, "train.grad_accum_steps": total // size}
            yield _Step(changes, "training somewhat slower; the global batch stays")


def _flat(planned: Costs) -> Iterator[_Step]:
    if planned.settings.engine.optimizer == "bitsandbytes":
        yield _Step({"engine.optimizer": "flat"}, "no slower")


def _draw_quantised(planned: Costs) -> Iterator[_Step]:
    if not planned.draws_in_nf4:
        yield _Step({"generate.unet": "nf4"}, "weights are dequantised in every denoising step; other pictures")


def _quantise(planned: Costs) -> Iterator[_Step]:
    cost = "weights are dequantised in every step"
    if planned.settings.train.method == "full":
        cost += "; an adapter is trained instead of all weights"
    if planned.settings.train.method in ("lora", "full"):
        yield _Step({"train.method": "qlora"}, cost)


def _quantise_convs(planned: Costs) -> Iterator[_Step]:
    if not planned.settings.train.nf4_convs:
        yield _Step({"train.nf4_convs": True}, "convolutions are dequantised in every step")


def _smaller_rank(planned: Costs) -> Iterator[_Step]:
    rank = planned.settings.train.rank
    alpha = planned.settings.train.lora_alpha
    while rank > 4:
        rank, alpha = rank // 2, alpha / 2
        yield _Step({"train.rank": rank, "train.lora_alpha": alpha}, "no slower; a smaller adapter")


_KINDS: tuple[Callable[[Costs], Iterator[_Step]], ...] = (
    _tiles,
    _one_at_a_time,
    _recompute,
    _smaller_batches,
    _smaller_scoring,
    _half_scoring,
    _smaller_micro_batches,
    _flat,
    _draw_quantised,
    _quantise,
    _quantise_convs,
    _smaller_rank,
)
