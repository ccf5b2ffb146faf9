"""Controls of the method on the embedded world: one row a variant and seed, through the real pipeline.

    python bench/method.py controls --seeds 0 1 2 --prompts 1000

Every variant of a seed starts from a copy of the same run folder, so candidates and base pictures are shared and
the comparison is paired. Rows go to ``bench/results/method-<device>-<date>.jsonl``; the table is printed at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Fields of every benchmark row (docs/design.md section 7); those of kernels do not apply here.
BLANK = dict.fromkeys(
    ("impl", "case", "p20_ms", "p50_ms", "p80_ms", "gbps", "copy_fraction", "peak_gib", "versus", "triton"), None
) | {"dtype": "float32", "mode": "run"}
METRICS = ("oracle", "oracle_alignment", "oracle_clean", "image_reward", "h", "p", "a")

# The defaults were chosen on ``tune``, with a seed that the controls do not use (docs/lab-book.md).
# Rows of 2026-11-23 were made while ``select=first`` was the default: their "craft (default)" is "select first" here,
# and their "select top" is the default of today.
CONTROLS: dict[str, list[str]] = {
    "craft (default)": [],
    "unfiltered SFT": ["filter.rewards=[]", "train.weighting=uniform"],
    "filter h": ["filter.rewards=[h]"],
    "filter p": ["filter.rewards=[p]"],
    "filter h+a": ["filter.rewards=[h,a]"],
    "keep all": ["filter.keep=all"],
    "weights uniform (filtered SFT)": ["train.weighting=uniform"],
    "weights exponential": ["train.weighting=exponential"],
    "weights clipped": ["train.weighting=clipped"],
    "weights signed": ["train.weighting=signed"],
    "select first": ["filter.select=first", "generate.max_images=null"],
    "300 steps": ["train.steps=300"],
}
_T = "train.learning_rate="
TUNE: dict[str, list[str]] = {
    "lr 3e-4": [_T + "3e-4"],
    "lr 1e-3": [_T + "1e-3"],
    "lr 3e-4 x600": [_T + "3e-4", "train.steps=600"],
    "lr 1e-3 x150": [_T + "1e-3", "train.steps=150"],
    "lr 1e-3 x600": [_T + "1e-3", "train.steps=600"],
    "lr 5e-4": [_T + "5e-4"],
    "top 640": [_T + "5e-4", "filter.select=top", "generate.max_images=640"],
    "top 640 uniform": [_T + "5e-4", "filter.select=top", "generate.max_images=640", "train.weighting=uniform"],
    "top 640 lr 1e-3": [_T + "1e-3", "filter.select=top", "generate.max_images=640"],
    "uniform": [_T + "5e-4", "train.weighting=uniform"],
    "exponential": [_T + "5e-4", "train.weighting=exponential"],
    "both": [_T + "5e-4", "train.condition_on=both"],
    "rank 4": [_T + "5e-4", "train.rank=4", "train.lora_alpha=4"],
    "ff too": [_T + "5e-4", "train.target_modules=[to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2]"],
    "no prompt dropout": [_T + "5e-4", "train.prompt_dropout=0"],
    "min-snr 5": [_T + "5e-4", "train.min_snr_gamma=5"],
    "200 samples": [_T + "5e-4", "filter.target_samples=200"],
    "unfiltered": [_T + "5e-4", "filter.rewards=[]", "train.weighting=uniform"],
    "unquantised lora": [_T + "5e-4", "train.method=lora"],
    "full 1e-4": [_T + "1e-4", "train.method=full"],
}
SETS = {"controls": CONTROLS, "tune": TUNE}


def common(options: argparse.Namespace, seed: int) -> list[str]:
    """Settings that all variants share."""
    return [
        f"seed={seed}", f"evaluate.prompts={options.prompts}", "train.sample_every=0", "model.dtype=float32",
        f"model.device={options.device}", "generate.batch_size=128", "score.batch_size=256", *options.set,
    ]  # fmt: skip


def run_one(task: tuple[Path, str, list[str], int, argparse.Namespace]) -> dict[str, Any]:
    """Run one variant to its evaluation; a failure becomes a row that says so."""
    root, name, overrides, seed, options = task
    import torch

    from craft_fast.errors import CraftError
    from craft_fast.pipeline import run_pipeline
    from craft_fast.settings_io import load_settings

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    row: dict[str, Any] = {"suite": "method", "name": name, "seed": seed, "overrides": overrides, "failed": None}
    try:
        summary = run_pipeline(root, load_settings(overrides=[*common(options, seed), *overrides]), until="evaluate")
    except CraftError as error:
        row["failed"] = f"{error.what} {error.why}"
    else:
        row |= {"accepted": summary.accepted, "images": summary.images, "acceptance": dict(summary.acceptance)}
        row["evaluation"] = {
            e.metric: {
                k: round(getattr(e, k), 5) for k in ("base_mean", "tuned_mean", "win_rate", "ci_low", "ci_high", "n")
            }
            for e in summary.evaluation
        }
        row["stage_s"] = {stage.name: round(stage.seconds, 2) for stage in summary.stages}
    row["seconds"] = round(time.monotonic() - started, 1)
    print(f"{name} seed {seed}: {row['seconds']} s {row['failed'] or ''}", file=sys.stderr, flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds of tuned minus base, in points for the oracle's rates, and the win rate on image_reward."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [f"{'variant':32}{'n':>3}{'acc':>5} " + "".join(f"{m:>18}" for m in METRICS) + f"{'win IR':>8}"]
    for name in names:
        good = [row for row in rows if row["name"] == name and not row["failed"]]
        if not good:
            lines.append(f"{name:32}  failed: {next(row['failed'] for row in rows if row['name'] == name)[:90]}")
            continue
        cells = []
        for metric in METRICS:
            gains = [row["evaluation"][metric]["tuned_mean"] - row["evaluation"][metric]["base_mean"] for row in good]
            tuned = statistics.mean(row["evaluation"][metric]["tuned_mean"] for row in good)
            cells.append(f"{tuned:9.3f} {statistics.mean(gains):+8.3f}")
        win = statistics.mean(row["evaluation"]["image_reward"]["win_rate"] for row in good)
        accepted = statistics.mean(row["accepted"] for row in good)
        lines.append(f"{name:32}{len(good):3d}{accepted:5.0f} " + "".join(cells) + f"{win:8.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--only", nargs="+", help="variants by name")
    parser.add_argument("--set", action="append", default=[], help="a setting for all variants")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument("--work", type=Path, default=Path("runs/method"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    variants = {k: v for k, v in SETS[options.which].items() if not options.only or k in options.only}
    first = next(iter(variants))
    pools = {seed: options.work / f"seed{seed}" / "pool" for seed in options.seeds}
    spawn = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    out = options.out or Path("bench/results") / f"method-{device_name()}-{datetime.date.today()}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with spawn.Pool(options.processes) as pool:
        starts = [(pools[seed], first, variants[first], seed, options) for seed in options.seeds]
        for row in pool.imap_unordered(run_one, starts):
            rows.append(row)
            keep(out, row)
        tasks = []
        for index, (name, overrides) in enumerate(variants.items()):
            for seed in options.seeds if index else []:
                root = pools[seed].parent / f"v{index}"
                if not root.exists():
                    shutil.copytree(pools[seed], root)
                tasks.append((root, name, overrides, seed, options))
        for row in pool.imap_unordered(run_one, tasks):
            rows.append(row)
            keep(out, row)
    order = {name: i for i, name in enumerate(variants)}
    print(table(sorted(rows, key=lambda row: (order[row["name"]], row["seed"]))))


def device_name() -> str:
    """Short name of the device, for file names."""
    import torch

    return torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"


def keep(out: Path, row: dict[str, Any]) -> None:
    """Append a row with what it was measured on."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    row |= BLANK | {
        "device": device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "date": str(datetime.date.today()),
    }
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
