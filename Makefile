# Each of `make demo` and `make test` sets up everything it needs; a second run finds it and starts at once.

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=

DEMO := .venv-demo
EMOJI := .venv-demo-emoji
TEST := .venv-test
FLOOR := .venv-floor
NEWEST := .venv-newest
EXTRAS := .venv-extras

# In the locale C, pip and Python do not get on with a clone whose path has other than ASCII letters.
ifeq ($(filter %.UTF-8 %.utf8 %.utf-8,$(firstword $(LC_ALL) $(LC_CTYPE) $(LANG))),)
export LC_ALL := C.UTF-8
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-emoji test test-floor test-newest test-slow test-all test-extras index environments lint architecture format bench clean

help:
	@echo "make demo       train and show DualToken on handwritten digits, into dualtoken-demo/  (DEMO_ARGS=...)"
	@echo "make demo-emoji  draw what was never seen: OpenMoji's colour pictures, into emoji-demo/; trains for more than an hour"
	@echo "make test       the tests, on CPU and offline, the trained demo's check included      (PYTEST_ARGS=...)"
	@echo "make test-all   those and the slow ones"
	@echo "make test-floor   the quick tests with the oldest libraries that pyproject.toml admits"
	@echo "make test-newest  the quick tests with the newest that the package index has"
	@echo "make test-extras  those that need torchvision, torchmetrics, lpips, open_clip, triton: an environment of its own"
	@echo "make lint       check style and format; 'make format' mends what can be mended"
	@echo "make architecture  the structure of the package in numbers: imports, lines, where an argument is declared"
	@echo "make bench      run every benchmarks/bench_*.py"
	@echo "make clean      remove virtual environments, build products and caches, not the demo's results"
	@echo "PYTHON=...      the Python (3.10 or later) to make virtual environments with: $(PYTHON)"

demo: $(DEMO)/.installed
	$(DEMO)/bin/python examples/digits/run_demo.py --output_dir dualtoken-demo $(DEMO_ARGS)

demo-emoji: $(EMOJI)/.installed
	$(EMOJI)/bin/python examples/emoji/run_demo.py --output_dir emoji-demo $(DEMO_ARGS)

# Side by side, a thread each; the demo's are one group, so that one of the two processes trains it, once.
test: $(TEST)/.installed
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadgroup $(PYTEST_ARGS)

QUICK_TESTS = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -m "not slow" -n 2 --ignore tests/test_demo.py $(PYTEST_ARGS)

# Without the demo: what may differ between versions, the others see.
test-floor: $(FLOOR)/.installed
	$(call QUICK_TESTS,$(FLOOR))

test-newest: $(NEWEST)/.installed
	$(call QUICK_TESTS,$(NEWEST))

test-slow: $(TEST)/.installed
	$(TEST)/bin/python -m pytest -m slow $(PYTEST_ARGS)

test-all: $(TEST)/.installed
	$(TEST)/bin/python -m pytest $(PYTEST_ARGS)

# The shim makes torchvision importable beside a torch it was not built for, as constraints.txt may bring one.
test-extras: $(EXTRAS)/.installed
	PYTHONPATH=tests $(EXTRAS)/bin/python -m pytest -p torchvision_shim -m extras $(PYTEST_ARGS)

lint: $(TEST)/.installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/python tests/model_conventions.py

architecture:
	$(PYTHON) tests/architecture.py

format: $(TEST)/.installed
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

bench: $(TEST)/.installed
	@set -e; for script in $(sort $(wildcard benchmarks/bench_*.py)); do echo "$$script"; $(TEST)/bin/python $$script; done

# DeepSpeed's operators are compiled at first use, and not here. In the locale C, setuptools cannot install from a path
# with other than ASCII letters. The stamp is written last, so an interrupted installation is taken up again; it is older
# than one of the files once that changes. The package is installed editable: changes to the code need no new
# installation.
TORCH := $(shell grep -m1 '^torch==' constraints.txt)
CONSTRAINTS := -c constraints.txt
$(DEMO)/.installed: EXTRA := demo
$(EMOJI)/.installed: EXTRA := demo-emoji
$(TEST)/.installed: EXTRA := dev
$(EXTRAS)/.installed: EXTRA := dev,perceptual,eval,kernels
$(FLOOR)/.installed: EXTRA := test
$(FLOOR)/.installed: CONSTRAINTS := -c constraints-floor.txt $(TORCH)
$(FLOOR)/.installed: constraints-floor.txt
# Anew after an hour, since the index changes. torch alone stays: another one is gigabytes.
$(NEWEST)/.installed: EXTRA := dev
$(NEWEST)/.installed: CONSTRAINTS := --upgrade --upgrade-strategy eager $(TORCH)
$(NEWEST)/.installed: $(if $(shell find $(NEWEST)/.installed -mmin -60 2>/dev/null),,index)
.venv-%/.installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "'$(PYTHON)' is not a Python 3.10 or later: name one, as in 'make $* PYTHON=python3.12'."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "'$(PYTHON)' has no venv and pip of its own: install them (Debian, Ubuntu: python3-venv)," \
			"or name another Python, as in 'make $* PYTHON=python3.12'."; exit 1; }
	@echo "Installing into .venv-$*: minutes the first time, mostly torch."
	$(PYTHON) -m venv .venv-$*
	DS_BUILD_OPS=0 .venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --retries 10 $(CONSTRAINTS) -e ".[$(EXTRA)]"
	@touch $@

environments: $(TEST)/.installed $(FLOOR)/.installed $(NEWEST)/.installed $(EXTRAS)/.installed

clean:
	rm -rf $(DEMO) $(EMOJI) $(TEST) $(FLOOR) $(NEWEST) $(EXTRAS) build dist src/*.egg-info .pytest_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
