#!/usr/bin/env bash
# Check and measure what only a GPU can show, in two calls of under ten minutes each.
#
#   scripts/gpu_checks.sh 1 [OUT] [--device cpu] [--tiny]   kernels against the references, parts,
#                                                           Llama-3-8B
#   scripts/gpu_checks.sh 2 [OUT] [--device cpu] [--tiny]   within 8 GB, 70B and mixture-of-experts
#                                                           blocks, best, profile
#
# Runs from the source tree with any python that has torch, transformers, tokenizers, pytest, pyyaml
# and pydantic. PYTHON names another python, WHEELS a folder of wheels to install beside it first.
# Each part has a time limit and a file of its own. If a part fails or takes too long, the others
# still run; the failure is shown at once and in OUT/parts.txt, and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:?which of the two calls: 1 or 2}
shift
out=${OUT:-.}
if [[ ${1:-} && ${1:-} != --* ]]; then out=$1; shift; fi
device=cuda tiny=
while [[ $# -gt 0 ]]; do
  case $1 in
    --device) device=$2; shift 2 ;;
    --tiny) tiny=--tiny; shift ;;
    *) echo "error: no option $1" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
if [[ ${WHEELS:-} ]]; then
  "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl || exit 3
  export PYTHONPATH=$work/site
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0

part() { # name, seconds it may take, command
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  [[ $tiny ]] && limit=$((limit * 10)) # for a busy CPU
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name: exit code $code after $((SECONDS - started)) s" | tee -a "$out/parts.txt"
  ((code == 0)) || { failed=1; tail -n 5 "$out/$name.log"; }
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
    --device "$device" --folder "$work" --json "$out/$name.json" "$@"
}

engine=(--shape llama-3-8b --runs 3)
# other test files may need more packages
mapfile -t tests < <(grep -l "mark.gpu" -r tests --include "test_*.py")
tests=(-W default -m gpu "${tests[@]}") # a warning on that machine must not fail a test
if [[ $tiny ]]; then
  engine=(--shape tiny --runs 1 --tokens 256 --group-size 32)
  tests=(tests/solver/test_output_error.py)
fi

: >"$out/parts.txt"
if [[ $call == 1 ]]; then
  part tests 130 "$python" -m pytest "${tests[@]}" -p no:cacheprovider -o addopts= -rA \
    --junitxml "$out/tests.xml"
  part measure 110 "$python" scripts/measure_gpu.py --device "$device" $tiny \
    --json "$out/measure.json"
  part engine 90 "$python" scripts/bench_engine.py --device "$device" "${engine[@]}" \
    --json "$out/engine.json"
  run llama-3-8b 220 llama-3-8b 32
else
  run capped 150 llama-3-8b 16 --cap-gb 8
  run llama-3-70b 140 llama-3-70b 3
  run qwen3-30b-a3b 90 qwen3-30b-a3b 2
  run best 120 llama-3-8b 8 --preset best
  run profile 60 llama-3-8b 2 --profile "$out/profile.txt"
fi
exit $failed
