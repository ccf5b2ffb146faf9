"""Who else scores: the authors' own package in its environment, and transformers' plain CLIPModel in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from craft_bench.baselines.plain_clip import PlainClip
from craft_bench.rewards.cases import PACKAGE, Case
from craft_bench.rewards.measure import FULL, Effort, timed
from craft_bench.rewards.models import Size, Subject, make_pictures, make_prompts
from craft_bench.rows import Row
from craft_bench.sdxl.measure import percentiles
from craft_bench.sdxl.problem import clean
from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError
from craft_fast.rewards.packages import environments
from craft_fast.rewards.packages.client import PackageReward, load_package_reward, package_of
from craft_fast.rewards.packages.environments import Environment

GIB = 2**30
# hpsv2.score reads its checkpoint at every call: its rate is known after some pictures, whatever the batch.
_PACKAGE_PICTURES, _PACKAGE_QUICK = 6, 2


def package_environment(reward: str) -> Environment | None:
    """Where the authors' package of a reward is; None where there is no such package.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        return environments.need(package_of(reward, reward))
    except ConfigError:
        return None


class Rivals:
    """Rivals of one judge, with the same weights.

    Args:
        subject: the judge.
        environment: of the authors' package; None: it is not asked.
    """

    def __init__(self, subject: Subject, environment: Environment | None) -> None:
        self.subject = subject
        self.notes: list[str] = []
        self.plain = subject.spec.family == "clip"
        self.package: PackageReward | None = None
        if environment is not None and subject.source is not None:
            settings = RewardSettings(kind=subject.reward, backend="package")
            self.package = load_package_reward(
                subject.reward, settings, subject.source, subject.device, environment=environment,
                architecture=subject.architecture,
            )  # fmt: skip
        elif environment is not None:
            fetch = f"craft-fast rewards fetch {subject.reward}"
            self.notes.append(f"{subject.reward}: not held against its package without the official files: {fetch}")

    def __enter__(self) -> Rivals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.package is not None:
            self.package.close()

    def scores(self, impl: str, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores in the judge's unit, float32 [N] on the CPU; the package's are those of its own ``score()``."""
        if impl == PACKAGE:
            assert self.package is not None
            found = self.package.score_own(list(pictures), prompts)
            self.package.rest()
            return found
        with self._plain() as plain:
            return self._scaled(plain(pictures, self._prefixed(prompts)))

    def measure(self, case: Case, size: Size, device: torch.device, effort: Effort, check: Callable[[], None]) -> Row:
        """Time and memory of a rival's case: fields of its row."""
        pictures = make_pictures(size, case.batch)
        if case.impl == PACKAGE:
            return self._measure_package(case, pictures, effort, check)
        with self._plain() as plain:
            return timed(
                lambda number: plain(pictures, self._prefixed(make_prompts(number, case.batch))), device, effort,
                check=check,
            )  # fmt: skip

    def _measure_package(self, case: Case, pictures: Tensor, effort: Effort, check: Callable[[], None]) -> Row:
        """Its own ``score()``, a picture a call, timed where it runs: pictures on their way there do not count."""
        assert self.package is not None
        most = min(case.batch, _PACKAGE_QUICK if effort.most < FULL.most else _PACKAGE_PICTURES)
        most = max(most, 2)
        self.package.score_own([pictures[0]], make_prompts(0, 1))  # starts its process and loads
        self.package.peak_bytes = 0
        spent_ms: list[float] = []
        began = time.perf_counter()
        for number in range(most):
            check()
            before = self.package.seconds
            picture = pictures[number % len(pictures)]
            self.package.score_own([picture], make_prompts(number + 1, 1))
            spent_ms.append((self.package.seconds - before) * 1e3)
        p20, p50, p80 = (case.batch * value for value in percentiles(spent_ms))
        peak = self.package.peak_bytes / GIB if self.package.peak_bytes else None
        self.package.rest()
        how = (
            f"its own score(), one picture a call: {most} calls in {time.perf_counter() - began:.1f} s, times the batch"
        )
        return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "timed": most, "peak_gib": peak, "how": how,
                "package": self.package.provenance.backend}  # fmt: skip

    def _prefixed(self, prompts: Sequence[str]) -> list[str]:
        return [self.subject.spec.prefix + prompt for prompt in prompts]

    def _scaled(self, cosines: Tensor) -> Tensor:
        found = cosines * (self.subject.unit or 1.0)
        floor = self.subject.spec.score_floor
        return found if floor is None else found.clamp(min=floor)

    @contextmanager
    def _plain(self) -> Iterator[PlainClip]:
        subject = self.subject
        state = {name: value.to(subject.device) for name, value in subject.network.clip.state_dict().items()}
        spec = subject.spec
        plain = PlainClip(
            state, subject.network.clip.config.to_dict(), subject.tokenizer, max_tokens=spec.max_tokens,
            side=spec.image_size, pad=spec.fit == "pad", device=subject.device,
        )  # fmt: skip
        try:
            yield plain
        finally:
            del plain, state
            clean(subject.device)
