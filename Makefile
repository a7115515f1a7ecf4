# The same targets for people and for CI. `make engine MODEL=XL/2` is what this project is for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

MODEL ?=
RECIPE ?=
FLAGS = $(if $(RESOLUTION),--resolution $(RESOLUTION)) $(if $(PRECISION),--precision $(PRECISION)) \
	$(if $(BACKEND),--backend $(BACKEND)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(if $(VAE),--vae $(VAE)) \
	$(if $(LABELS),--labels $(LABELS)) $(if $(SYNTHETIC),--synthetic) $(if $(OUTPUT),-o $(OUTPUT))

.PHONY: help setup engine test test-all lint format clean

help:
	@echo "make setup                     a virtual environment in .venv with everything pinned"
	@echo "make engine MODEL=XL/2         a verified bundle; CHECKPOINT=PATH|HUB-ID, or SYNTHETIC=1 for made-up weights;"
	@echo "                               also RESOLUTION, PRECISION, BACKEND, VAE, LABELS, OUTPUT; or RECIPE=engines/….toml"
	@echo "make test | test-all | lint    the checks; test-all also runs what takes minutes or gigabytes"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[export,onnxruntime,dev]"
	@touch $@

engine: $(STAMP)
	@$(BIN)/dit-export build $(or $(RECIPE),$(MODEL)) $(FLAGS)

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) engines/build
