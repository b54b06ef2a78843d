# Two commands do everything: `make demo` and `make test`. Both need Python >= 3.11 (constraints.txt; the package alone takes 3.10), make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOPS ?= 0.5
LIMIT ?= 1000
OUTPUT ?= demo-output
WORKERS ?= 2
LOWEST := 5.20.0# of Transformers; as in pyproject.toml

.PHONY: demo test test-lowest lint benchmarks headline arena tables clean

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== environment: PyTorch and Transformers into $(VENV) (about 1.5 GB; a few minutes on a cold cache)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(VENV)/installed
	@echo "== compress the demo model to $(FLOPS) of its FLOPs"
	$(BIN)/infoprune compress demo --data easy-vqa:train --flops $(FLOPS) -o $(OUTPUT) --overwrite
	@echo "== dense and compressed on $(LIMIT) test questions"
	$(BIN)/infoprune evaluate $(OUTPUT) --against demo --data easy-vqa:test --limit $(LIMIT)

# Apart from the rest: Transformers imports torchao wherever it finds it, and torchao tells of every kernel that this machine can't load.
$(VENV)/torchao/installed: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -q --upgrade --no-deps -c constraints.txt --target $(VENV)/torchao torchao
	touch $@

test: $(VENV)/installed $(VENV)/torchao/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=$(VENV)/torchao OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# The families' suite once more, with the lowest version of Transformers that is supported.
test-lowest: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -q --upgrade --no-deps --target $(VENV)/lowest transformers==$(LOWEST)
	PYTHONPATH=$(VENV)/lowest $(BIN)/python -c 'import transformers as t; assert t.__version__ == "$(LOWEST)", t.__version__'
	PYTHONPATH=$(VENV)/lowest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/test_families.py tests/test_export.py tests/test_repair.py tests/test_refused.py tests/test_generation.py

lint: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

benchmarks: $(VENV)/installed $(VENV)/torchao/installed
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/runner.py
	$(BIN)/python benchmarks/crash.py
	$(BIN)/python benchmarks/ffn.py
	$(BIN)/python benchmarks/heads.py
	$(BIN)/python benchmarks/tail.py
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/fuzz.py
	PYTHONPATH=$(VENV)/torchao $(BIN)/python benchmarks/quantise.py
	$(BIN)/python benchmarks/graphs.py
	$(BIN)/python benchmarks/speedup.py
	$(BIN)/python benchmarks/certificate.py
	$(BIN)/python benchmarks/compressing.py
	$(BIN)/python benchmarks/efficiency.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/tables.py

# Hours; a stopped run goes on where it was.
headline: $(VENV)/installed
	$(BIN)/python benchmarks/gates.py
	$(BIN)/python benchmarks/headline.py
	$(BIN)/python benchmarks/tables.py

# Hours; a stopped run goes on where it was.
arena: $(VENV)/installed
	$(BIN)/python benchmarks/arena.py
	$(BIN)/python benchmarks/tables.py

tables: $(VENV)/installed
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) $(OUTPUT)
