# Every target sets up what it needs: a fresh clone wants Python 3.11 or later and a package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ENV = set -a && . $(1) && set +a &&

# The container image: DEVICE, WEIGHTS and EXTRAS as docker/Dockerfile says; ENV the settings to run with.
DOCKER ?= docker
DEVICE ?= gpu
ENV ?= deploy/env/solar-demo.env
IMAGE ?= transfer-learning-job:0.1.0$(if $(filter cpu,$(DEVICE)),-cpu)
GPUS ?= --gpus all

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	@touch $@

.PHONY: install
install: $(VENV)/installed  ## make the virtual environment

.PHONY: run
run: install  ## the quickstart: the three arms on photos of solar cells, published to output/
	@$(call RUN_ENV,deploy/env/solar-demo.env) TRANSFER_LOG_FORMAT=$${TRANSFER_LOG_FORMAT:-text} $(BIN)/python -m job

.PHONY: test
test: install  ## the test suite, without the long tests
	$(BIN)/python -m pytest

.PHONY: test-real
test-real: install  ## all long tests but test-backbones, with real photos and weights from ../shared; well over an hour on two cores
	$(BIN)/python -m pytest -m slow -rs --ignore tests/models/test_every_backbone.py

.PHONY: test-backbones
test-backbones: install  ## every backbone trains in three arms, is exported and serves what was measured; two hours
	$(BIN)/python -m pytest tests/models/test_every_backbone.py -m slow -n 0 -rs --durations=0

# CUDA and cuDNN, where there is a GPU for them; without one the run says so and fails.
$(VENV)/installed-gpu: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev,gpu]'
	@touch $@

.PHONY: test-gpu
test-gpu: install $(if $(wildcard /dev/nvidia[0-9]* /dev/dxg),$(VENV)/installed-gpu)  ## the acceptance run on a GPU, 15 minutes: output/gpu has its page (TEST_GPU_FLAGS=--cpu: its logic)
	$(BIN)/python -m tests.measure.gpu_acceptance $(TEST_GPU_FLAGS)

.PHONY: solar-paper
solar-paper: install  ## the solar cells as in the paper (224 px, 656 test cells)
	@$(call RUN_ENV,deploy/env/solar-paper.env) TRANSFER_LOG_FORMAT=$${TRANSFER_LOG_FORMAT:-text} $(BIN)/python -m job

.PHONY: recipe-heads
recipe-heads: install  ## measure candidates for the head on three data sets, by validation accuracy
	$(BIN)/python -m tests.measure.recipe heads

.PHONY: recipe-tails
recipe-tails: install  ## measure fine-tuning rates on three data sets; about an hour on two cores
	$(BIN)/python -m tests.measure.recipe tails

.PHONY: bench
bench: install  ## the job beside plain Keras on cats_vs_dogs from ../shared: tables for docs/measurements.md; an hour
	$(BIN)/python -m tests.measure.bench

.PHONY: learning-curve
learning-curve: install  ## accuracy by examples: 40 results of the job beside 8 of tuned Keras, from ../shared; an hour
	$(BIN)/python -m tests.measure.learning_curve

.PHONY: lint
lint: install  ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: lock
lock: install  ## resolve what the images install anew, within the bounds of pyproject.toml: LOCK_FLAGS=--upgrade for newer
	$(BIN)/python docker/lock.py $(LOCK_FLAGS)

.PHONY: image
image:  ## build the container image (DEVICE=cpu without CUDA; for ENV's default: WEIGHTS=MobileNetV2:96 EXTRAS=demo)
	$(if $(filter gpu cpu,$(DEVICE)),,$(error DEVICE: received '$(DEVICE)'; accepted: gpu, cpu))
	$(DOCKER) build --file docker/Dockerfile --tag $(IMAGE) --build-arg DEVICE=$(DEVICE) \
	  --build-arg WEIGHTS='$(WEIGHTS)' --build-arg EXTRAS='$(EXTRAS)' --build-arg SOURCE='$(SOURCE)' \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) $(BUILD_FLAGS) .

.PHONY: docker-run
docker-run:  ## run the image with the settings in ENV, as the caller, published to output/ (VERB=plan: only the checks)
	@mkdir -p output
	$(DOCKER) run --rm --user $$(id -u):$$(id -g) --read-only --cap-drop ALL --security-opt no-new-privileges \
	  --tmpfs /tmp --volume '$(CURDIR)/output:/output' --volume transfer-learning-cache:/cache --workdir /cache \
	  --env-file $(ENV) --env TRANSFER_CACHE_DIR=/cache --stop-timeout 30 $$(test -t 2 && echo --interactive --tty) \
	  $(if $(filter gpu,$(DEVICE)),$(GPUS)) $(RUN_FLAGS) $(IMAGE) $(VERB)

.PHONY: test-image
test-image: install  ## build the CPU image and run it as clusters do: no rights, no network, stopped, short of memory
	CONTAINER='$(DOCKER)' CONTAINER_BUILD_FLAGS='$(BUILD_FLAGS)' CONTAINER_RUN_FLAGS='$(RUN_FLAGS)' \
	  $(BIN)/python -m pytest tests/deploy/test_image.py -m slow -n 0 -rs

.PHONY: clean
clean:  ## remove the virtual environment and caches, never output/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
