"""Rows have the fields of the design, and a file of them survives what happens to files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from craft_bench import rows
from craft_fast.errors import EnvironmentProblem, ResourceError

DESIGN = Path(__file__).parents[2] / "docs" / "design.md"


def test_rows_have_the_fields_of_the_design() -> None:
    text = DESIGN.read_text().partition("## 7.")[2].partition("null where")[0].partition("jsonl`:")[2]
    text = re.sub(r"\([^)]*\)", "", text)
    assert tuple(re.findall(r"[a-z0-9_]+", text)) == rows.FIELDS
    row = rows.blank_row(name="geglu")
    assert set(rows.FIELDS) < set(row)
    assert row["name"] == "geglu"
    assert row["p50_ms"] is None
    with pytest.raises(KeyError):
        rows.blank_row(p99_ms=1.0)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", "mi300x"),
        ("", "gpu"),
    ],
)
def test_device_names_become_short(name: str, slug: str) -> None:
    assert rows.device_slug(name) == slug


def test_rows_are_appended_and_a_torn_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels-cpu.jsonl"
    with rows.RowFile(path) as file:
        file.append({"n": 1})
        assert json.loads(path.read_text()) == {"n": 1}
    with path.open("a") as torn:
        torn.write('{"n": 2, "p5')
    with rows.RowFile(path) as file:
        file.append({"n": 3})
    lines = path.read_text().splitlines()
    assert [json.loads(lines[0]), json.loads(lines[2])] == [{"n": 1}, {"n": 3}]


def test_every_row_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with rows.RowFile(tmp_path / "rows.jsonl") as file:
        for n in range(3):
            file.append({"n": n})
            assert len(synced) == n + 1


def test_a_folder_that_cannot_be_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem) as told:
        rows.RowFile(tmp_path / "file" / "rows.jsonl")
    assert "--out" in told.value.hint


def test_a_full_disk_is_a_resource_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with rows.RowFile(Path("/dev/full")) as file, pytest.raises(ResourceError, match="Rows cannot be written"):
        file.append({"n": 1})


def test_the_environment_says_where_a_row_was_measured() -> None:
    known = rows.environment("cpu")
    assert known["device"] == "cpu"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", known["date"])
    assert known["run"].startswith(known["date"])
    assert set(known) <= set(rows.blank_row())
