# Every target sets up what it needs: a fresh clone wants Python 3.11 or later and a package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ENV = set -a && . $(1) && set +a &&

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
test-real: install  ## the long tests: real photos and ImageNet weights from ../shared, about an hour on two cores
	$(BIN)/python -m pytest -m slow -rs

.PHONY: solar-paper
solar-paper: install  ## the solar cells as in the paper (224 px, 656 test cells)
	@$(call RUN_ENV,deploy/env/solar-paper.env) TRANSFER_LOG_FORMAT=$${TRANSFER_LOG_FORMAT:-text} $(BIN)/python -m job

.PHONY: recipe-heads
recipe-heads: install  ## measure candidates for the head on three data sets, by validation accuracy
	$(BIN)/python -m tests.recipe heads

.PHONY: recipe-tails
recipe-tails: install  ## measure fine-tuning rates on three data sets; about an hour on two cores
	$(BIN)/python -m tests.recipe tails

.PHONY: bench
bench: install  ## the job beside plain Keras on cats_vs_dogs from ../shared: tables for the README; two hours
	$(BIN)/python -m tests.bench

.PHONY: lint
lint: install  ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: clean
clean:  ## remove the virtual environment and caches, never output/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
