#!/usr/bin/env bash
# What only a GPU can show: Hessians on tensor cores, the solver and the Triton dequantizer on CUDA, against the references.
#
#   scripts/gpu_checks.sh [output folder]
#
# Runs from the source tree with whatever python has torch, transformers, pytest and pydantic; PYTHON names another one.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-.}}
python=${PYTHON:-python3}
"$python" - <<'P'
import torch, transformers
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__)
P
"$python" -m pytest -m gpu tests -p no:cacheprovider -o addopts= -rA --junitxml "$out/gpu_checks.xml"
