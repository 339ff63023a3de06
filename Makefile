# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
SOURCE ?= shakespeare
# DVC starts the stages with the `python` that is first on PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

# DVC removes the outputs of a stage before it runs. When that fails its cache has the old ones, but not the reports.
# Their copy goes once it is not needed; one that is there is of a call that was killed.
restore = { [ ! -d .smallgpt/reports ] || cp -an .smallgpt/reports/. reports; rm -rf .smallgpt/reports; }
keeping = mkdir -p .smallgpt reports && $(restore) && cp -a reports .smallgpt && \
	{ $(1) || { code=$$?; dvc checkout --quiet --force || true; $(restore); exit $$code; }; } && rm -rf .smallgpt/reports

.PHONY: help repro test test-fast lint format ui export data bench bench-train clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "smallgpt needs Python 3.11 or newer")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[train,serve,dev]'
	touch $@

repro: .venv/.installed  ## Run the pipeline: corpus, tokenizer, training, evaluation, export
	@python -m smallgpt.config --complete params.yaml
	@$(call keeping,dvc repro)
	@printf '\ncorpus     data/prepared\ntokenizer  models/tokenizer\nmodel      models/gpt\nbundles    exports (no PyTorch needed)\nreports    reports, and make ui\n\n'
	@cat reports/evaluate/perplexity.md
	@bundle=$$(ls -d exports/{fp32*,int*} 2> /dev/null | head -n 1); [ -z "$$bundle" ] || \
		{ echo && python -m smallgpt.ort_generate "$$bundle" --echo --quiet --seed 1 -p 'Once upon a time'; }

export: .venv/.installed  ## Run what the ONNX bundles need
	@$(call keeping,dvc repro export)

data: .venv/.installed  ## Write a corpus as text: make data SOURCE=shakespeare
	@python -m smallgpt.corpus $(SOURCE)

ui: .venv/.installed  ## Show the runs on http://127.0.0.1:5000
	@echo 'the runs: http://127.0.0.1:5000/#/experiments?workflowType=machine_learning'
	@mlflow ui --host 127.0.0.1 --backend-store-uri "$$(python -c 'from smallgpt.tracking import tracking_uri; print(tracking_uri())')"

bench-train: .venv/.installed  ## Training speed against Transformers and the machine's peak; half an hour on 2 cores
	@rm -f reports/bench/train.json  # it may be another machine's
	@python benchmarks/train.py --shape gpt2,llama,default
	@python benchmarks/train.py --shape gpt2 --only products,ours,peer --mode compiled --variant dropout,long
	@python benchmarks/train.py --shape gpt2 --only ours --mode compiled --variant base,muon,ema,accumulated,accumulated-muon
	@python benchmarks/train.py --shape gpt2 --only ours --mode compiled --startup

test: .venv/.installed  ## All tests
	@python -m pytest

test-fast: .venv/.installed  ## The tests that take seconds
	@python -m pytest -m 'not slow'

lint: .venv/.installed  ## Format check, lint and types
	@ruff format --check . && ruff check . && mypy

format: .venv/.installed  ## Format the code
	@ruff format . && ruff check --fix .

# GCC drops the stores of llama.cpp's AMX configuration as dead, and its products crash without them.
.venv-bench/.installed: pyproject.toml constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	CMAKE_ARGS='-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS=-fno-tree-dse\ -fno-dse' .venv-bench/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

.venv-genai/.installed: constraints.txt
	test -x .venv-genai/bin/python || $(PYTHON) -m venv .venv-genai
	.venv-genai/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt onnxruntime-genai
	touch $@

bench: .venv/.installed .venv-bench/.installed .venv-genai/.installed  ## Time decoding of models/gpt and exports against four engines
	@.venv-bench/bin/python benchmarks/decode.py

clean:  ## Remove what the pipeline and the tools wrote, but not the environment, the DVC cache and MLflow's runs
	rm -rf data/prepared data/tokens models exports reports/{*.json,train,evaluate} .smallgpt .pytest_cache .mypy_cache .ruff_cache .hypothesis
