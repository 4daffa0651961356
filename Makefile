# Every target makes .venv first if it is missing. PYTHON names the interpreter to make it from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# CI sets MEASURE to `-m coverage run`, to measure coverage in the same runs.
MEASURE ?=
PYTEST := $(BIN)/python $(MEASURE) -m pytest -q
# Without a GPU, kernels run in Triton's interpreter, which needs a process of its own.
INTERPRET := $(shell nvidia-smi >/dev/null 2>&1 || echo TRITON_INTERPRET=1)
OUT ?= runs/demo
MODEL ?= runs/demo/detector.onnx

.PHONY: demo test test-slow test-all attack check bench serve clean

demo: $(READY)  ## train, export, verify, serve and detect, on data that is built in
	$(BIN)/ghm demo --out $(OUT)

test: SELECT := not slow
test: $(READY)  ## the tests of every commit, with the examples in docstrings: 5 minutes on two cores
	$(lanes)

test-slow: SELECT := slow
test-slow: $(READY)  ## the rest: fuzzing, a browser, long trainings, benchmark scripts
	$(lanes)

test-all: test test-slow  ## every test

attack: $(READY)  ## hostile tries against real services on loopback: 7 minutes on two cores
	$(PYTEST) tests/attack

# Two lanes side by side, of about the same length; 5 is pytest's status if it selects no test.
LIBRARY := tests/ghm_triton --doctest-modules ghm_triton export service
OTHERS := tests/service tests/benchmarks
define lanes
@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
run() { $(PYTEST) "$$@" || [ $$? -eq 5 ] || status=1; }; \
( status=0; \
  $(if $(INTERPRET),export $(INTERPRET);) run -m "kernels and $(SELECT)" tests/ghm_triton; \
  unset TRITON_INTERPRET; \
  run -m "$(SELECT)" tests --ignore=tests/ghm_triton $(OTHERS:%=--ignore=%); \
  exit $$status ) > "$$log" 2>&1 & lane=$$!; \
status=0; \
run -m "not kernels and $(SELECT)" $(LIBRARY); \
run -m "$(SELECT)" $(OTHERS); \
wait $$lane || status=1; \
cat "$$log"; exit $$status
endef

check: $(READY)  ## lint, format, types and the layers of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## the losses against their peers, on the GPU if there is one
	$(BIN)/python -m benchmarks.losses

serve: $(READY)  ## serve MODEL over HTTP
	$(BIN)/ghm serve $(MODEL)

clean:  ## remove what make made
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache .coverage*

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@
