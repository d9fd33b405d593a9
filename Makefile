# Everything a developer or a curious user types. `make help` lists the targets.
# PYTHON=/path/to/python3.11 chooses the interpreter of .venv and of the device environment.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PIP_DISABLE_PIP_VERSION_CHECK := 1
RUNTIME_PYTHONS := 3.10 3.11 3.12 3.13
DEV := .venv/.installed
DEVICE := .envs/device/.installed

# $(call environment,FOLDER,PYTHON,PACKAGES): the stamp $@ is written only after all of it has worked.
define environment
	@rm -f $@
	@echo "Setting up $(1) (the first time takes a few minutes)"
	@python="$(strip $(2))"; "$${python:?no Python for $(1), see above}" -m venv $(1)
	@$(1)/bin/python -m pip install --quiet "setuptools>=77"
	@$(1)/bin/python -m pip install --quiet --no-build-isolation $(3)
	@touch $@
endef
find_python = $(or $(PYTHON),$(shell .ci/find-python 3.11))

.PHONY: help dev device-env demo test test-realdata test-runtime check format docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(DEV)  ## create .venv with both distributions and the tools of development

device-env: $(DEVICE)  ## create .envs/device: the runtime and one engine, no PyTorch

demo: $(DEV) $(DEVICE)  ## run the whole loop on handwritten digits and write demo/
	.venv/bin/python -m lorac_deploy.demo --device-python .envs/device/bin/python --out demo

test: $(DEV)  ## run all tests but the long studies on real data
	.venv/bin/python -m pytest -m "not (realdata and slow)"

test-realdata: $(DEV)  ## run the tests and studies on real data (../shared/data)
	.venv/bin/python -m pytest -m realdata

test-runtime:  ## test the runtime alone on every Python it supports that this machine has
	@.ci/test-runtime $(RUNTIME_PYTHONS)

check: $(DEV)  ## formatting, lint, types, import rules
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python -m pytest tests/test_imports.py

format: $(DEV)  ## format the code and mend what lint can mend
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

docs: $(DEV)  ## write docs/commands.md anew from the commands' own parsers
	.venv/bin/python docs/generate_commands.py

clean:  ## remove the environments, the demo's output and caches
	rm -rf .venv .envs demo build runtime/build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(DEV): pyproject.toml runtime/pyproject.toml
	$(call environment,.venv,$(find_python),-e ./runtime -e ".[demo$(comma)dev]")

$(DEVICE): runtime/pyproject.toml
	$(call environment,.envs/device,$(find_python),-e "./runtime[onnxruntime-training]")

.envs/py%/.installed: runtime/pyproject.toml
	$(call environment,.envs/py$*,$(shell .ci/find-python $*),-e "./runtime[onnxruntime-training$(comma)images$(comma)test]")

comma := ,
