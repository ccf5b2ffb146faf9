#!/usr/bin/env bash
# What of the reward models only a CUDA device shows, in less than ten minutes: the tests, then the measurements.
#
#     bench/gpu_rewards.sh [FOLDER]        folder for logs and rows, bench/results unless given
#
# PYTHON=...               the interpreter, python3 unless given; nothing is installed, the sources are put on its path
# CRAFT_BENCH_COMMIT=...   names the commit in the rows where the sources travelled without their history
# BUDGET_S=...             seconds for the whole, 540 unless given; cases begun no later, those of asked figures first
# PACKAGE=yes              hold HPSv2.1 against hpsv2's own score(), too; it must be installed (craft-fast rewards install)
# SIZE=tiny                a dry run: tiny networks, quickly, on whatever device is there
#
# Nothing that fails stops the rest; the exit code is not 0 then.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-bench/results}
budget=${BUDGET_S:-540}
size=${SIZE:-full}
bench=(--out "$out" --size "$size" --device cuda)
tests=(-m gpu)
if [ "$size" != full ]; then
  bench=(--out "$out" --size "$size" --quick)
fi
package=()
if [ "${PACKAGE:-}" = yes ]; then
  package=(--package)
fi
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/cli:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false PYTHONUTF8=1 HF_HUB_OFFLINE=1
unset CRAFT_KERNELS_IMPL TRITON_INTERPRET

source bench/gpu_part.sh
left() { # RESERVE_S: seconds until the end of the budget, less what comes after; 30 at least
  local seconds=$((budget - SECONDS - $1))
  echo $((seconds > 30 ? seconds : 30))
}

mapfile -t files < <(ls tests/gpu/test_rewards*_gpu.py tests/gpu/test_towers_gpu.py 2>/dev/null)
part "tests marked gpu: rewards" 150 "$out/gpu-rewards-tests.log" \
  "$python" -m pytest -q "${tests[@]}" -p no:cacheprovider "${files[@]}"

# The judges that training runs with, of which figures are asked; then those that only judge the result.
seconds=$(left 200)
part "craft-fast bench rewards: training" $((seconds + 60)) "$out/gpu-rewards-training.log" \
  "$python" -m craft_cli bench rewards hpsv2.1 pickscore aesthetic-v2 "${package[@]}" "${bench[@]}" --deadline "$seconds"
seconds=$(left 60)
part "craft-fast bench rewards: held out" $((seconds + 60)) "$out/gpu-rewards-held-out.log" \
  "$python" -m craft_cli bench rewards image-reward mps clipscore-l14 clipscore-b32 "${bench[@]}" --deadline "$seconds"
part "craft-fast doctor" 60 "$out/gpu-rewards-doctor.log" "$python" -m craft_cli doctor

echo "== all: $SECONDS s, $([ "$failed" -eq 0 ] && echo "nothing failed" || echo "something failed, see above"), results in $out"
exit "$failed"
