# The same targets for people and for CI. `make engine MODEL=XL/2` is what this project is for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

MODEL ?=
RECIPE ?=
# Values are quoted: paths may hold spaces. SYNTHETIC=1 takes seed 0; SYNTHETIC=0 or nothing takes real weights.
FLAGS = $(if $(RESOLUTION),--resolution '$(RESOLUTION)') $(if $(PRECISION),--precision '$(PRECISION)') \
	$(if $(BACKEND),--backend '$(BACKEND)') $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(VAE),--vae '$(VAE)') \
	$(if $(LABELS),--labels '$(LABELS)') $(if $(HEADS),--heads '$(HEADS)') $(if $(MAX_BATCH),--max-batch '$(MAX_BATCH)') \
	$(if $(LATENTS_ONLY),--latents-only) $(if $(filter-out 0,$(SYNTHETIC)),--synthetic) $(if $(OUTPUT),-o '$(OUTPUT)')

.PHONY: help setup demo engine bench test test-all browser lint format clean

help:
	@echo "make setup                     a virtual environment in .venv with everything pinned"
	@echo "make demo                      the small model that ships: its bundle, a grid of its pictures, a judge's verdict"
	@echo "make engine MODEL=XL/2         a verified bundle; CHECKPOINT=PATH|HUB-ID, or SYNTHETIC=1 for made-up weights;"
	@echo "                               also RESOLUTION, PRECISION, BACKEND, VAE, LABELS, OUTPUT; or RECIPE=engines/….toml"
	@echo "make bench MODEL=S/2           side by side with what people would use instead; also RESOLUTION, BATCH, ROUNDS,"
	@echo "                               THREADS, ONLY, JSON, SVG"
	@echo "make test | test-all | lint    the checks; test-all also runs what takes minutes or gigabytes"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[export,onnxruntime,openvino,dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/dit-export demo show

engine: $(STAMP)
	$(if $(and $(RECIPE),$(MODEL)),$(error RECIPE names its own model: pass RECIPE or MODEL))
	@$(BIN)/dit-export build $(if $(RECIPE)$(MODEL),'$(or $(RECIPE),$(MODEL))') $(FLAGS)

bench: $(STAMP)
	@$(BIN)/dit-export bench $(if $(MODEL),'$(MODEL)') $(if $(RESOLUTION),--resolution '$(RESOLUTION)') \
		$(if $(BATCH),--batch '$(BATCH)') $(if $(ROUNDS),--rounds '$(ROUNDS)') $(if $(THREADS),--threads '$(THREADS)') \
		$(if $(ONLY),--only $(foreach name,$(ONLY),'$(name)')) $(if $(JSON),--json '$(JSON)') $(if $(SVG),--svg '$(SVG)')

test: $(STAMP) browser
	$(BIN)/python -m pytest

test-all: $(STAMP) browser
	$(BIN)/python -m pytest -m ""

# The report is tested in a real browser: Debian's chromium, installed where it is missing and that is allowed.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| { echo "the tests of report.html need chromium: sudo apt-get install chromium" >&2; exit 1; }

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) engines/build
