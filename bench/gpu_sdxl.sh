#!/usr/bin/env bash
# What of the SDXL engine only a CUDA device shows, in three parts of less than ten minutes each.
#
#     bench/gpu_sdxl.sh [FOLDER] PART        folder for logs and rows, bench/results unless given; part 1, 2 or 3
#
#   1  tests marked gpu, then training steps at batch 1 and 4 beside the reference loop, and the peaks asked for
#   2  batch 8, NF4 convolutions, more of full fine-tune, memory caps, torch.compile
#   3  images, a whole run by stage, what plan says beside what is measured; a real small run from prompts to report
#
# PYTHON=...               the interpreter, python3 unless given; nothing is installed, the sources are put on its path
# CRAFT_BENCH_COMMIT=...   names the commit in the rows where the sources travelled without their history
# BUDGET_S=...             seconds for the part, 540 unless given; cases begun no later, those of asked figures first
# SIZE=tiny                a dry run: the packaged tiny model, quickly, on whatever device is there
#
# Nothing that fails stops the rest; the exit code is not 0 then.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() {
  echo "usage: bench/gpu_sdxl.sh [FOLDER] PART, where PART is 1, 2 or 3" >&2
  exit 2
}
case $# in
  1) out=bench/results which=$1 ;;
  2) out=$1 which=$2 ;;
  *) usage ;;
esac
[[ $which =~ ^[123]$ ]] || usage
python=${PYTHON:-python3}
budget=${BUDGET_S:-540}
size=${SIZE:-full}
bench=(--out "$out" --size "$size" --device cuda)
if [ "$size" != full ]; then
  bench=(--out "$out" --size "$size" --quick)
fi
mkdir -p "$out"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/cli:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false PYTHONUTF8=1 HF_HUB_OFFLINE=1
unset CRAFT_KERNELS_IMPL TRITON_INTERPRET

source bench/gpu_part.sh
measure() { # LEFT_S GROUP...: these groups, begun no later than LEFT_S from now
  local left=$1
  shift
  left=$((left > 30 ? left : 30))
  part "craft-fast bench sdxl $*" $((left + 60)) "$out/gpu-sdxl-$which.log" \
    "$python" -m craft_cli bench sdxl "$@" "${bench[@]}" --deadline "$left"
}

case $which in
  1)
    part "tests marked gpu" 200 "$out/gpu-sdxl-tests.log" \
      "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu tests/kernels/test_adamw8bit_rounding.py \
      tests/kernels/test_adamw8bit_flat.py
    measure $((budget - SECONDS - 60)) steps
    ;;
  2)
    measure $((budget - SECONDS - 60)) large variants caps compile
    ;;
  3)
    measure $((budget - SECONDS - 150)) generation headline plan
    part "craft-fast doctor" 60 "$out/gpu-sdxl-doctor.log" "$python" -m craft_cli doctor
    part "craft-fast run: prompts to report" 120 "$out/gpu-sdxl-run.log" \
      "$python" -m craft_cli run --runs "$runs" --name gpu --max-images 96 --set filter.target_samples=16 \
      --set train.steps=20 --set train.micro_batch_size=8 --set evaluate.prompts=8 --set report.grid_prompts=4
    part "craft-fast verify" 60 "$out/gpu-sdxl-verify.log" "$python" -m craft_cli verify --runs "$runs" --name gpu
    ;;
esac

echo "== all: $SECONDS s, $([ "$failed" -eq 0 ] && echo "nothing failed" || echo "something failed, see above"), results in $out"
exit "$failed"
