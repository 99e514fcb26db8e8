# Everything a user runs. `make` alone lists the targets; each makes the environment first if it is missing.
RECIPE ?= smoke
RUN ?=
ARGS ?=
NAME ?=
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env curate train test test-all test-gpu lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(READY) ## make the environment in .venv (uv where it is present, else venv and pip)

$(READY): pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) VENV=$(VENV) sh .ci/environment
	@touch $@

curate: $(READY) ## build an image set: RECIPE=smoke RUN=folder ARGS="key.sub=value --until STAGE"
	@$(VENV)/bin/lvd curate $(RECIPE) $(if $(RUN),run=$(RUN)) $(ARGS)

train: RECIPE = vits14_smoke
train: $(READY) ## train a DINOv2: RECIPE=vits14_smoke RUN=folder ARGS="key.sub=value"
	@$(VENV)/bin/lvd train $(RECIPE) $(if $(RUN),run=$(RUN)) $(ARGS)

test: $(READY) ## run the tests (about ten minutes on two cores)
	@$(VENV)/bin/pytest -n 2 --dist loadgroup -m "not matrix" $(ARGS)

test-all: $(READY) ## run the long matrices too
	@$(VENV)/bin/pytest $(ARGS)

test-gpu: $(READY) ## run what needs a GPU; skipped where there is none
	@$(VENV)/bin/pytest tests/gpu -rs $(ARGS)

lint: $(READY) ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(READY) ## let ruff rewrite what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: $(READY) ## measure against a peer: NAME=copies ARGS="--data FOLDER" (see tests/benchmarks)
	@$(VENV)/bin/python tests/benchmarks/$(NAME).py $(ARGS)

clean: ## remove the environment and all data of the smoke recipe
	rm -rf $(VENV) data .mypy_cache .pytest_cache .ruff_cache
