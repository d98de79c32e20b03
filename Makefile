.PHONY: build test lint format bench

CXX_SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu')

# Compiles only what changed; wants `pip install ".[dev]"` in the environment.
build:
	pip install --quiet --no-build-isolation --no-deps --editable .

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CXX_SOURCES)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_SOURCES)

bench:
	status=0; for script in benchmarks/bench_*.py; do python $$script || status=1; done; exit $$status
