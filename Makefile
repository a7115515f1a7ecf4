# The same targets for people and for CI. `make engine MODEL=XL/2` is what this project is for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ENGINES := $(VENV)/.engines
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

MODEL ?=
RECIPE ?=
# Values are quoted: paths may hold spaces. SYNTHETIC=1 takes seed 0; SYNTHETIC=0 or nothing takes real weights.
FLAGS = $(if $(CONDITIONING),--conditioning '$(CONDITIONING)') $(if $(RESOLUTION),--resolution '$(RESOLUTION)') $(if $(PRECISION),--precision '$(PRECISION)') \
	$(if $(BACKEND),--backend '$(BACKEND)') $(if $(CALIBRATION),--calibration '$(CALIBRATION)') $(if $(CONDITIONS),--conditions '$(CONDITIONS)') $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(VAE),--vae '$(VAE)') \
	$(if $(LABELS),--labels '$(LABELS)') $(if $(HEADS),--heads '$(HEADS)') $(if $(PREDICTION),--prediction '$(PREDICTION)') $(if $(MAX_BATCH),--max-batch '$(MAX_BATCH)') \
	$(if $(LATENTS_ONLY),--latents-only) $(if $(WITHOUT_TEXT_ENCODERS),--without-text-encoders) $(if $(filter-out 0,$(SYNTHETIC)),--synthetic) $(if $(OUTPUT),-o '$(OUTPUT)')

# The project as it stands here, with the virtual environment where there is one: a machine with a GPU may have no
# network to make it from.
HERE = PYTHONPATH=.:runtime/python $(firstword $(wildcard $(BIN)/python) $(PYTHON))

# The C++ library's engines: the user's own come first, then those of the virtual environment.
CPP := build/cpp
CPP_ONNXRUNTIME = $(or $(ONNXRUNTIME_ROOT),$(CURDIR)/build/cpp-deps/onnxruntime)
CPP_OPENVINO = $(or $(OpenVINO_DIR),$(shell ls -d $(CURDIR)/$(VENV)/lib/python3*/site-packages/openvino/cmake))
CPP_CUDA = $(CURDIR)/build/cpp-deps/cuda
CPP_SETUP = runtime/cpp/tools/setup.sh $(VENV) $(CURDIR)/build/cpp-deps
CPP_CONFIGURE = cmake -S runtime/cpp -DDIT_WERROR=ON -DDIT_PYTHON=$(CURDIR)/$(BIN)/python \
	-DONNXRUNTIME_ROOT='$(CPP_ONNXRUNTIME)' -DOpenVINO_DIR='$(CPP_OPENVINO)' \
	$(if $(CUDA_ROOT),-DCUDA_ROOT='$(CUDA_ROOT)') $(if $(TENSORRT_ROOT),-DTENSORRT_ROOT='$(TENSORRT_ROOT)')
CPP_SOURCES = $(shell git ls-files 'runtime/cpp/*.c' 'runtime/cpp/*.cpp' 'runtime/cpp/*.h' 'runtime/cpp/*.hpp')
JOBS ?= $(shell nproc)

# A worker process a core; each keeps whole test files, whose fixtures so are made once. A worker takes up to 2 GB.
WORKERS ?= $(JOBS)
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

.PHONY: help setup triton ray demo demo-sr engine families-table bench bench-gpu benchmarks gpu-pack gpu-check cpp cpp-build cpp-unit cpp-test cpp-sanitize cpp-static cpp-aarch64 cpp-fuzz cpp-tensorrt goldens check test-build test test-all test-gpu browser site lint format clean

help:
	@echo "make setup                     a virtual environment in .venv with everything pinned"
	@echo "make demo                      the small model that ships: in fp32 and int8, grids of its pictures, a judge's verdict"
	@echo "make demo-sr                   its super-resolution: low, bicubic, drawn and true pictures, and the judge's verdict"
	@echo "make engine MODEL=XL/2         a verified bundle; CHECKPOINT=PATH|ID[@REVISION], or SYNTHETIC=1 for made-up weights;"
	@echo "                               also CONDITIONING, RESOLUTION, PRECISION, BACKEND, CALIBRATION, CONDITIONS, VAE, LABELS, OUTPUT; or RECIPE=engines/….toml"
	@echo "make families-table            what leaves the loop of each network at its real size: docs/families.md; also FAMILY"
	@echo "make bench MODEL=S/2           side by side with what people would use instead; also RESOLUTION, BATCH, ROUNDS,"
	@echo "                               THREADS, ONLY, JSON, SVG"
	@echo "make bench-gpu MODEL=XL/2      the same on an NVIDIA GPU"
	@echo "make benchmarks                docs/benchmarks.md's tables and chart, from the results in docs/benchmarks"
	@echo "make cpp | cpp-test            the C++ library and its programs in build/cpp; its tests"
	@echo "make check                     the quick tests, under a minute: no bundle is built, no C++"
	@echo "make test | test-all | lint    all tests, about 15 minutes; test-all also runs what takes minutes or gigabytes;"
	@echo "                               WORKERS processes share the work, by default one a core"
	@echo "make site                      the documentation in build/site/html, strict about links"
	@echo "make test-gpu                  the tests that need an NVIDIA GPU"
	@echo "make triton | ray              what the slow tests of Triton and of Ray need; test-all installs both"
	@echo "make gpu-pack | gpu-check      what a GPU without a network needs, packed here; its check there (docs/gpu.md)"

