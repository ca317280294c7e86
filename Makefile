# Every target sets up what it needs in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU needs no particular build of torch, so it gets the tested one; a GPU machine brings its own choice.
CONSTRAINT := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINT)

.PHONY: demo serve test check bench-cpu clean

demo: $(VENV)/.installed ## fetch the default model and ask it a question
	$(BIN)/ostinato chat "What is the capital of France?"

serve: $(VENV)/.installed-serve ## serve the default model on http://127.0.0.1:8000
	$(BIN)/ostinato serve

test: $(VENV)/.installed-dev ## the whole test suite
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev ## formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-cpu: $(VENV)/.installed-dev ## side by side with transformers on this CPU
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ostinato needs Python 3.11 or later, this is " + sys.version + "; use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints-cpu.txt
	@echo "installing ostinato into $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	$(PIP) -e '.[serve]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools for tests and checks into $(VENV)"
	$(PIP) -e '.[test,lint]'
	touch $@
