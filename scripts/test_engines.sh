#!/usr/bin/env bash
# Load checkpoints of gptq_cli with the programs that people use them with.
#
#   scripts/test_engines.sh [ENGINE ...]      all engines if none is named
#
# Each engine has an environment of its own. The first run installs about 8 GB into
# GPTQ_ENGINES_HOME (default: ~/.cache/gptq_cli/engines), and GPTQModel compiles a CPU kernel there
# if it finds a C++ compiler; later runs start at once. The versions are those for Python 3.11. On a
# machine where pip would fetch a CUDA build of torch, point PIP_EXTRA_INDEX_URL to PyTorch's CPU
# wheels. Prints the results of the tests, writes what the engines did to
# docs/benchmarks/engines.json, and makes docs/compatibility.md from that file. PYTEST_ADDOPTS takes
# further arguments of pytest, such as "-k rules".
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
requirements=tests/engines/requirements
export GPTQ_ENGINES_HOME=${GPTQ_ENGINES_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/gptq_cli/engines}
export GPTQ_ENGINES=${*:-vllm llama.cpp mlx-lm openvino transformers gptqmodel auto-round sglang lmdeploy}
export HF_HUB_DISABLE_PROGRESS_BARS=1

make_environment() {
    local environment=$GPTQ_ENGINES_HOME/$1 wanted=$requirements/$1.txt
    local stamp=$environment/installed-requirements.txt
    cmp --silent "$wanted" "$stamp" && return
    echo "installing $environment" >&2
    "$python" -m venv --clear "$environment"
    # torch first, with its dependencies; then every other package at its exact version
    if grep --quiet '^torch==' "$wanted"; then
        "$environment/bin/pip" install -qq "$(grep '^torch==' "$wanted")"
    fi
    "$environment/bin/pip" install -qq --no-deps --requirement "$wanted"
    cp "$wanted" "$stamp"
}

unpack_source() {
    local sources=$GPTQ_ENGINES_HOME/source wanted
    wanted=$(grep "^$1==" $requirements/sources.txt)
    [ -e "$sources/$wanted" ] && return
    echo "unpacking $wanted" >&2
    rm -rf "${sources:?}/$1"
    mkdir -p "$sources/$1"
    if [ "$1" = llama-cpp-python ]; then
        "$python" -m pip download -qq --no-deps --no-binary "$1" --dest "$sources/$1" "$wanted"
        tar --extract --gzip --strip-components=1 --directory "$sources/$1" --file "$sources/$1"/*.tar.gz
    else
        "$python" -m pip download -qq --no-deps --dest "$sources/$1" "$wanted"
        "$python" -m zipfile --extract "$sources/$1"/*.whl "$sources/$1"
    fi
    touch "$sources/$wanted"
}

for engine in $GPTQ_ENGINES; do
    case $engine in
        llama.cpp) make_environment llama.cpp && unpack_source llama-cpp-python ;;
        sglang | lmdeploy) make_environment vllm && unpack_source "$engine" ;;
        gptqmodel) make_environment transformers ;;
        *) make_environment "$engine" ;;
    esac
done
status=0
"$python" -m pytest tests/engines || status=$?
"$python" scripts/engine_table.py
exit $status
