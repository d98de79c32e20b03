.PHONY: build test lint format bench docs

# Compiles only what changed; wants `pip install ".[dev]"` in the environment.
build:
	pip install --quiet --no-build-isolation --no-deps --editable .

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(shell git ls-files 'csrc/*')

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(shell git ls-files 'csrc/*')

bench:
	status=0; for script in benchmarks/bench_*.py; do python $$script || status=1; done; exit $$status

# The documentation site, into site/; wants `pip install ".[docs]"`.
docs:
	mkdocs build --strict
