.DEFAULT_GOAL := help
.PHONY: help build test lint format bench docs

CXX_SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu')

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Compile what changed and install in place (needs the `dev` extra)
	pip install --quiet --no-build-isolation --no-deps --editable .

test: ## Run the test suite
	pytest

lint: ## Check style and types: ruff, mypy, clang-format
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CXX_SOURCES)

format: ## Repair what ruff and clang-format can
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_SOURCES)

bench: ## Run the benchmarks at their default sizes
	status=0; for script in benchmarks/bench_*.py; do python $$script || status=1; done; exit $$status

docs: ## Build the documentation site into site/ (needs the `docs` extra)
	mkdocs build --strict
