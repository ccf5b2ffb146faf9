#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go and under 8 minutes: the tests, then the microbenchmarks.
#
#     bench/gpu.sh [FOLDER]        folder for logs, rows and plots; bench/results unless given
#
# PYTHON=...               the interpreter, python3 unless given; nothing is installed, the sources are put on its path
# CRAFT_BENCH_COMMIT=...   names the commit in the rows where the sources travelled without their history
# BUDGET_S=...             seconds for the whole, 470 unless given; cases begun no later, those of asked figures first
#
# Tests of an op are run once, by the benchmark, before it measures the op; the others come first. Red tests do not stop
# the rest; the exit code is not 0 then.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-bench/results}
budget=${BUDGET_S:-470}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/cli:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false PYTHONUTF8=1
unset CRAFT_KERNELS_IMPL TRITON_INTERPRET

source bench/gpu_part.sh

# Test files of ops are run by the benchmark itself; see craft_bench/verify.py.
mapfile -t others < <("$python" - <<'PY'
from pathlib import Path

from craft_bench.registry import OPS

for path in sorted(Path("tests/kernels").glob("test_*.py")):
    if not any(path.name.startswith(f"test_{op}") for op in OPS):
        print(path)
PY
)
part "tests: what ops share, and tests/gpu" 150 "$out/gpu-tests.log" \
  "$python" -m pytest -q -m gpu -p no:cacheprovider "${others[@]}" tests/gpu

left=$((budget - SECONDS))
part "craft-fast bench kernels: tests of each op, then its timing" $((left > 30 ? left + 60 : 90)) "$out/gpu-bench.log" \
  "$python" -m craft_cli bench kernels --device cuda --out "$out" --deadline $((left > 45 ? left - 15 : 30))

echo "== all: $SECONDS s, $([ "$failed" -eq 0 ] && echo "nothing failed" || echo "something failed, see above"), results in $out"
exit "$failed"
