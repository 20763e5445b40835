# `make help` lists the targets. Every target prepares what it needs and skips the
# steps that are already done.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VENDORED := book/_vendor/fingerprint.txt
BUILT := _build/.built

BOOK_SOURCES := config.json pyproject.toml $(wildcard notebooks/*) \
	$(shell find book -type f -not -path 'book/_vendor/*' -not -name '*.pyc') \
	$(shell find gradinv_helpers -name '*.py' -o -name '*.json')

.PHONY: help book test check demo lab stamp linkcheck clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(INSTALLED): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing the package with everything into $(VENV) (takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]"
	@touch $@

$(VENDORED): $(INSTALLED) book/tools/vendor_assets.py $(wildcard book/assets/*)
	@$(BIN)/python book/tools/vendor_assets.py

# A failed build leaves no mark, so the next call builds again. OMP_NUM_THREADS and
# PYTHONHASHSEED make two builds equal; the notebooks read GRADINV_STATIC_PAGE to
# leave out the cells that need a running kernel.
$(BUILT): $(INSTALLED) $(VENDORED) $(BOOK_SOURCES)
	@rm -f $@
	@$(BIN)/python book/tools/refresh_cache.py
	@env -u MPLBACKEND GRADINV_STATIC_PAGE=1 OMP_NUM_THREADS=1 PYTHONHASHSEED=0 \
		JUPYTER_PREFER_ENV_PATH=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
		$(BIN)/jupyter-book build . --config book/_config.yml \
		--toc book/_toc.yml -W -n --keep-going
	@touch $@

book: $(BUILT) ## Build the book and say where it is
	@echo "The book: $(CURDIR)/_build/html/index.html"
	@echo "Sliders and formulas need a web server:"
	@echo "  $(BIN)/python -m http.server --directory _build/html"

test: $(INSTALLED) ## Build the book, then run every test
	@book/tools/ensure_chromium.sh
	@$(MAKE) book
	@MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

check: $(INSTALLED) ## Format, lint, types and the fast tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) \
		--dist loadfile -m "not slow" --ignore tests/book

demo: $(INSTALLED) ## Attack one update with the default settings
	@$(BIN)/gradinv invert --output-dir outputs/demo

lab: $(INSTALLED) ## Open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=notebooks

stamp: ## Write the address and version of pyproject.toml where they are shown
	@$(PYTHON) book/tools/stamp_address.py

linkcheck: $(INSTALLED) $(VENDORED) ## Look at every outside link of the book
	@GRADINV_STATIC_PAGE=1 OMP_NUM_THREADS=1 $(BIN)/jupyter-book build . \
		--config book/_config.yml --toc book/_toc.yml --builder linkcheck

clean: ## Remove the built book and all caches, keep .venv and outputs
	@rm -rf _build book/_vendor .pytest_cache .mypy_cache .ruff_cache .hypothesis
