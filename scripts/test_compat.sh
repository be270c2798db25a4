#!/usr/bin/env bash
# Load checkpoints of gptq_cli with GPTQModel, auto-round and transformers.
#
#   scripts/test_compat.sh [pytest arguments]
#
# The tools have environments of their own. The first run installs about 3 GB into
# GPTQ_COMPAT_VENVS (default: ~/.cache/gptq_cli/compat), and GPTQModel compiles a CPU kernel there
# if it finds a C++ compiler; later runs start at once. On a machine where pip would fetch a CUDA
# build of torch, point PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels. Prints the results of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
export GPTQ_COMPAT_VENVS=${GPTQ_COMPAT_VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/gptq_cli/compat}

make_venv() {
    local venv=$GPTQ_COMPAT_VENVS/$1 requirements=tests/compat/requirements-$1.txt
    local stamp=$venv/installed-requirements.txt
    cmp --silent "$requirements" "$stamp" && return
    echo "installing $venv" >&2
    "$python" -m venv --clear "$venv"
    # torch first, with its dependencies; then every other package at its exact version
    "$venv/bin/pip" install -qq "$(grep '^torch==' "$requirements")"
    "$venv/bin/pip" install -qq --no-deps --requirement "$requirements"
    cp "$requirements" "$stamp"
}

make_venv gptqmodel
make_venv auto-round
exec "$python" -m pytest tests/compat "$@"
