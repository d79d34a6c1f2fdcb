# `make` lists what there is. Everything is installed into .venv, beside this file.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
MINUTES ?=

RUN := .venv/bin/python
OUT := out-shakespeare-char
LLAMA := llama-cpp-python==0.3.36

# Another environment's settings must not leak into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-all torture llama constraints clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Another Python: make install PYTHON=python3.12"

install: .venv/.installed-demo ## make .venv and install NanoGPT into it, every version pinned
	@echo "Installed in .venv. Next: make demo"

demo: .venv/.installed-demo ## train a small Shakespeare model on this machine and let it write (MINUTES=5: a better one)
	@$(RUN) data/shakespeare_char/prepare.py
	@set -e; \
	if [ -n "$(MINUTES)" ]; \
	then config="--dataset=shakespeare_char --out_dir=$(OUT) --minutes=$(MINUTES)"; \
	elif $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then config=config/fast_shakespeare_char.py; else config=config/fast_shakespeare_cpu.py; fi; \
	echo "sh train.py $$config $(DEMO_ARGS)"; \
	$(RUN) train.py $$config $(DEMO_ARGS); \
	echo "sh sample.py --out_dir=$(OUT) --num_samples=1 --max_new_tokens=500"; \
	$(RUN) sample.py --out_dir=$(OUT) --num_samples=1 --max_new_tokens=500; \
	echo; \
	echo "The loss curve:  $(OUT)/loss.png"; \
	echo "More text:       sh sample.py --out_dir=$(OUT) --start='ROMEO:'"; \
	echo "On a web page:   .venv/bin/nanogpt serve --out_dir=$(OUT)"; \
	echo "A better model:  sh train.py config/fast_shakespeare_char.py"; \
	echo "Every setting:   sh train.py --help"

test: .venv/.installed-test ## check style and types, and run the tests (PYTEST_ARGS='-x -k name' reaches pytest)
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check --quiet .
	@$(RUN) -m mypy --no-error-summary
	@$(RUN) -m pytest -q -n auto --maxprocesses=4 $(PYTEST_ARGS) </dev/null

test-all: .venv/.installed-test ## run the long tests too
	@$(RUN) -m pytest -q -m "not network" $(PYTEST_ARGS) </dev/null

torture: .venv/.installed-test ## kill, damage and interrupt runs, and print what was lost: nothing
	@$(RUN) -m pytest -q -m torture $(PYTEST_ARGS) </dev/null

llama: .venv/.installed-test ## build llama.cpp into .venv, in which the slow tests then run exports: takes long
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" $(RUN) -m pip install -q -c constraints.txt $(LLAMA)

constraints: ## renew the pins of constraints.txt, all but torch's, which is chosen by hand
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@echo "Resolving the newest versions in a fresh environment, .venv-constraints: minutes"
	@$(PYTHON) -m venv --clear .venv-constraints
	@.venv-constraints/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)" -e '.[test,demo]'
	@.venv-constraints/bin/python -c "$$WRITE_PINS"
	@rm -rf .venv-constraints
	@echo "Wrote constraints.txt. Next: make test-all"

clean: ## remove .venv, caches and build leftovers; runs and data stay
	@rm -rf .venv .venv-constraints build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an install runs again only when what it installs has changed.

.venv/.installed-demo: pyproject.toml constraints.txt
	@$(make-venv)
	@echo "Installing NanoGPT and PyTorch into .venv: $(SIZE)"
	@$(call pip-install,.[demo])
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt
	@$(make-venv)
	@echo "Installing NanoGPT, PyTorch and what the tests need into .venv: $(SIZE)"
	@$(call pip-install,.[test])
	@touch $@ .venv/.installed-demo

SIZE := 1 to 2 GB, with CUDA several more; minutes, most of them download

# .venv/.installing holds the id of the process that is installing. When it is left over, that process
# was killed half-way, nothing in .venv can be trusted, and .venv is made anew.
define make-venv
if pid=$$(cat .venv/.installing 2>/dev/null) && kill -0 "$$pid" 2>/dev/null; then \
    echo "Process $$pid is installing into .venv: wait for it, or delete .venv/.installing" >&2; exit 1; \
fi; \
if [ -e .venv/.installing ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
    command -v "$(PYTHON)" >/dev/null || { \
        echo "$(PYTHON) is not there: NanoGPT needs Python 3.10 or newer (PYTHON=... names one)" >&2; exit 1; }; \
    $(PYTHON) -c "$$CHECK_PYTHON" || exit 1; \
    [ ! -e .venv ] || echo "The .venv that is there is incomplete: making it anew"; \
    $(PYTHON) -m venv --clear .venv; \
fi
endef

define pip-install
echo $$$$ >.venv/.installing; \
$(RUN) -m pip install -q -c constraints.txt -e '$(1)'; status=$$?; \
rm -f .venv/.installing; exit $$status
endef

define CHECK_PYTHON
import sys
if sys.version_info < (3, 10):
    sys.exit("NanoGPT needs Python 3.10 or newer, and this one is %d.%d (PYTHON=... names another)"
             % sys.version_info[:2])
try:
    import ensurepip
except ImportError:
    sys.exit("This Python has no ensurepip, which fills new environments"
             " (Debian, Ubuntu: sudo apt install python3-venv)")
endef
export CHECK_PYTHON

# Left out: this project, pip, and the CUDA libraries, whose versions torch itself fixes.
define WRITE_PINS
import re, sys
from importlib.metadata import distributions
from packaging.specifiers import SpecifierSet

header = [line for line in open("constraints.txt") if line.startswith("#")]
pins = {}
for dist in distributions():
    name, python = dist.metadata["Name"], SpecifierSet(dist.metadata["Requires-Python"] or "")
    if re.match(r"(nanogpt|pip|triton|nvidia.*|cuda.*)$$", name):
        continue
    oldest = next(minor for minor in range(10, 99) if "3.%d.99" % minor in python)
    marker = '; python_version >= "3.%d"' % oldest if oldest > 10 else ""
    pins[name.lower().replace("_", "-")] = "==" + dist.version.split("+")[0] + marker + "\n"
with open("constraints.txt", "w") as file:
    file.writelines(header)
    file.write("torch" + pins.pop("torch"))
    file.writelines(name + pins[name] for name in sorted(pins))
endef
export WRITE_PINS
