#!/usr/bin/env bash
# Check and measure what only a GPU can show: one call of eight minutes, then one of five for what a
# first fix needs.
#
#   scripts/gpu_checks.sh 1 OUT [PART ...] [--device cpu] [--tiny]  every part, the most telling first
#   scripts/gpu_checks.sh 2 OUT [PART ...] [--device cpu] [--tiny]  some parts again
#
# Parts: env quality tests engine llama-3-8b best qwen3-30b-a3b capped llama-3-70b measure
#
# Runs from the source tree with any python that has torch, transformers, tokenizers, pytest, pyyaml
# and pydantic. PYTHON names another python, WHEELS a folder of wheels to install beside it first.
# Each part has a time limit; if one fails or takes too long, the others still run. After each part
# all results are packed into OUT/results.tar.gz, so that a call that is cut short leaves them. The
# last output is a digest of at most sixty lines, OUT/digest.txt. The exit code is 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
if [[ $# -lt 2 ]]; then
  echo "usage: scripts/gpu_checks.sh 1|2 OUT [PART ...] [--device cpu] [--tiny]" >&2
  exit 2
fi
call=$1 out=$2
shift 2
device=cuda tiny=
asked=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --device) device=$2; shift 2 ;;
    --tiny) tiny=--tiny; shift ;;
    -*) echo "error: no option $1" >&2; exit 2 ;;
    *) asked+=("$1"); shift ;;
  esac
done
case $call in
  1) seconds=480; parts=(env quality tests engine llama-3-8b best qwen3-30b-a3b capped llama-3-70b measure) ;;
  2) seconds=300; parts=(env quality tests llama-3-8b best) ;;
  *) echo "error: no call $call" >&2; exit 2 ;;
esac
[[ ${#asked[@]} -gt 0 ]] && parts=("${asked[@]}")
[[ $tiny ]] && seconds=$((seconds * 20)) # for a busy CPU
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
results=$work/results
mkdir -p "$out" "$results"
if [[ ${WHEELS:-} ]]; then
  "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl || exit 3
  export PYTHONPATH=$work/site
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0

pack() {
  tar czf "$work/results.tar.gz" -C "$work" results && mv "$work/results.tar.gz" "$out/results.tar.gz"
}

part() { # name, seconds it may take, command
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  [[ $tiny ]] && limit=$((limit * 20))
  ((limit > seconds - SECONDS)) && limit=$((seconds - SECONDS))
  if ((limit < 5)); then
    echo "$name: no time is left" | tee -a "$results/parts.txt"
    failed=1
    return
  fi
  timeout -k 5 "$limit" "$@" >"$results/$name.log" 2>&1 || code=$?
  echo "$name: exit code $code after $((SECONDS - started)) s" | tee -a "$results/parts.txt"
  ((code == 0)) || { failed=1; tail -n 5 "$results/$name.log"; }
  pack
}

run() { # name, seconds, shape, blocks, more arguments
  local name=$1 limit=$2 shape=$3 blocks=$4
  shift 4
  if [[ $tiny ]]; then
    [[ $shape == qwen3* ]] && shape=tiny-moe || shape=tiny
    blocks=2
    set -- "$@" --nsamples 4 --seqlen 64 --batch-size 2 --group-size 32
  fi
  part "$name" "$limit" "$python" scripts/bench_run.py --shape "$shape" --blocks "$blocks" \
    --device "$device" --folder "$work" --json "$results/$name.json" "$@"
}

engine=(--shape llama-3-8b --runs 3)
# other test files may need more packages
mapfile -t tests < <(grep -l "mark.gpu" -r tests --include "test_*.py")
tests=(-W default -m gpu "${tests[@]}") # a warning on that machine must not fail a test
if [[ $tiny ]]; then
  engine=(--shape tiny --runs 1 --tokens 256 --group-size 32)
  tests=(tests/solver/test_output_error.py)
fi

one() { # the part with this name
  case $1 in
    env) part env 30 "$python" scripts/gpu_environment.py ;;
    quality) part quality 90 "$python" scripts/check_gpu_quality.py --device "$device" $tiny \
      --json "$results/quality.json" ;;
    tests) part tests 100 "$python" -m pytest "${tests[@]}" -p no:cacheprovider -o addopts= -rA \
      --junitxml "$results/tests.xml" ;;
    engine) part engine 70 "$python" scripts/bench_engine.py --device "$device" "${engine[@]}" \
      --json "$results/engine.json" ;;
    llama-3-8b) run llama-3-8b 110 llama-3-8b 8 --trace "$results/llama-3-8b-trace.json.gz" ;;
    best) run best 60 llama-3-8b 2 --preset best ;;
    qwen3-30b-a3b) run qwen3-30b-a3b 60 qwen3-30b-a3b 1 ;;
    capped) run capped 60 llama-3-8b 4 --cap-gb 8 ;;
    llama-3-70b) run llama-3-70b 60 llama-3-70b 1 ;;
    measure) part measure 60 "$python" scripts/measure_gpu.py --device "$device" $tiny \
      --json "$results/measure.json" ;;
    *) echo "error: no part $1" >&2; failed=1 ;;
  esac
}

: >"$results/parts.txt"
for name in "${parts[@]}"; do one "$name"; done
"$python" scripts/gpu_digest.py "$results" | tee "$out/digest.txt"
cp "$out/digest.txt" "$results/"
pack
exit $failed
