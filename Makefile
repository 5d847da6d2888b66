# Two commands do it all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PORT ?= 8000
OUT ?= demo-output
DATA ?= ../shared/data/tasks

.PHONY: help install demo test test-data chaos sanitize lint lint-docker image-test format bench clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## Make the environment (.venv)

$(INSTALLED): pyproject.toml clients/python/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e 'clients/python' -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Train three adapters, serve them, complete with each (ONCE=1 stops after)
	$(BIN)/malora demo --out $(OUT) --port $(PORT) $(if $(ONCE),--once)

test: $(INSTALLED)  ## Run the tests, on up to four cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-data: $(INSTALLED)  ## Train, serve and score adapters on the whole of the task data (DATA=folder)
	MALORA_TEST_DATA=$(DATA) MALORA_TEST_WHOLE=1 $(BIN)/python -m pytest -s tests/end_to_end/test_real_tasks.py

chaos: $(INSTALLED)  ## Harm a server under load in every way, for SECONDS (180)
	MALORA_CHAOS_SECONDS=$(or $(SECONDS),180) $(BIN)/python -m pytest -s tests/end_to_end/chaos --timeout 3600

sanitize: $(INSTALLED)  ## On a GPU: run its kernels under compute-sanitizer, which finds stray reads and writes
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python -m pytest tests/malora/test_batched.py -k gpu_kernels --timeout 1800

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-docker: $(INSTALLED)  ## Check the Dockerfiles and the compose files
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cuda
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose*.yaml

image-test:  ## Build the CPU image and try it, without a Docker engine (root; buildah, debootstrap)
	docker/image_test.sh

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Measure throughput on this machine
	$(BIN)/python -m benchmarks.cpu_serving
	$(BIN)/python -m benchmarks.http_serving

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) $(OUT) build dist
