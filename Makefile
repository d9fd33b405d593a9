# Everything a developer or a curious user types. `make help` lists the targets.
# PYTHON=/path/to/python3.11 chooses the interpreter of .venv and of the device environments.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PIP_DISABLE_PIP_VERSION_CHECK := 1
RUNTIME_PYTHONS := 3.10 3.11 3.12 3.13
DEV := .venv/.installed
DEVICES := .envs/device/.installed .envs/device-training/.installed
# What the page of `lorac-deploy web` computes with; only npm can fetch it, and its tests are skipped where there is none.
WEB := .envs/web/.installed
TFLITE := .envs/tflite-runtime/.installed .envs/litert/.installed
# Environments of `make test-engines`: .envs/engine-PYTHON-ENGINE, ENGINE being a version of onnxruntime or "newest".
ENGINES := 3.10-1.17.3 3.10-1.19.2 3.10-1.23.2 3.11-newest 3.13-newest
OLD_NUMPY := 1.17.3 1.19.2  # engines that are tried with numpy 1, the newest with numpy 2, others with what pip takes

# $(call environment,FOLDER,PYTHON,PACKAGES): the stamp $@ is written only after all of it has worked.
# Below .envs it begins anew: the engines' packages overwrite each other's files.
define environment
	@rm -f $@
	@echo "Setting up $(1) (the first time takes a few minutes)"
	@python="$(strip $(2))"; "$${python:?no Python for $(1), see above}" -m venv $(if $(filter .envs/%,$(1)),--clear) $(1)
	@$(1)/bin/python -m pip install --quiet $(3)
	@touch $@
endef
find_python = $(or $(PYTHON),$(shell .ci/find-python 3.11))

.PHONY: help dev device-env tflite-env web-env demo test test-long test-realdata test-kills fuzz test-arm test-runtime test-engines check format docs site dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(DEV)  ## create .venv with both distributions and the tools of development

device-env: $(DEVICES)  ## create .envs/device and .envs/device-training: the runtime and one engine each, no PyTorch

tflite-env: $(TFLITE)  ## create .envs/tflite-runtime and .envs/litert: the two runtimes that every .tflite file is tested on

web-env: $(WEB)  ## fetch onnxruntime-web with npm into .envs/web, for tests of the page

demo: $(DEV) $(DEVICES)  ## run the whole loop on handwritten digits with both engines and write demo/
	.venv/bin/python -m lorac_deploy.demo --device-python .envs/device/bin/python \
	    --training-python .envs/device-training/bin/python --out demo

test: $(DEV) $(TFLITE) .envs/device/.installed $(if $(shell command -v npm),$(WEB))  ## run all tests but long ones and studies on real data
	.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not (realdata and slow) and not long"

test-long: $(DEV)  ## run what is left out there: more networks, layouts and seeds of what it tries already
	.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "long and not realdata"

test-realdata: $(DEV)  ## run the tests and studies on real data (../shared/data)
	.venv/bin/python -m pytest -m realdata

test-kills: $(DEV)  ## kill a process that adapts a model at every operation on files and at random; 1,000 cycles
	LORAC_KILLS=100 LORAC_KILL_STEP=1 LORAC_CYCLES=1000 .venv/bin/python -m pytest -n 2 -rP tests/test_kills.py tests/test_cycles.py

fuzz: $(DEV)  ## feed the runtime damaged and hostile files, guided by coverage, for half an hour (FUZZ_SECONDS each)
	.venv/bin/python -m pip install --quiet "atheris>=2.3,<4"
	.venv/bin/python tests/fuzz.py all $(or $(FUZZ_SECONDS),420)

test-arm: $(DEV)  ## the runtime on 64-bit Arm, emulated: two steps and its own tests; needs Debian and user name spaces
	.venv/bin/python tests/arm/run.py .envs/arm --tests --log docs/results/arm.json

test-runtime:  ## test the runtime alone on every Python it supports that this machine has
	@.ci/test-runtime $(RUNTIME_PYTHONS)

test-engines: $(DEV)  ## train the same artifacts on the oldest and the newest onnxruntime and compare
	@.ci/test-engines $(ENGINES)

check: $(DEV)  ## formatting, lint, types, import rules
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python -m pytest tests/test_imports.py

format: $(DEV)  ## format the code and mend what lint can mend
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

docs: $(DEV)  ## write docs/commands.md and docs/manifest.schema.json anew from the code
	.venv/bin/python docs/generate_commands.py
	.venv/bin/python docs/generate_schema.py

site: $(DEV)  ## make the site of documentation in site/; it opens from the disk
	.venv/bin/python -m sphinx --fresh-env --write-all --fail-on-warning --keep-going --quiet --jobs 2 docs site

dist: $(DEV)  ## build, check and install in clean environments what is released: two wheels, two sdists, their hashes
	@.ci/dist $(RUNTIME_PYTHONS)

clean:  ## remove the environments, the demo's output and caches
	rm -rf .venv .envs demo dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The version is part of what is installed.
VERSION := runtime/lorac_runtime/version.py

$(DEV): pyproject.toml runtime/pyproject.toml $(VERSION)
	$(call environment,.venv,$(find_python),-e ./runtime -e ".[demo$(comma)dev]")

.envs/device/.installed: runtime/pyproject.toml
	$(call environment,.envs/device,$(find_python),-e "./runtime[onnxruntime]")

.envs/device-training/.installed: runtime/pyproject.toml
	$(call environment,.envs/device-training,$(find_python),-e "./runtime[onnxruntime-training]")

# The oldest runtime that files must work on; it has builds up to Python 3.11 and for numpy 1.
.envs/tflite-runtime/.installed:
	$(call environment,.envs/tflite-runtime,$(find_python),"tflite-runtime==2.14.0" "numpy<2")

.envs/litert/.installed:
	$(call environment,.envs/litert,$(find_python),"ai-edge-litert==2.3.0")

# The version and its hashes stand in that module. Without a network the tests of the page are skipped, by name.
.envs/web/.installed: lorac_deploy/web/engine_files.py $(DEV)
	@rm -f $@
	@.venv/bin/python -m lorac_deploy.web.engine_files .envs/web && touch $@ || echo "no onnxruntime-web in .envs/web"

# What a device gets is tested as it gets it: .ci/test-runtime puts the newest wheel into environments that are there.
WHEEL := .envs/wheel/.installed
$(WHEEL): runtime/pyproject.toml $(shell find runtime -name '*.py' -o -name '*.md')
	$(call environment,.envs/wheel,$(find_python),pip)
	@.envs/wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir .envs/wheel/dist ./runtime

.envs/py%/.installed: runtime/pyproject.toml | $(WHEEL)
	$(call environment,.envs/py$*,$(shell .ci/find-python $*),"$$(echo .envs/wheel/dist/*.whl)[onnxruntime$(comma)images$(comma)test]")

# The stem is PYTHON-ENGINE, as in $(ENGINES).
.envs/engine-%/.installed: runtime/pyproject.toml
	$(call environment,.envs/engine-$*,$(shell .ci/find-python $(engine_python)),-e "./runtime[onnxruntime]" $(engine_packages))

engine_python = $(firstword $(subst -, ,$*))
engine_version = $(lastword $(subst -, ,$*))
engine_packages = $(if $(filter newest,$(engine_version)),"numpy>=2","onnxruntime==$(engine_version)") \
    $(if $(filter $(engine_version),$(OLD_NUMPY)),"numpy<2")
comma := ,
