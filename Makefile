# Every target sets up what it needs; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-engines check check-engines schema docs release bench soak clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(READY) ## make the environment in .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first: the pinned version decides which of its builds the other packages find
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY) ## quantize the embedded model to 4 bits and compare both
	$(BIN)/python scripts/demo.py

test: $(READY) ## the CPU test suite
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not network"

test-all: $(READY) ## every test that can run here
	$(BIN)/python -m pytest -n 2

test-engines: $(READY) ## load the output with the engines, or with ENGINES="vllm mlx-lm"
	PYTHON=$(abspath $(BIN)/python) scripts/test_engines.sh $(ENGINES)

check: $(READY) ## format, lint, types, import contracts, density of the code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/measure_code.py --static --check

check-engines: $(READY) ## look up in the newest releases of the engines what their table says
	$(BIN)/python scripts/check_engines.py

schema: $(READY) ## write the JSON Schema of the configuration beside the recipes
	$(BIN)/gptq schema > build.schema.json
	mv build.schema.json gptq_cli/config/recipes/gptq.schema.json

docs: $(READY) ## the documentation as a site in build/site, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "open build/site/index.html"

release: $(READY) ## build sdist and wheel, run the demo with the wheel; RELEASE="--python 3.11"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/release.py $(RELEASE)

bench: $(READY) ## measure start-up times, and memory against depth
	$(BIN)/python scripts/bench_startup.py
	$(BIN)/python scripts/bench_memory.py

soak: $(READY) ## kill, starve and damage small runs, fuzz 300,000 inputs: about 40 minutes
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --inputs 50000 --output docs/benchmarks/fuzz.json

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