setup: $(STAMP)

# What the C++ library needs of Python comes first: `make --jobs` compiles while the rest is installed.
$(ENGINES): constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) onnxruntime openvino
	@touch $@

$(STAMP): pyproject.toml runtime/pyproject.toml constraints.txt $(ENGINES)
	$(PIP) --editable "./runtime[onnxruntime,openvino,tensorrt-rtx,serve]" --editable ".[export,dev]"
	@touch $@

# Triton's server from a wheel of NVIDIA's, which would bring NumPy 1, and its client, which would bring an older ml_dtypes:
# both in a folder of their own, for the tests alone.
triton: build/triton/.installed

build/triton/.installed: tests/serve/triton.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/triton \
		--requirement tests/serve/triton.txt
	@touch $@

ray: $(STAMP)
	$(PIP) --editable "./runtime[ray-serve]"

demo: $(STAMP)
	@$(BIN)/dit-export demo show

demo-sr: $(STAMP)
	@$(BIN)/dit-export demo show-sr

engine: $(STAMP)
	$(if $(and $(RECIPE),$(MODEL)),$(error RECIPE names its own model: pass RECIPE or MODEL))
	@$(BIN)/dit-export build $(if $(RECIPE)$(MODEL),'$(or $(RECIPE),$(MODEL))') $(FLAGS)

families-table: $(STAMP)
	PYTHONPATH=.:runtime/python $(BIN)/python -m tests.survey.table $(if $(FAMILY),'$(FAMILY)')

BENCH = $(if $(MODEL),'$(MODEL)') $(if $(RESOLUTION),--resolution '$(RESOLUTION)') \
	$(if $(BATCH),--batch '$(BATCH)') $(if $(ROUNDS),--rounds '$(ROUNDS)') $(if $(THREADS),--threads '$(THREADS)') \
	$(if $(ONLY),--only $(foreach name,$(ONLY),'$(name)')) $(if $(JSON),--results '$(JSON)') $(if $(SVG),--svg '$(SVG)')

bench: $(STAMP)
	@$(BIN)/dit-export bench $(BENCH)

# The tables and the chart of docs/benchmarks.md, from the results in docs/benchmarks.
benchmarks: $(STAMP)
	PYTHONPATH=.:runtime/python $(BIN)/python -m dit_export.bench.history docs

bench-gpu:
	@$(HERE) -m dit_export.cli bench --device cuda $(BENCH)

# Two packs for a machine with a GPU, made where there is a network; then their check on that machine. DRY=1: its steps
# on a CPU, with a tiny network.
GPU = $(if $(PACK),--pack '$(PACK)') $(if $(ONLY),--only $(foreach name,$(ONLY),'$(name)')) \
	$(if $(SECONDS),--seconds '$(SECONDS)')
gpu-pack: $(STAMP)
	$(CPP_SETUP)
	runtime/cpp/tools/cuda.sh $(VENV) $(CPP_CUDA)
	$(CPP_CONFIGURE) -B build/cpp-gpu -DDIT_OPENVINO=OFF -DDIT_PROGRAMS=ON -DCUDA_ROOT='$(or $(CUDA_ROOT),$(CPP_CUDA))'
	cmake --build build/cpp-gpu --parallel $(JOBS)
	PYTHONPATH=.:runtime/python $(BIN)/python -m tests.gpu.pack --program build/cpp-gpu

gpu-check:
	@$(if $(filter-out 0,$(DRY)),$(HERE) -m pytest tests/gpu,$(HERE) -m tests.gpu.check $(GPU))

cpp: $(ENGINES)
	$(CPP_SETUP)
	$(CPP_CONFIGURE) -B $(CPP) -DDIT_PROGRAMS=ON
	cmake --build $(CPP) --parallel $(JOBS)
	@echo "$(CPP)/programs/dit-generate BUNDLE --labels 207 360 -o sample.png"

# The library's own tests; those that compare it with Python are pytest's.
CTEST = ctest --test-dir $(CPP) --output-on-failure --parallel $(JOBS)
cpp-unit: cpp-build $(STAMP)
	$(CTEST)

cpp-build: $(ENGINES)
	$(CPP_SETUP) libgtest-dev
	runtime/cpp/tools/cuda.sh $(VENV) $(CPP_CUDA)
	$(CPP_CONFIGURE) -B $(CPP) -DDIT_PROGRAMS=ON -DDIT_TESTS=ON -DCUDA_TEST_ROOT='$(CPP_CUDA)'
	cmake --build $(CPP) --parallel $(JOBS)

