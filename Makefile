# The commands one needs. Each creates the environment .venv if it is missing. `make gpu` uses the installed Python and
# installs nothing.
#
# make run            env, verify, generate and encode on the bundled presets, with tokens per second beside transformers
# make test           every test that needs no GPU
# make test-machines  the operators' tests and `pyfused verify`, as on older and newer processors
# make test-versions  the transformers integration with older releases, the CPU kernels with the oldest torch
# make test-aarch64   the operators' tests with the CPU kernels cross-compiled for ARM, in an emulator
# make lint           ruff and mypy
# make docs           builds the site into build/site, with warnings as errors
# make bench          every benchmark on the CPU; updates benchmarks/results, the README and docs/performance
# make gpu-build      builds the extensions and compiles Triton's kernels for a machine with a Hopper GPU and Python 3.12, where
#                     nothing can be installed
# make gpu            the GPU's checks and measurements, within BUDGET seconds, into RESULTS; then again with CALL=second
# make gpu-publish    turns the results in RESULTS into evidence, result file and README
# make clean          removes everything that the other commands made

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports, once, also where the shell forbids it to keep that. To compile every installed file takes a
# minute, and most are never read.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/pip install --quiet --no-compile
SOURCES := $(shell find csrc kernels -type f -not -name '*.pyc') pyproject.toml setup.py CMakeLists.txt
GPU_PYTHON ?= python3.12
CALL ?= first
BUDGET ?= 390
RESULTS ?= build/gpu-results

# A build for every chip (CMakeLists.txt) takes five times as long. Without a GPU one chip shows that everything compiles; what the
# tests read for another, they compile themselves.
BUILDS := $(addprefix $(VENV)/,lib.stamp test.stamp bench.stamp)
$(BUILDS): export PYFUSED_BUILD_ARCHITECTURES ?= $(if $(shell command -v nvidia-smi),80-real )90a-real

.PHONY: run test test-machines test-versions test-aarch64 lint docs bench gpu gpu-build gpu-publish clean

run: $(VENV)/run.stamp
	$(BIN)/pyfused env
	$(BIN)/pyfused verify gpt2_tiny_en
	$(BIN)/pyfused generate gpt2_tiny_en --prompt "In the beginning" --max-new-tokens 96 --temperature 0.7 --top-k 40 --seed 1
	$(BIN)/python -m pyfused.bench.beside_transformers gpt2_tiny_en
	$(BIN)/pyfused verify t5_tiny_en
	$(BIN)/pyfused generate t5_tiny_en --prompt "In the beginning God created the <extra_id_0> and the earth." --num-beams 4
	$(BIN)/python -m pyfused.bench.beside_transformers t5_tiny_en
	$(BIN)/pyfused verify albert_tiny_en
	$(BIN)/pyfused encode albert_tiny_en --text "Jesus wept." --text "And God said, Let there be light: and there was light." --pool mean
	$(BIN)/pyfused verify fnet_tiny_en
	$(BIN)/pyfused encode fnet_tiny_en --text "Jesus wept." --pool cls

# Two workers need both processors: a thread that waits for another must not spin.
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests benchmarks -n 2 --dist loadfile --no-loadscope-reorder

test-machines: $(VENV)/test.stamp
	$(BIN)/python tests/machines.py

# Installs each release into $(VENV)/versions, once. NAMES chooses some of them, such as transformers-5.0.0.
test-versions: $(VENV)/test.stamp
	$(BIN)/python tests/versions.py $(NAMES)

# Needs Debian's packages g++-aarch64-linux-gnu and qemu-user, and says so.
test-aarch64: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/aarch64/run.py

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict

bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/publish.py --run

gpu:
	$(PYTHON) benchmarks/gpu.py --call $(CALL) --budget $(BUDGET) --results $(RESULTS)

gpu-publish:
	$(PYTHON) benchmarks/gpu.py --publish $(RESULTS)

# The object files have their own folder: those of an install have code for other chips too.
gpu-build: .venv-gpu/stamp $(VENV)/test.stamp
	PYFUSED_REQUIRE_EXTENSIONS=1 PYFUSED_BUILD_ARCHITECTURES=90a-real .venv-gpu/bin/python setup.py --quiet build_ext \
	  --build-temp build/gpu-objects --build-lib build/gpu
	$(BIN)/python benchmarks/gpu_ahead.py
	ls -l build/gpu/pyfused

.venv-gpu/stamp:
	$(GPU_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet setuptools pybind11 cmake ninja
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist *.egg-info pyfused/*.so .pytest_cache .mypy_cache .ruff_cache

$(VENV)/pip.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	touch $@

# torch first and pinned: from a range of versions pip picks a build with gigabytes of CUDA packages.
$(VENV)/base.stamp: $(VENV)/pip.stamp
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/lib.stamp: $(VENV)/base.stamp $(SOURCES)
	$(PIP) -e ".[text,keras]"
	touch $@

$(VENV)/run.stamp: $(VENV)/lib.stamp
	$(PIP) "transformers==5.23.0"
	touch $@

# For minutes the build needs every processor and pip needs one, so they run side by side; the linters come with the rest. The
# group has what the extras ask for. The build needs no torch. keras-hub goes in without its dependencies, which include
# TensorFlow. What every test process imports is compiled here, once: the workers start together, and each would compile it.
IMPORTED := torch._inductor.compile_fx, torch.distributed.fsdp, transformers.modeling_utils, keras_hub, sentence_transformers
$(VENV)/test.stamp: export PATH := $(CURDIR)/$(BIN):$(PATH)
$(VENV)/test.stamp: $(VENV)/pip.stamp $(SOURCES)
	$(PIP) --group build
	$(BIN)/pip install --verbose --no-compile --no-build-isolation --no-deps -e . & build=$$!; \
	  { $(PIP) "$(TORCH)" && touch $(VENV)/base.stamp && $(PIP) --group test --group lint && \
	    $(PIP) --no-deps "keras-hub==0.32.0" && \
	    $(BIN)/python tests/versions.py --install transformers-4.57.6 && \
	    KERAS_BACKEND=torch $(BIN)/python -c "import $(IMPORTED)"; } || { kill $$build; exit 1; }; \
	  wait $$build
	touch $(VENV)/lib.stamp $(VENV)/lint.stamp $@

$(VENV)/bench.stamp: $(VENV)/test.stamp
	$(PIP) -e ".[bench]"
	touch $@

$(VENV)/lint.stamp: $(VENV)/lib.stamp pyproject.toml
	$(PIP) --group lint
	touch $@

# The site is made from the sources alone, so nothing has to be built for it.
$(VENV)/docs.stamp: $(VENV)/base.stamp pyproject.toml
	$(PIP) --group docs
	touch $@
