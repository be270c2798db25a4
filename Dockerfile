# gptq in a container, for CPUs and for NVIDIA GPUs:
#
#   docker build --target cpu -t gptq .
#   docker run --rm -v "$PWD:/data" gptq quantize ./Qwen3-0.6B --bits 4
#
#   docker build --target cuda -t gptq:cuda .
#   docker run --rm --gpus all -v "$PWD:/data" gptq:cuda quantize ./Qwen3-0.6B --bits 4
#
# /data is the directory in which gptq runs. Add `--user "$(id -u):$(id -g)"` to own the output, and
# `-v "$HOME/.cache/huggingface:/cache/huggingface"` to keep downloads. podman takes the same words.
ARG PYTHON=docker.io/library/python:3.12-slim

FROM ${PYTHON} AS wheel
COPY pyproject.toml README.md CHANGELOG.md LICENSE /sources/
COPY gptq_cli /sources/gptq_cli
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /sources

FROM ${PYTHON} AS base
ENV HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
RUN mkdir -p /cache/huggingface /data && chmod 1777 /cache /cache/huggingface /data
WORKDIR /data
ENTRYPOINT ["gptq"]
CMD ["--help"]

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --no-cache-dir torch --index-url "${TORCH_INDEX}"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir /wheels/*.whl matplotlib

FROM base AS cuda
# Triton compiles a small launcher for each kernel with the C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir /wheels/*.whl matplotlib
