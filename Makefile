# Two commands: `make demo` and `make test`. Both set up .venv first; the stamp makes that idempotent.
# CPU machines: torch comes pinned, before anything asks for "torch" and pulls a CUDA build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CSRC := $(shell find csrc -type f)
NVCC := $(shell command -v nvcc)

# processes of the tests, each with one thread
WORKERS ?= 2

.PHONY: help setup demo test test-slow coverage aot-budget lint types format docs bench-peers clean

help:
	@echo "make demo         distil examples/quickstart.yaml on this machine (no network, no GPU needed)"
	@echo "make test         run the test suite; WORKERS=2 processes"
	@echo "make test-slow    run what make test leaves out: sanitizers, packaging"
	@echo "make coverage     run all tests and report the branches that they take"
	@echo "make aot-budget   compile the Triton kernels that changed; rewrites tests/aot_budget.json"
	@echo "make lint         mypy, ruff and clang-format, as CI runs them"
	@echo "make types        mypy alone"
	@echo "make format       rewrite files the way lint wants them"
	@echo "make docs         build the documentation site into site/, links checked"
	@echo "make bench-peers  install the libraries that the benchmarks compare against"

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml Makefile $(CSRC)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/pip install --quiet "$(TORCH)" numpy
	$(if $(NVCC),$(BIN)/pip install --quiet --no-deps nvidia-cutlass==4.2.0)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[engine,bench,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/modxfer distill examples/quickstart.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

aot-budget: $(STAMP)
	env -u TRITON_INTERPRET $(BIN)/python tests/aot.py --update

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

# for mypy: what is imported as one package stands in two folders of the checkout
types: $(STAMP)
	rm -rf build/types
	mkdir -p build/types/modxfer_fast
	ln -s $(CURDIR)/kernels $(CURDIR)/modxfer_fast/* build/types/modxfer_fast
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

# what is compiled is there already
docs: $(STAMP)
	MODXFER_BUILD=none $(BIN)/pip install --quiet --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# their dependencies are ours already; installed plainly they would replace them
bench-peers: $(STAMP)
	$(BIN)/pip install --quiet --no-deps liger-kernel==0.8.5 trl==1.16.0

clean:
	rm -rf build dist site *.egg-info modxfer_fast/*.so $(VENV)
