"""``bench rewards``: cases, figures, comparison, and whole runs on tiny networks."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_bench.rewards import compare, models, official_file, rivals
from craft_bench.rewards.cases import (
    BATCHES,
    OURS,
    PACKAGE,
    PLAIN,
    REWARDS,
    TRAINING,
    Case,
    cases_of,
    choose_rewards,
    parse_batches,
)
from craft_bench.rewards.gates import GATES, METRICS, judge
from craft_bench.rewards.measure import QUICK, timed
from craft_bench.rewards.models import SIZES, make_pictures, make_prompts, open_subject
from craft_bench.rewards.rivals import Rivals
from craft_bench.rewards.run import Options, Report, run
from craft_bench.rewards.table import deviation_table, failures, speed_table
from craft_fast.errors import EnvironmentProblem, Interrupted, UsageError
from craft_fast.progress import Silent
from craft_fast.records import Provenance
from craft_fast.rewards import published
from craft_fast.rewards.catalog import OFFICIALS
from craft_fast.rewards.networks.build import read_network
from craft_fast.rewards.networks.random_weights import random_network
from craft_fast.rewards.packages.environments import Environment

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


def options(out: Path, *rewards: str, **changes: Any) -> Options:
    base = Options(list(rewards), (2, 1), quick=True, device="cpu", out=out)
    return dataclasses.replace(base, **changes)


# ---- cases


def test_rewards_keep_their_order_and_a_wrong_name_is_told() -> None:
    assert choose_rewards([]) == list(REWARDS)
    assert "hpsv2.0" not in REWARDS
    assert choose_rewards(["mps", "hpsv2.0"]) == ["hpsv2.0", "mps"]
    with pytest.raises(UsageError, match="no published reward hps"):
        choose_rewards(["hps"])


def test_batches_are_read_once_each_and_in_order() -> None:
    assert parse_batches("16, 1,16") == (16, 1)
    for text in ("", "1,", "0", "-1", "1.5", "a"):
        with pytest.raises(UsageError, match="no list of batch sizes"):
            parse_batches(text)


def cases(**changes: Any) -> list[Case]:
    return cases_of(
        "hpsv2.1", batches=BATCHES, dtypes=("float16", "bfloat16"),
        **{"plain": True, "package": True, "xformers": True, **changes},
    )  # fmt: skip


def test_a_rival_of_a_batch_comes_before_ours_of_it() -> None:
    found = cases()
    assert len({case.label for case in found}) == len(found)
    for batch in BATCHES:
        order = [case.impl for case in found if case.batch == batch]
        assert order[:2] == [PACKAGE, PLAIN]
        assert set(order[2:]) == {OURS}
    assert {case.attention for case in found if case.mode == "network" and case.batch == 64} == {"sdpa", "xformers"}
    assert len(cases(quick=True)) < len(found) / 1.5
    assert {case.impl for case in cases(plain=False, package=False)} == {OURS}


# ---- figures


def row(case: Case, **fields: Any) -> dict[str, Any]:
    return {
        "name": case.reward, "impl": case.impl, "case": case.name, "dtype": case.dtype, "mode": case.mode,
        "batch": case.batch, "attention": case.attention, "device": "h100", "problem": "full", "failed": None, **fields,
    }  # fmt: skip


def verdicts(*rows: dict[str, Any]) -> dict[str, tuple[float | None, str]]:
    return {reached.gate.metric: (reached.measured, reached.verdict) for reached in judge(rows)}


def test_figures_need_rows_of_a_gpu_at_full_size() -> None:
    assert {gate.metric for gate in GATES} == set(METRICS)
    assert {verdict for _, verdict in verdicts().values()} == {"not measured"}
    all_cases = [one for name in TRAINING for one in (dataclasses.replace(case, reward=name) for case in cases())]
    for gate in GATES:
        assert any(gate.counts(row(case)) for case in all_cases), gate.text
        assert not any(gate.counts(row(case, device="cpu")) for case in all_cases)
        assert not any(gate.counts(row(case, problem="tiny")) for case in all_cases)
        assert not any(gate.counts(row(case, failed="out of memory")) for case in all_cases)


def test_the_figures_are_the_issues() -> None:
    ours = Case("hpsv2.1", OURS, 16, "float16")
    assert verdicts(row(ours, versus={PACKAGE: 10.0}))["versus_package"] == (10.0, "met")
    assert verdicts(row(ours, versus={PACKAGE: 9.9}))["versus_package"] == (9.9, "not met")
    assert verdicts(row(ours, versus={PLAIN: 99.0}))["versus_package"] == (None, "not measured")
    tower = Case("pickscore", OURS, 64, "float16", "network")
    assert verdicts(row(tower, matrix_fraction=0.5))["matrix_fraction"] == (0.5, "met")
    other = dataclasses.replace(tower, batch=16)
    assert verdicts(row(other, matrix_fraction=0.1))["matrix_fraction"] == (None, "not measured")
    measured = dict(zip(TRAINING, (2.4, 2.51, 1.0), strict=True))
    peaks = [row(dataclasses.replace(ours, reward=name), peak_gib=peak) for name, peak in measured.items()]
    assert verdicts(*peaks)["peak_gib"] == (2.51, "not met")


# ---- right or wrong


def test_a_deviation_is_seen_beside_the_unit_and_the_spread() -> None:
    reference = torch.tensor([1.0, 2.0, 3.0])
    cosine = compare.compare(reference + torch.tensor([0.0, 5e-4, 0.0]), reference, 1.0, OURS, "float16")
    assert (cosine.right, cosine.pictures) == (True, 3)
    assert (cosine.largest, cosine.mean) == (pytest.approx(5e-4, rel=1e-3), pytest.approx(5e-4 / 3, rel=1e-3))
    assert not compare.compare(reference + 2e-3, reference, 1.0, OURS, "float16").right
    assert compare.compare(reference + 2e-3, reference, 100.0, OURS, "float16").right
    # A head's score of which nobody knows the unit: 5 % of the spread of 1.
    assert compare.compare(reference + 0.04, reference, None, OURS, "float16").right
    assert not compare.compare(reference + 0.06, reference, None, OURS, "float16").right


def test_what_cannot_be_compared_is_not_right() -> None:
    reference = torch.tensor([1.0, 2.0])
    nan = compare.compare(torch.tensor([1.0, float("nan")]), reference, 1.0, OURS, "float16")
    assert not nan.right
    json.dumps(nan.fields(), allow_nan=False)
    alike = torch.ones(2)
    assert not compare.compare(alike, alike, 1.0, OURS, "float16").right
    with pytest.raises(ValueError, match="scores instead of"):
        compare.compare(torch.ones(3), reference, 1.0, OURS, "float16")


# ---- the work


def test_pictures_differ_and_prompts_are_new_in_each_call() -> None:
    pictures = make_pictures(TINY, 5)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures, make_pictures(TINY, 5))
    assert len({bytes(picture.numpy().tobytes()) for picture in pictures}) == 5
    assert make_pictures(TINY, 70).shape[0] == 70
    calls = [make_prompts(number, 16) for number in range(50)]
    assert [len(set(call)) for call in calls] == [4] * 50
    assert len({prompt for call in calls for prompt in call}) == 200


@pytest.mark.parametrize("reward", REWARDS)
def test_each_judge_tells_pictures_apart_and_texts_where_it_reads_them(reward: str) -> None:
    with open_subject(reward, TINY, CPU) as subject:
        pictures = make_pictures(TINY, 3)
        same = subject.score_once("float32", "sdpa", pictures, ["a red circle"] * 3)
        other = subject.score_once("float32", "sdpa", pictures, ["two blue stars"] * 3)
    assert len({round(float(value), 6) for value in same}) == 3
    assert torch.equal(same, other) == (reward == "aesthetic-v2")


def test_a_call_is_timed_after_it_is_warm() -> None:
    seen: list[int] = []
    found = timed(seen.append, CPU, QUICK)
    assert seen == list(range(QUICK.warm + found["timed"]))
    assert found["p20_ms"] <= found["p50_ms"] <= found["p80_ms"]
    assert found["peak_gib"] is None


# ---- a whole run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(options(tmp_path_factory.mktemp("rows"), "hpsv2.1", "image-reward"), progress=Silent())


def test_rows_are_in_the_file_as_they_are_in_the_report(report: Report) -> None:
    assert report.rows == [json.loads(line) for line in report.path.read_text().splitlines()]
    assert not report.wrong + report.missing
    timed_rows = [one for one in report.rows if one["mode"] != "compare"]
    assert {one["name"] for one in timed_rows} == {"hpsv2.1", "image-reward"}
    for one in timed_rows:
        assert (one["suite"], one["problem"], one["device"], one["checked"]) == ("rewards", "tiny", "cpu", True)
        assert one["images_per_s"] == pytest.approx(one["size"] / one["p50_ms"] * 1e3)
        if one["impl"] == OURS:
            share = one["gflop_per_image"] * one["images_per_s"] / 1e3 / one["matmul_tflops"]
            assert one["matrix_fraction"] == pytest.approx(share)
    assert all(reached.verdict == "not measured" for reached in report.gates)


def test_ours_is_held_against_plain_transformers_of_the_same_batch(report: Report) -> None:
    clip = [one for one in report.rows if one["name"] == "hpsv2.1"]
    (checked,) = [one for one in clip if one["mode"] == "compare"]
    assert checked["impl"] == PLAIN
    assert checked["deviation"]["largest"] < 1e-6 < checked["deviation"]["spread"]
    theirs = {one["batch"]: one["p50_ms"] for one in clip if one["impl"] == PLAIN and one["mode"] == "score"}
    mine = [one for one in clip if one["impl"] == OURS and one["mode"] == "score"]
    assert {one["batch"] for one in mine} == set(theirs) == {1, 2}
    for one in mine:
        assert one["versus"] == {PLAIN: pytest.approx(theirs[one["batch"]] / one["p50_ms"])}


def test_tables_have_a_line_for_each_row_and_even_columns(report: Report) -> None:
    for cells in (speed_table(report.rows), deviation_table(report.rows)):
        assert len({len(line) for line in cells}) == 1
    assert len(speed_table(report.rows)) + len(deviation_table(report.rows)) == len(report.rows) + 2
    bad = report.rows[-1] | {"failed": "out of memory"}
    assert speed_table([bad])[1][3] == "failed"
    label = f"{bad['name']} {bad['impl']} {bad['dtype']} {bad['case']}"
    assert failures([bad, bad]) == [f"failed, out of memory: {label}; {label}"]
    assert speed_table([]) == deviation_table([]) == []


def test_a_wrong_score_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare.ALLOWED, "bfloat16", 1e-9)
    found = run(options(tmp_path, "pickscore", dtype="bfloat16"), progress=Silent())
    mine = [one for one in found.rows if one["impl"] == OURS and one["mode"] != "compare"]
    assert mine
    assert all(one["p50_ms"] is None and one["failed"].startswith("not timed: scores are up to") for one in mine)
    assert any(one["p50_ms"] for one in found.rows if one["impl"] == PLAIN)
    assert len(found.wrong) == 1
    assert found.wrong[0].startswith("pickscore ours bfloat16 sdpa: scores are up to")


def test_a_judge_that_fails_is_a_row_and_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(models.Judge, "call", broken)
    found = run(options(tmp_path, "aesthetic-v2"), progress=Silent())
    assert {one["failed"] for one in found.rows} == {"RuntimeError: no"}
    assert len(found.wrong) == len(found.rows)


def test_a_deadline_leaves_cases_out_and_a_stop_keeps_rows(tmp_path: Path) -> None:
    found = run(options(tmp_path / "late", "mps", "hpsv2.1", deadline_s=0), progress=Silent())
    assert (found.missing, found.rows) == (["mps", "hpsv2.1"], [])
    asked = iter(range(1000))
    with pytest.raises(Interrupted) as stopped:
        run(options(tmp_path / "stop", "aesthetic-v2"), progress=Silent(), should_stop=lambda: next(asked) > 8)
    assert "rewards-cpu-" in stopped.value.hint


def test_without_a_gpu_one_cannot_be_asked_for(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EnvironmentProblem, match="no CUDA device"):
        run(options(tmp_path, "mps", device="cuda"), progress=Silent())


# ---- the authors' packages


def an_environment(folder: Path, package: str) -> Environment:
    versions = {"torch": "2.13.0", "hpsv2x": "1.2.0", "image-reward": "1.5", "torchvision": "0.28.0", "ftfy": "6.3.1"}
    return Environment(package, folder, versions, 0.0)


def test_weights_written_for_hpsv2_are_read_back_the_same(tmp_path: Path) -> None:
    config = models.tiny_config("clip", 99)
    made = random_network("clip", config, device=CPU, dtype=torch.float32)
    official_file.write_hpsv2(made.clip, tmp_path / "HPS.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = {"weights": tmp_path / "HPS.pt", "config": tmp_path / "config.json"}
    read = read_network(OFFICIALS["hpsv2.1"].spec, files)
    mine, theirs = made.state_dict(), read.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        wanted = value if value.ndim == 0 else value.half().float()
        torch.testing.assert_close(theirs[name], wanted, rtol=1e-6, atol=0)


def test_the_packages_vocabulary_becomes_clips_files(tmp_path: Path) -> None:
    folder = tmp_path / "env/lib/python3.11/site-packages/hpsv2/src/open_clip"
    with pytest.raises(EnvironmentProblem, match="no vocabulary"):
        official_file.write_words(tmp_path / "env", tmp_path)
    folder.mkdir(parents=True)
    merges = ["h e", "he l</w>", "é x</w>"]
    with gzip.open(folder / official_file.VOCABULARY, "wt", encoding="utf-8") as file:
        file.write("\n".join(["a line about the file", *merges]))
    words, pairs = official_file.write_words(tmp_path / "env", tmp_path)
    vocabulary = json.loads(words.read_text("utf-8"))
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["he"], vocabulary["hel</w>"]) == (0, 256, 512, 513)
    assert list(vocabulary)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert len(vocabulary) == 512 + 3 + 2
    assert pairs.read_text("utf-8").splitlines()[1:] == merges


def test_without_official_files_image_reward_has_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFT_FAST_REWARDS", str(tmp_path))
    environment = an_environment(tmp_path, "image-reward")
    with (
        open_subject("image-reward", TINY, CPU, environment=environment) as subject,
        Rivals(subject, environment) as on,
    ):
        assert on.package is None
        assert "craft-fast rewards fetch image-reward" in on.notes[0]


def test_a_package_that_is_not_installed_is_an_error_and_one_that_is_not_there_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(tmp_path))
    assert rivals.package_environment("pickscore") is None
    with pytest.raises(EnvironmentProblem) as missing:
        run(options(tmp_path, "hpsv2.1", package=True), progress=Silent())
    assert missing.value.hint == "craft-fast rewards install hpsv2"


def test_a_packages_time_is_that_of_its_own_score_a_picture_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        """Its clock is its own: what the way there takes does not count."""

        seconds, peak_bytes, calls = 0.0, 0, 0
        provenance = Provenance("package hpsv2x 1.2.0", "")

        def score_own(self, images: list[torch.Tensor], prompts: list[str]) -> torch.Tensor:
            assert len(images) == len(prompts) == 1
            self.calls += 1
            self.seconds += 0.5
            self.peak_bytes = 3 * 2**30
            return torch.zeros(1)

        def rest(self) -> None:
            self.calls = -self.calls

    with open_subject("hpsv2.1", TINY, CPU) as subject:
        found = Rivals(subject, None)
        found.package = Package()  # type: ignore[assignment]
        fields = found.measure(Case("hpsv2.1", PACKAGE, 16, "amp"), TINY, CPU, QUICK, lambda: None)
    assert fields["p50_ms"] == pytest.approx(16 * 500)
    assert (fields["peak_gib"], fields["timed"], fields["package"]) == (3.0, 2, "package hpsv2x 1.2.0")
    assert found.package.calls == -3  # one to load, and it was ended


def test_published_sizes_are_the_full_sizes_but_for_where_texts_end() -> None:
    config = models._full_config("hpsv2.1", 627)
    changed = {
        key for key, value in config["text_config"].items() if value != published.CLIP_VIT_H["text_config"][key]
    }  # fmt: skip
    assert changed == {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert config["vision_config"] == published.CLIP_VIT_H["vision_config"]
