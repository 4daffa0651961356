# Every target makes .venv first when it is missing. PYTHON names the interpreter to make it from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q
# Where there is no GPU, the kernels run in Triton's interpreter, which wants a process of its own.
INTERPRET := $(shell nvidia-smi >/dev/null 2>&1 || echo TRITON_INTERPRET=1)
OUT ?= runs/demo
MODEL ?= runs/demo/detector.onnx

.PHONY: demo test check bench serve clean

demo: $(READY)  ## train, export, verify, serve and detect, on data that is built in
	$(BIN)/ghm demo --out $(OUT)

test: $(READY)  ## every test, in two lanes that run side by side
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	( status=0; \
	  $(INTERPRET) $(PYTEST) -m kernels tests/ghm_triton || status=1; \
	  $(PYTEST) -m "not kernels" --ignore=tests/ghm_triton || status=1; \
	  exit $$status ) > "$$log" 2>&1 & lane=$$!; \
	status=0; \
	$(PYTEST) -m "not kernels" tests/ghm_triton || status=1; \
	wait $$lane || status=1; \
	cat "$$log"; exit $$status

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the losses against their peers, on the GPU where there is one
	$(BIN)/python -m benchmarks.losses

serve: $(READY)  ## serve MODEL over HTTP
	$(BIN)/ghm serve $(MODEL)

clean:  ## remove what make made
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@