cpp-test: cpp-unit browser
	$(PYTEST) tests/cpp

cpp-sanitize: $(STAMP)
	$(CPP_SETUP) libgtest-dev
	runtime/cpp/tools/sanitize.sh "$(CPP_CONFIGURE)" build $(JOBS) $(CURDIR)/$(BIN)/python

# libdit.a with its engines, and a program that needs no libdit beside it.
cpp-static: $(STAMP)
	$(CPP_SETUP)
	$(CPP_CONFIGURE) --preset static -B build/cpp-static
	cmake --build build/cpp-static --parallel $(JOBS) --target dit-generate
	$(BIN)/python runtime/cpp/tests/make_bundle.py build/cpp-static/bundle
	build/cpp-static/programs/dit-generate build/cpp-static/bundle --verify
	! readelf -d build/cpp-static/programs/dit-generate | grep -q 'NEEDED.*libdit'

# For 64-bit ARM, without engines; its unit tests run under qemu.
cpp-aarch64: $(STAMP)
	$(CPP_SETUP) g++-aarch64-linux-gnu qemu-user libgtest-dev
	cmake --preset aarch64 -S runtime/cpp -B build/cpp-aarch64 -DDIT_PYTHON=$(CURDIR)/$(BIN)/python
	cmake --build build/cpp-aarch64 --parallel $(JOBS)
	ctest --test-dir build/cpp-aarch64 --output-on-failure

# What reads files and what uses them, FUZZ_SECONDS each; `make test` fuzzes the readers.
FUZZERS := http manifest verify request options
READERS := http manifest
FUZZ := build/cpp-fuzz
fuzz = for kind in $(1); do mkdir -p $(FUZZ)/corpus/$$kind && $(FUZZ)/fuzz/$$kind-fuzzer \
	-max_total_time=$(or $(FUZZ_SECONDS),15) -max_len=8192 -timeout=10 -rss_limit_mb=1024 -verbosity=0 -print_final_stats=1 \
	-artifact_prefix=$(FUZZ)/ $(FUZZ)/corpus/$$kind runtime/cpp/fuzz/corpus || exit 1; done
fuzzers = CC=clang CXX=clang++ $(CPP_CONFIGURE) -B $(FUZZ) -DDIT_FUZZ=ON -DDIT_PROGRAMS=OFF -DDIT_OPENVINO=OFF && \
	cmake --build $(FUZZ) --parallel $(JOBS) --target $(1:=-fuzzer)

cpp-fuzz: $(ENGINES)
	$(CPP_SETUP) clang libclang-rt-dev
	$(call fuzzers,$(FUZZERS))
	$(call fuzz,$(FUZZERS))

test-build: cpp-build
	$(CPP_SETUP) clang libclang-rt-dev
	$(call fuzzers,$(READERS))

# Whether the TensorRT engine compiles against the public headers, where they are at hand; it needs no GPU.
cpp-tensorrt:
	$(if $(TENSORRT_ROOT),,$(error pass TENSORRT_ROOT, a folder with include/NvInferRuntime.h))
	c++ -std=c++17 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -DDIT_TENSORRT='"tensorrt"' -Iruntime/cpp/src \
		-isystem '$(TENSORRT_ROOT)/include' -isystem '$(or $(CUDA_ROOT),/usr/local/cuda)/include' \
		runtime/cpp/src/engine_trt.cpp

# What Python computes, for the C++ tests to replay.
goldens: $(STAMP)
	$(BIN)/python runtime/cpp/tests/goldens.py

check: $(STAMP)
	$(PYTEST) -m 'not builds and not slow and not gpu'

# The soak mostly waits, beside the tests.
test: test-build $(STAMP) browser
	($(CTEST) && $(call fuzz,$(READERS))) & unit=$$!; $(BIN)/python -m tests.serve.soak 120 & soak=$$!; \
		$(PYTEST); tests=$$?; wait $$unit && wait $$soak && exit $$tests

# The documentation site, in build/site/html. A link that leads nowhere fails it.
site: $(STAMP)
	PYTHONPATH=.:runtime/python $(BIN)/python docs/site/make.py build/site/pages
	cp docs/site/zensical.toml build/site
	cd build/site && $(CURDIR)/$(BIN)/zensical build --clean --strict

# They need an NVIDIA GPU and are skipped, with the reason, without one; tests of TensorRT also where it is not installed.
test-gpu:
	$(HERE) -m pytest -m gpu -rs

# Where Triton or Ray cannot be installed, their tests are skipped and say so.
test-all: cpp-unit cpp-sanitize cpp-static cpp-aarch64 cpp-fuzz browser
	-$(MAKE) triton ray
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
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf $(VENV) engines/build build
