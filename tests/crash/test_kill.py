"""SIGKILL at 50 random moments: the same command again must lose nothing, make nothing twice, and end in the same bits.

Each kill falls on a real ``craft-fast run``. After every one of them ``verify`` must find nothing wrong and all that
was recorded before must still be there; when a run is done, its manifest, its files and its LoRA must equal those of a
run that nobody disturbed. Two negative controls prove that these checks can fail.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.crash, pytest.mark.slow]

KILLS = 50
KILLS_A_RUN = 10
MAX_CONTROL_KILLS = 40


class Killer:
    """Kills runs of one world at seeded moments and collects what is wrong."""

    def __init__(self, world: Any, seed: int) -> None:
        self.world = world
        self.draw = random.Random(seed)
        self.kills = 0
        self.hit: Counter[str] = Counter()
        self.problems: list[str] = []
        # How late a kill may come. Half of a whole run's time: each start has less left to do than the one before, so
        # later kills would mostly fall on nothing, and the run would be through before its late stages were hit.
        self.latest_s = world.reference_s / 2

    def kill_until_done(self, name: str, kills: int, *, sabotage: str | None = None) -> None:
        """Start the same command again and again; ``kills`` times it is killed, if it does not get through before."""
        recorded: set[tuple[Any, ...]] = set()
        left = kills
        while True:
            moment = self.draw.uniform(0.0, self.latest_s) if left else None
            code = self.world.run(name, kill_after=moment, sabotage=sabotage)
            if code == 0:
                # Through before it was killed: let later kills come earlier.
                self.latest_s *= 0.7 if moment is not None else 1.0
                break
            assert code == -9, self.world.output(name)
            left -= 1
            self.kills += 1
            self.hit[self.world.stage(name)] += 1
            self.problems += self.world.bad_checks(name)
            rows = set(self.world.work_done(name))
            if lost := recorded - rows:
                self.problems.append(f"lost after a kill: {sorted(lost)[:3]}")
            if rows == recorded:
                # A busier machine than at the start: nothing was done before the kill, so let later ones come later.
                self.latest_s *= 1.2
            recorded = rows
        self.problems += self.world.bad_checks(name)
        self.problems += self.world.differences(name)


def test_fifty_kills_change_nothing(world: Any) -> None:
    killer = Killer(world, seed=20)
    for number in itertools.count():
        killer.kill_until_done(f"killed-{number}", min(KILLS_A_RUN, KILLS - killer.kills))
        if killer.kills == KILLS:
            break
    print(f"{KILLS} kills of {number + 1} runs, in the stages {dict(killer.hit)}")
    assert killer.problems == []
    assert len(killer.hit) >= 3, f"the kills fell in too few stages: {killer.hit}"


def sabotaged(world: Any, sabotage: str) -> Iterator[list[str]]:
    killer = Killer(world, seed=21)
    for number in itertools.count():
        killer.kill_until_done(f"{sabotage}-{number}", KILLS_A_RUN, sabotage=sabotage)
        yield killer.problems
        if killer.kills >= MAX_CONTROL_KILLS:
            break


@pytest.mark.parametrize(
    ("sabotage", "sign"), [("rows_first", "missing"), ("counted_draws", "lora/")], ids=["rows_first", "counted_draws"]
)
def test_the_checks_find_a_store_that_is_wrong(world: Any, sabotage: str, sign: str) -> None:
    name = f"{sabotage}-undisturbed"
    assert world.run(name, sabotage=sabotage) == 0, world.output(name)
    assert world.differences(name) == [], "without a kill the sabotage must not show, or it proves nothing"
    problems: list[str] = []
    for problems in sabotaged(world, sabotage):
        if any(sign in problem for problem in problems):
            return
    pytest.fail(f"{MAX_CONTROL_KILLS} kills did not show the fault; found {problems}")
