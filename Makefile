# PYTHON=... chooses the interpreter. `build` wants what pyproject.toml lists under [build-system], torch, and the package
# installed once (pip install --no-build-isolation -e .).
PYTHON ?= python
SOURCES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cuda_on_cpu/*')
RESULTS ?= benchmarks/results

SITE ?= build/site

.PHONY: build test lint format bench asan docs

build:
	SCRL_FAST_EXT=require $(PYTHON) setup.py -q build_ext --inplace

test:
	$(PYTHON) -m pytest

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(SOURCES)
	mypy

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(SOURCES)

bench:
	PYTHON=$(PYTHON) RESULTS=$(RESULTS) benchmarks/run_all.sh

asan:
	PYTHON=$(PYTHON) tests/asan.sh

docs:
	$(PYTHON) -m mkdocs build --strict --site-dir $(SITE)
