# `make demo` and `make test` do all their own set-up: Python >= 3.11 and make suffice.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Compiled without LLVM's optimisations, without XLA's emitters of fusions through MLIR, and in one
# piece each: no contract needs them, and they take two thirds of the time to compile. XLA stops at
# flags that it does not know, as those of jaxlib 0.10 may be to others.
FASTER = --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
FLAGS = --xla_backend_optimization_level=0 \
    $$($(BIN)/python -m pip show jaxlib | grep -q '^Version: 0\.10\.' && echo $(FASTER))
RUN = XLA_FLAGS="$$XLA_FLAGS $(FLAGS)" \
    $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-all test-nightly lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m abkd_jax.main --config=configs/digits.py --workdir=runs/digits

test: $(VENV)/.test lint
	$(RUN) -m "not slow and not long and not nightly" $(PYTEST)

test-long: $(VENV)/.test lint
	$(RUN) -m "not slow and not nightly" $(PYTEST)

test-all: $(VENV)/.test lint
	$(RUN) -m "not nightly" $(PYTEST)

test-nightly: $(VENV)/.test lint
	$(RUN) -m nightly $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.demo: setup.cfg pyproject.toml | $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"abkd_jax needs Python >= 3.11, but $(PYTHON) is {sys.version.split()[0]}; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache
