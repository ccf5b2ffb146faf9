# Shared by the scripts of this folder that run on a GPU; sourced, not run.
# Sets: failed, 1 once something did not end with exit code 0; SECONDS, counted from here.

failed=0
SECONDS=0
part() { # NAME LIMIT_S LOG COMMAND...: run it, say how long it took, remember whether it failed
  local name=$1 limit=$2 log=$3 began=$SECONDS code=0
  shift 3
  echo "== $name"
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$log" || code=$?
  if [ "$code" -ne 0 ]; then
    failed=1
  fi
  echo "== $name: exit code $code, $((SECONDS - began)) s, $SECONDS s in all"
}
