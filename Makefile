# The two commands: `make demo` and `make test`, and the site: `make docs`. Each makes the environment
# that it needs.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
# Where PyTorch comes from, if not from the package index: its CPU builds stand at
# https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.PHONY: demo test lint docs picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/innsteer demo --replace --out $(OUT)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

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

clean:
	rm -rf $(VENV) runs build
