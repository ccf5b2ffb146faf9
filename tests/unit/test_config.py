"""Settings: presets, layers, every error at once, YAML that reads back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from craft_fast.config import (
    OFFICIAL_REWARDS,
    REWARD_FAMILIES,
    EngineSettings,
    GenerateSettings,
    RewardSettings,
    Settings,
    TrainSettings,
)
from craft_fast.errors import ConfigError
from craft_fast.settings_io import field_docs, load_settings, preset_names, render_yaml, section_digest
from craft_fast.settings_yaml import dump_inline, parse_yaml


def failing(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(**arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    return str(caught.value)


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- layers


def test_file_goes_over_preset_and_set_goes_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  rank: 4\n  steps: 7\n")
    found = load_settings("sdxl", path, ["train.rank=9"])
    assert (found.train.rank, found.train.steps, found.train.learning_rate) == (9, 7, 1e-4)


def test_file_may_name_its_preset(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: sdxl\nseed: 5\n")
    found = load_settings("tiny", path)
    assert (found.seed, found.generate.height_px) == (5, 1024)


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("train.learning_rate=1e-5", "learning_rate", 1e-5),
        ("train.learning_rate=3", "learning_rate", 3.0),
        ("train.min_snr_gamma=null", "min_snr_gamma", None),
        ("train.target_modules=[to_q, to_k]", "target_modules", ["to_q", "to_k"]),
        ("train.gradient_checkpointing=true", "gradient_checkpointing", "all"),
        ("train.gradient_checkpointing=false", "gradient_checkpointing", "none"),
        ("train.gradient_checkpointing=auto", "gradient_checkpointing", "auto"),
    ],
)
def test_set_reads_yaml_values(option: str, key: str, value: object) -> None:
    assert getattr(load_settings(overrides=[option]).train, key) == value


@pytest.mark.parametrize("text", ["007", "1e3", "true", "no", "12:30", "2024-01-01", "a=b"])
def test_set_keeps_a_text_that_looks_like_something_else(text: str) -> None:
    found = load_settings(overrides=[f"report.title={text}"])
    assert found.report.title == text


def test_null_takes_a_reward_out() -> None:
    found = load_settings(overrides=["rewards.h=null", "filter.rewards=[p, a]"])
    assert "h" not in found.rewards
    assert "p" in found.rewards


def test_a_reward_can_be_changed_in_part() -> None:
    found = load_settings(overrides=["rewards.p.weight=0.5"])
    assert found.rewards["p"].weight == 0.5
    assert found.rewards["p"].kind == "clip"


# ---- errors


def test_all_errors_come_at_once_each_with_key_value_and_what_is_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  rank: -1\n  rnk: 3\nexport:\n  name: ../x\n")
    text = failing(
        config=path, overrides=["train.steps=true", "generate.scheduler=eular", "filter.rewards=[h, q]", "foo"]
    )
    assert text.startswith("7 settings are not right")
    assert "train.rank: found -1; must be greater than or equal to 1" in text
    assert "line 2" in text
    assert "train.rnk: unknown key" in text
    assert "did you mean train.rank?" in text
    assert "export.name: found '../x'" in text
    assert "train.steps: found True; must be a" in text
    assert "generate.scheduler: found 'eular'; must be 'dpmpp_2m', 'euler' or 'ddim'" in text
    assert "did you mean euler? (--set)" in text
    assert "filter.rewards: found 'q', which is not among rewards; must be among h, p, a" in text
    assert "--set foo: must look like train.rank=32" in text


@pytest.mark.parametrize(
    ("option", "guess"),
    [
        ("train.rnak=3", "train.rank"),
        ("rank=3", "train.rank"),
        ("trian.rank=3", "train"),
        ("guidance_scale=3", "generate.guidance_scale"),
        ("rewards.h.wieght=1", "rewards.h.weight"),
        ("expand.slots.background.choice=[a]", "expand.slots.background.choices"),
    ],
)
def test_unknown_keys_are_answered_with_the_closest_known(option: str, guess: str) -> None:
    assert f"did you mean {guess}?" in failing(overrides=[option])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_must_be_finite(value: str) -> None:
    assert "rewards.h.weight: found" in failing(overrides=[f"rewards.h.weight={value}"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["filter.rewards=[h, oracle]"], "'oracle', which is held out"),
        (["filter.rewards=[h, h]"], "each name may be there once"),
        (["expand.kind=file"], "expand.file: found nothing"),
        (["expand.kind=openai"], "expand.model: found nothing"),
        (["expand.kind=openai", "expand.model=m", "expand.base_url=ftp://x"], "must begin with http"),
        (["expand.kind=openai", "expand.model=m", "expand.instruction=go"], "found no {prompt}"),
        (["expand.templates=[sharp]"], "must hold {prompt} once"),
        (["expand.templates=['{prompt} {mood}']"], "found {mood}; must be one of {prompt}, {background}"),
        (["expand.templates=[]"], "expand.templates: found none"),
        (["generate.width_px=100"], "must be a multiple of 8"),
        (["generate.guidance_interval=[0.8, 0.2]"], "guidance_interval: found [0.8, 0.2]; must be [begin, end]"),
        (["generate.guidance_interval=[0.5, 0.5]"], "with 0 <= begin < end <= 1"),
        (["generate.guidance_interval=[-0.1, 1]"], "with 0 <= begin < end <= 1"),
        (["generate.guidance_interval=[0, 1.5]"], "with 0 <= begin < end <= 1"),
        (["generate.guidance_interval=[0.5]"], "generate.guidance_interval"),
        (["generate.guidance_interval=[0.0, .nan]"], "generate.guidance_interval.1: found nan"),
        (["train.nf4_convs=true", "train.method=lora"], "train.nf4_convs: found true with train.method lora"),
        (["train.nf4_convs=true", "train.method=full"], "must be false, or train.method qlora"),
        (["train.target_modules=[to_q, to_q]"], "train.target_modules: found ['to_q', 'to_q']"),
        (["model.zero_terminal_snr=yes", "model.prediction_type=epsilon"], "model.zero_terminal_snr: found yes"),
        (["train.gradient_checkpointing=1"], "train.gradient_checkpointing: found 1; must be 'auto', 'all' or 'none'"),
        (["engine.vram_gib=0"], "engine.vram_gib: found 0; must be greater than 0"),
        (["engine.residnet=never"], "did you mean engine.resident?"),
        (["vram_gib=8"], "did you mean engine.vram_gib?"),
        (["model.device=gpu"], "must be auto, cpu, cuda or cuda:N"),
        (["rewards.h.path="], "rewards.h.path: found nothing"),
        (["rewards.oracle.path=somewhere"], "must be module:callable"),
        (["rewards.x/y={kind: clip, path: z}"], "found the name 'x/y'"),
        (["rewards.x={kind: hpsv21}"], "rewards.x.kind: found 'hpsv21'; must be one of hpsv2.1, hpsv2.0, pickscore"),
        (["rewards.x={kind: hpsv21}"], "did you mean hpsv2.1?"),
        (["rewards.x={kind: PickScore}"], "did you mean pickscore?"),
        (["rewards.x={kind: imagereward}"], "did you mean image"),
        (["rewards.x={kind: zzzz}"], "or an installed plug-in's name"),
        (["rewards.x={kind: image_reward}"], "or package:NAME/FOLDER for kind image_reward; a published model needs"),
        (["rewards.x={kind: function}"], "rewards.x.path: found nothing; must be module:callable"),
        (["rewards.x={kind: pickscore, backend: package}"], "rewards.x.backend: found package with kind pickscore"),
        (["rewards.h.backend=package"], "must be native, or kind hpsv2.1, hpsv2.0, image-reward"),
        (["rewards.h.backend=native_one"], "rewards.h.backend: found 'native_one'"),
        (["rewards.h.options={alpha: 1}"], "rewards.h.options: found alpha with kind clip; must be empty"),
        (["rewards.x={kind: hpsv2.1, options: {version: 2}}"], "only plug-ins take options"),
        (["score.dtype=half"], "score.dtype: found 'half'"),
    ],
)
def test_settings_that_contradict_one_another(options: list[str], said: str) -> None:
    assert said in failing(overrides=options)


@pytest.mark.parametrize(
    "options",
    [
        ["train.nf4_convs=true", "train.method=qlora"],
        ["train.nf4_convs=true", "train.method=auto"],
        ["generate.guidance_interval=[0.2, 0.8]"],
        ["generate.guidance_interval=[0, 1]"],
        ["model.zero_terminal_snr=yes", "model.prediction_type=v_prediction"],
        ["train.method=full", "engine.lora=fused"],
        *([f"rewards.x={{kind: {kind}}}"] for kind in OFFICIAL_REWARDS),
        *([f"rewards.x={{kind: {kind}, path: somewhere}}"] for kind in (*OFFICIAL_REWARDS, *REWARD_FAMILIES)),
        *([f"rewards.x={{kind: {kind}, backend: package}}"] for kind in ("hpsv2.1", "hpsv2.0", "image-reward")),
    ],
)
def test_settings_that_go_together(options: list[str]) -> None:
    load_settings(overrides=options)


def test_all_that_is_wrong_with_rewards_is_said_at_once() -> None:
    options = ["rewards.x={kind: clip}", "rewards.y={kind: hps}", "rewards.z={kind: mps, backend: package}"]
    text = failing(overrides=options)
    assert all(word in text for word in ("rewards.x.path", "rewards.y.kind", "rewards.z.backend"))


def test_settings_of_the_last_version_load() -> None:
    """A run that was begun with 0.1.0 goes on: no engine section, and a bool that is a word now."""
    path = Path(__file__).with_name("settings_0_1_0.yaml")
    assert "engine:" not in path.read_text(encoding="utf-8")
    found = load_settings(config=path)
    assert (found.train.gradient_checkpointing, found.train.method, found.train.rank) == ("all", "qlora", 8)
    assert found.engine == EngineSettings()
    assert list(found.rewards) == ["h", "p", "image_reward"]


def test_without_a_training_reward_there_is_nothing_to_weigh_by() -> None:
    options = [f"rewards.{name}=null" for name in "hpa"] + ["filter.rewards=[]"]
    assert "found none that is not held out" in failing(overrides=options)


# ---- hostile and broken files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {rank: 1, rank: 2}", "'rank' is here a second time"),
        ("train:\n  rank: 1\n  rank: 2\n", "line 3"),
        ("a: &a [x]\nb: [*a, *a]", "anchors and aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "anchors and aliases"),
        ("x: !!python/object/apply:os.system ['true']", "python/object/apply:os.system"),
        ("x: !!binary aGk=", "tag"),
        ("seed: 1\n---\nseed: 2\n", "second document"),
        ("[" * 500, "nested deeper"),
        ("a: " + "{a: " * 200, "nested deeper"),
        ("train: [", "line 1"),
        ("? [a]\n: 1", "a key must be a word"),
        ("seed: " + "9" * 5000, "a number of 5000 digits"),
        ("just words", "must be sections"),
        (b"seed: \xff", "not UTF-8"),
        ("seed: 1\x00", "special characters"),
    ],
)
def test_files_that_are_not_plain_settings_are_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in failing(config=write(tmp_path, text))


def test_a_ten_megabyte_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    assert "too large" in failing(config=write(tmp_path, b"#" * 10_000_000))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "there is no such file" in failing(config=tmp_path / "none.yaml")
    assert "folder or a device" in failing(config=tmp_path)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings(config=write(tmp_path, "# nothing\n")) == load_settings()


def test_a_byte_order_mark_and_crlf_are_no_matter(tmp_path: Path) -> None:
    assert load_settings(config=write(tmp_path, b"\xef\xbb\xbfseed: 3\r\ntrain:\r\n  rank: 2\r\n")).train.rank == 2


# ---- rendering


@pytest.mark.parametrize("preset", preset_names())
def test_rendered_yaml_reads_back_over_any_preset(tmp_path: Path, preset: str) -> None:
    settings = load_settings(preset, overrides=["rewards.a=null", "filter.rewards=[p]", "train.min_snr_gamma=null"])
    assert load_settings(config=write(tmp_path, render_yaml(load_settings(preset)))) == load_settings(preset)
    path = write(tmp_path, render_yaml(settings))
    for other in ("tiny", "sdxl"):
        assert load_settings(other, path) == settings


def test_every_field_is_commented_with_meaning_unit_default_and_source() -> None:
    lines = render_yaml(load_settings()).splitlines()
    for doc in field_docs():
        name = doc.key.rpartition(".")[2]
        places = [i for i, line in enumerate(lines) if line.strip().startswith(f"{name}:")]
        comments = [lines[i - 1].strip() for i in places]
        assert any(c.startswith("#") and doc.text.splitlines()[0] in c for c in comments), doc.key
        if doc.unit:
            assert any(f"unit: {doc.unit}" in c for c in comments)
        if doc.source:
            assert any(f"source: {doc.source}" in c for c in comments)
    choices = next(lines[i - 1] for i, line in enumerate(lines) if line.strip().startswith("gradient_checkpointing:"))
    assert "-- auto | all | none -- default: auto" in choices
    assert "default: 16" in next(lines[i - 1] for i, line in enumerate(lines) if line.strip().startswith("rank:"))


def test_rendered_yaml_is_plain_yaml_for_other_readers() -> None:
    settings = load_settings("sdxl")
    data = yaml.safe_load(render_yaml(settings))
    assert data.pop("preset") == "none"
    assert data["expand"] == settings.model_dump()["expand"]


texts = st.text(max_size=60)


@hypothesis_settings(max_examples=150, deadline=None)
@given(texts, texts, st.lists(texts, max_size=4), st.floats(1e-9, 1e3))
@example("a\x85b", "\u2028", ["\r", "\r\n", "\n", "1e-4", "no", "", "\ufeff", "\ud7ff", "\U0001f600", "\x7f"], 1e-9)
def test_any_text_and_number_reads_back(title: str, negative: str, words: list[str], rate: float) -> None:
    for value in (title, words, {"a": negative}, rate):
        try:
            read, _ = parse_yaml(dump_inline(value), where="test")
        except ConfigError:
            # Characters that YAML itself has no place for come escaped; nothing else may fail.
            raise AssertionError(f"{value!r} does not read back") from None
        assert read == value


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_no_text_makes_the_parser_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_yaml(text, where="test")


# ---- digests


def test_a_section_digest_is_of_values_not_of_order() -> None:
    one = Settings(rewards={"a": RewardSettings(kind="clip", path="x"), "b": RewardSettings(kind="clip", path="y")})
    two = Settings(rewards=dict(reversed(one.rewards.items())))
    assert section_digest(one) == section_digest(two)


def test_a_section_digest_changes_with_a_value_and_not_with_an_excluded_one() -> None:
    base, other = GenerateSettings(), GenerateSettings(batch_size=3)
    assert section_digest(base) != section_digest(other)
    assert section_digest(base, ["batch_size"]) == section_digest(other, ["batch_size"])
    assert section_digest(TrainSettings(rank=3)) != section_digest(TrainSettings(rank=4))
