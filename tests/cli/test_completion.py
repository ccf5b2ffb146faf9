"""Shell completion: runs, presets, stages, settings and their values, in every shell, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from craft_cli import completion
from craft_cli.main import main
from craft_fast.config import OFFICIAL_REWARDS
from craft_fast.pipeline import STAGES
from craft_fast.settings_io import field_docs, preset_names

HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers", "sqlite3.dbapi2", "click"}
# What a line is completed to, word by word, and some of what must be offered.
OFFERED = (
    (("run", "--preset", "sdxl-2"), ["sdxl-24gb"]),
    (("run", "--until", "ex"), ["expand", "export"]),
    (("train", "--name", ""), ["sea", "sky"]),
    (("train", "--runs", "other", "--name", ""), ["lake"]),
    (("train", "--runs=other", "-n", ""), ["lake"]),
    (("compare", "sea", ""), ["sky"]),
    (("compare", ""), ["sea", "sky"]),
    (("try", "s"), ["sea", "sky"]),
    (("lora", "check", "sk"), ["sky"]),
    (("lora", "merge", "sea:0.5", ""), ["sky"]),
    (("lora", "convert", "sea", "--to", ""), ["kohya", "diffusers"]),
    (("lora", "convert", "sea", "--dtype", "f"), ["float32", "float16"]),
    (("dataset", "out", "--caption", ""), ["base", "expanded"]),
    (("train", "--set", "train.ra"), ["train.rank=", "train.rank=16"]),
    (("train", "--set", "train.weight_"), [f"train.weight_{word}=" for word in ("clip", "temperature", "decay")]),
    (("train", "--set", "engine.resident="), [f"engine.resident={word}" for word in ("auto", "always", "never")]),
    (("train", "--set=engine.resident=a"), ["engine.resident=auto", "engine.resident=always"]),
    (("train", "-s", "engine.graph="), ["engine.graph=true", "engine.graph=false"]),
    (("train", "-s", "rewards.h.kind=hps"), ["rewards.h.kind=hpsv2.1", "rewards.h.kind=hpsv2.0"]),
    (("train", "-s", "train.gradient_checkpointing=n"), ["train.gradient_checkpointing=none"]),
    (("train", "--vram", "1"), ["10", "11", "12", "16"]),
    (("rewards", "fetch", "pick"), ["pickscore"]),
    (("rewards", "verify", "mp"), ["mps"]),
    (("rewards", "install", ""), ["hpsv2", "image-reward"]),
    (("rewards", "verify", "--device", "c"), ["cpu", "cuda"]),
    (("rewards", "score", "x", "--format", "j"), ["jsonl", "json"]),
    (("bench", "kernels", "ge"), ["geglu"]),
    (("bench", "kernels", "--device", "cu"), ["cuda"]),
    (("bench", "sdxl", "ste"), ["steps"]),
    (("bench", "rewards", "clip"), ["clipscore-l14", "clipscore-b32"]),
    (("rewards", "score", "x", "--reward", "aes"), ["aesthetic-v2"]),
    (("ev",), ["evaluate"]),
    (("lora", "re"), ["resize"]),
    (("train", "--off"), ["--offline"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, and another folder of runs in it."""
    root = tmp_path_factory.mktemp("shell")
    for run in ("runs/sea", "runs/sky", "other/lake"):
        (root / run).mkdir(parents=True)
        (root / run / "manifest.sqlite").touch()
    (root / "runs/no-run").mkdir()
    return root


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def offered(*words: str, shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the shell is offered for the last of the words."""
    monkeypatch.setenv("_CRAFT_FAST_COMPLETE", f"complete_{shell}")
    if shell == "bash":
        taken_apart = [part for word in ("craft-fast", *words) for part in bash_words(word)]
        monkeypatch.setenv("COMP_WORDS", "\n".join(taken_apart))
        monkeypatch.setenv("COMP_CWORD", str(len(taken_apart) - 1))
    else:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(["craft-fast", *words]))
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert all(shell != "fish" or not line.startswith("-") or "\t" in line for line in lines)
    return [line.partition("\t")[0] for line in lines]  # fish: the text of an option stands behind a tab


def bash_words(word: str) -> list[str]:
    """As COMP_WORDBREAKS takes a word apart."""
    parts: list[str] = [""]
    for letter in word:
        if letter in "=:":
            parts += [letter, ""]
        else:
            parts[-1] += letter
    return [part for part in parts if part] or [""]


def after_break(word: str, current: str) -> str:
    """What bash puts in for ``word``: only what stands behind the last break that was typed."""
    typed = current.partition("=")[2] if current.startswith("-") and "=" in current else current
    kept = max(typed.rfind("="), typed.rfind(":")) + 1
    return word[kept:]


@pytest.mark.parametrize("shell", ["fish", "bash"])
@pytest.mark.parametrize(("words", "expected"), OFFERED, ids=lambda value: " ".join(value))
def test_values_are_completed(
    words: tuple[str, ...], expected: list[str], shell: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = offered(*words, shell=shell, monkeypatch=monkeypatch, capsys=capsys)
    assert found == [after_break(word, words[-1]) if shell == "bash" else word for word in expected]


def test_runs_are_those_of_the_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CRAFT_RUNS", "other")
    assert offered("train", "--name", "", shell="fish", monkeypatch=monkeypatch, capsys=capsys) == ["lake"]


def test_zsh_is_offered_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = offered("run", "--preset", "sdxl-2", shell="zsh", monkeypatch=monkeypatch, capsys=capsys)
    assert found == ["""_arguments '*: :(("sdxl-24gb"))'"""]
    # Nothing of ours: the shell's own files.
    assert offered("run", "--config", "x", shell="zsh", monkeypatch=monkeypatch, capsys=capsys) == ["_files"]


def test_every_setting_is_offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = offered("run", "--set", "", shell="fish", monkeypatch=monkeypatch, capsys=capsys)
    assert {f"{doc.key}=" for doc in field_docs()} - set(found) == {"rewards="}
    assert "rewards.oracle.weight=" in found
    found = offered("run", "--preset", "sdxl", "-s", "rewards.", shell="fish", monkeypatch=monkeypatch, capsys=capsys)
    assert {word.split(".")[1] for word in found} == {"h", "p", "a", "image_reward"}


def test_every_value_that_is_offered_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from craft_fast.settings_io import load_settings

    for doc in field_docs():
        if " | " in doc.allowed or isinstance(doc.default, bool):
            words = offered("run", "--set", f"{doc.key}=", shell="fish", monkeypatch=monkeypatch, capsys=capsys)
            assert len(words) > 1
            for word in words:
                more = ["train.method=qlora"] if doc.key == "train.nf4_convs" else []
                more += ["model.prediction_type=v_prediction"] if doc.key == "model.zero_terminal_snr" else []
                more += ["expand.model=x", "expand.file=x"] if doc.key == "expand.kind" else []
                load_settings("tiny", None, [*more, word])


def test_names_are_those_of_the_code() -> None:
    assert completion.STAGES == STAGES
    assert completion.preset_names() == preset_names()
    assert all(word in OFFICIAL_REWARDS for words, found in OFFERED if "fetch" in words for word in found)


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        (["c", "--set", "a"], 2, (["c", "--set", "a"], 2, "")),
        (["c", "--set", "a", "="], 3, (["c", "--set", "a="], 2, "a=")),
        (["c", "--set", "a", "=", "b"], 4, (["c", "--set", "a=b"], 2, "a=")),
        (["c", "--set", "=", "a", "=", "b"], 5, (["c", "--set=a=b"], 1, "--set=a=")),
        (["c", "m", "sea", ":", "0.5"], 5, (["c", "m", "sea:0.5", ""], 3, "")),
        (["c", "-s", "a", "=", "b", "x", "y"], 4, (["c", "-s", "a=b"], 2, "a=")),
        (["c"], 1, (["c", ""], 1, "")),
    ],
)
def test_words_of_bash_are_put_together(words: list[str], at: int, expected: tuple[list[str], int, str]) -> None:
    assert completion.rejoin(words, at) == expected


def _environment(craft_env: dict[str, str], bin_folder: Path) -> dict[str, str]:
    return {**craft_env, "PATH": f"{bin_folder}{os.pathsep}{craft_env['PATH']}", "HOME": str(bin_folder)}


def test_nothing_heavy_is_loaded(craft_env: dict[str, str], folder: Path) -> None:
    """One process answers all the lines above; what it has loaded then is what the worst of them loads."""
    code = (
        "import os, sys\nfrom craft_cli.main import main\n"
        f"for words in {[words for words, _ in OFFERED]!r}:\n"
        "    os.environ['_TYPER_COMPLETE_ARGS'] = ' '.join(['craft-fast', *words])\n"
        "    try: main()\n    except SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    env = {**craft_env, "_CRAFT_FAST_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "craft_cli.completion" in modules
    assert not modules & HEAVY


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_itself(craft_env: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """The script that the command prints, in a real bash."""
    program = tmp_path / "craft-fast"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m craft_cli "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_CRAFT_FAST_COMPLETE=source_bash craft-fast)"\n'
        "complete -p craft-fast\n"
        "COMP_WORDS=(craft-fast run -p \"'a red'\" --set engine.resident = a); COMP_CWORD=7\n"
        '_craft_fast_completion craft-fast; echo "[${COMPREPLY[*]}]"\n'
    )
    env = _environment(craft_env, tmp_path)
    done = subprocess.run(["bash", "-c", script], env=env, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["complete -o default -F _craft_fast_completion craft-fast", "[auto always]"]


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".bash_completions/craft-fast.sh"),
        ("zsh", ".zfunc/_craft-fast"),
        ("fish", ".config/fish/completions/craft-fast.fish"),
    ],
)
def test_it_installs_itself(
    shell: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/usr/bin/{shell}"))
    monkeypatch.setattr(sys, "argv", ["craft-fast", "--install-completion"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "installed in" in capsys.readouterr().out
    assert f"complete_{shell}" in (tmp_path / file).read_text()
