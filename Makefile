# `make test` and `make demo` work on a fresh machine: each sets up .venv first, and again when the files that say what
# to install have changed.
#
# PYTHON: the interpreter that .venv is made with.
# TORCH: what pip installs first; the pinned version by default. Without a GPU, and with an index that has no CPU-only
# build, plain torch fetches the CUDA libraries too, which is right for a machine with a GPU. For a certain build give
# pip's own arguments, for instance TORCH="torch==2.13.0 --index-url URL".
# TESTS: further arguments of pytest, for instance TESTS=--runslow.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)

BIN := .venv/bin
READY := .venv/.ready
START := $(shell date +%s)

# Runs the commands in $(1), then says how long the set-up before them and they themselves took.
define timed
@begun=$$(date +%s); { $(1); } && \
awk -v start=$(START) -v begun=$$begun -v ended=$$(date +%s) \
'BEGIN { printf "install: %.1f minutes, run: %.1f minutes\n", (begun - start) / 60, (ended - begun) / 60 }'
endef

.PHONY: demo docs test test-fast clean

# One process a core, one thread each (tests/conftest.py); a process that has done its share takes from the others'.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(READY)
	$(call timed,$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(PYTEST) $(TESTS))

# The inner loop: without what trains, publishes, packs or measures.
test-fast: $(READY)
	$(call timed,$(PYTEST) -m "not slow and not long" $(TESTS))

demo: $(READY)
	$(call timed,$(BIN)/python examples/demo.py --output_dir demo)

# The documentation as a site, at an address that it prints.
docs: $(READY)
	$(BIN)/python -m mkdocs serve

# lpips is there for its weight files only; what it depends on (torchvision) would replace torch.
# The pin of torch is left out of the constraints here, so that TORCH decides and the second line keeps what it chose.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c .venv/constraints.txt -e '.[dev,demo,docs]'
	$(BIN)/python -m pip install -c .venv/constraints.txt --no-deps lpips
	touch $@

clean:
	rm -rf .venv build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
