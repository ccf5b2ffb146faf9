"""SIGKILL at 50 random moments: the same command again must lose nothing, make nothing twice, and end in the same bits.

Each kill falls on a real ``craft-fast run``. After every one of them ``verify`` must find nothing wrong and all that
was recorded before must still be there; when a run is done, its manifest, its files and its LoRA must equal those of a
run that nobody disturbed. Two negative controls prove that these checks can fail.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.crash, pytest.mark.slow]

KILLS = 50
MAX_CONTROL_KILLS = 40


class Killer:
    """Kills runs of one world at seeded moments and collects what is wrong."""

    def __init__(self, world: Any, seed: int) -> None:
        self.world = world
        self.draw = random.Random(seed)
        self.kills = 0
        self.finished = 0
        self.problems: list[str] = []
        # A whole run, start-up of the forked process included.
        self.whole_s = world.reference_s

    def kill_until_done(self, name: str, budget: int, *, sabotage: str | None = None) -> None:
        """Start the same command again and again until it gets through; the last start is left alone if need be."""
        recorded: set[tuple[Any, ...]] = set()
        while True:
            moment = self.draw.uniform(0.0, 0.8 * self.whole_s) if self.kills < budget else None
            code = self.world.run(name, kill_after=moment, sabotage=sabotage)
            if code == 0:
                break
            assert code == -9, self.world.output(name)
            self.kills += 1
            self.problems += self.world.bad_checks(name)
            rows = set(self.world.work_done(name))
            if lost := recorded - rows:
                self.problems.append(f"lost after a kill: {sorted(lost)[:3]}")
            recorded = rows
        self.finished += 1
        self.problems += self.world.bad_checks(name)
        self.problems += self.world.differences(name)


def test_fifty_kills_change_nothing(world: Any) -> None:
    killer = Killer(world, seed=20)
    while killer.kills < KILLS:
        killer.kill_until_done(f"killed-{killer.finished}", KILLS)
    assert killer.problems == []
    assert killer.kills == KILLS
    assert killer.finished >= 3


def sabotaged(world: Any, sabotage: str) -> Iterator[list[str]]:
    killer = Killer(world, seed=21)
    while killer.kills < MAX_CONTROL_KILLS:
        killer.kill_until_done(f"{sabotage}-{killer.finished}", MAX_CONTROL_KILLS, sabotage=sabotage)
        yield killer.problems


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
