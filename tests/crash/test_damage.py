"""Files that rot between two commands: found, made again, and the LoRA is the same to the bit."""

from __future__ import annotations

import io
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.store import atomic
from craft_fast.store.digest import sha256_file
from craft_fast.store.safe_load import load_safetensors

pytestmark = [pytest.mark.crash, pytest.mark.slow]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    bit = random.Random(1).randrange(len(content) * 8 // 2, len(content) * 8)
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def pickled(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"0": torch.zeros(4, 16, 16)}, buffer)
    path.write_bytes(buffer.getvalue())


def remove(path: Path) -> None:
    path.unlink()


def used_latents(root: Path) -> Path:
    """The latents of an accepted candidate."""
    with sqlite3.connect(root / "manifest.sqlite") as db:
        sql = (
            "SELECT latents_path FROM candidates JOIN selections USING (candidate_id)"
            " WHERE accepted ORDER BY latents_path LIMIT 1"
        )
        path = db.execute(sql).fetchone()[0]
    db.close()
    return root / path


DAMAGE = [flip_a_bit, cut, pickled, remove]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_entry_is_rebuilt(damage: Any, world: Any) -> None:
    name = f"cache-{damage.__name__}"
    world.begin(name, until="cache")
    damage(sorted(world.root(name).glob("cache/*/*.safetensors"))[1])
    assert world.bad_checks(name) != []
    assert world.run(name) == 0, world.output(name)
    assert world.differences(name) == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_latents_are_generated_again(damage: Any, world: Any) -> None:
    name = f"latents-{damage.__name__}"
    world.begin(name, until="filter")
    damage(used_latents(world.root(name)))
    assert world.bad_checks(name) != []
    assert world.run(name) == 0, world.output(name)
    assert world.differences(name) == []


def test_nan_in_latents_that_were_recorded_so_is_generated_again(world: Any) -> None:
    name = "latents-nan"
    world.begin(name, until="cache")
    path = used_latents(world.root(name))
    tensors = load_safetensors(path)
    for tensor in tensors.values():
        tensor[0, 3, 3] = float("nan")
    written = atomic.write_safetensors(path, tensors)
    with sqlite3.connect(world.root(name) / "manifest.sqlite") as db:
        sql = "UPDATE candidates SET latents_sha256 = ?, latents_size = ? WHERE latents_path LIKE ?"
        db.execute(sql, (*written, f"%{path.name}"))
    db.close()
    assert any("NaN" in problem for problem in world.bad_checks(name))
    assert world.run(name) == 0, world.output(name)
    assert world.differences(name) == []


@pytest.mark.parametrize("damage", [flip_a_bit, remove])
def test_a_damaged_picture_is_made_again_before_it_is_scored(damage: Any, world: Any) -> None:
    name = f"picture-{damage.__name__}"
    world.begin(name, until="generate")
    damage(sorted(world.root(name).glob("candidates/*.png"))[4])
    assert world.run(name) == 0, world.output(name)
    assert world.differences(name) == []


@pytest.mark.parametrize("damage", [flip_a_bit, cut, pickled, remove])
def test_a_damaged_checkpoint_is_passed_over(damage: Any, world: Any) -> None:
    name = f"checkpoint-{damage.__name__}"
    world.begin(name, until="train")
    damage(world.root(name) / "checkpoints" / "step-000006" / "adapter.safetensors")
    assert world.run(name) == 0, world.output(name)
    assert world.differences(name) == []


@pytest.mark.parametrize(
    ("until", "damage"),
    [("export", flip_a_bit), ("export", pickled), ("export", remove), ("evaluate", flip_a_bit), ("evaluate", remove)],
)
def test_a_damaged_lora_is_exported_again(until: str, damage: Any, world: Any) -> None:
    """Before its scores are in its header, and after."""
    name = f"lora-{until}-{damage.__name__}"
    world.begin(name, until=until)
    path = world.root(name) / "lora" / "craft.safetensors"
    damage(path)
    assert world.bad_checks(name) != []
    assert world.run(name) == 0, world.output(name)
    assert sha256_file(path) == sha256_file(world.root("reference") / "lora" / "craft.safetensors")
    assert world.differences(name) == []
