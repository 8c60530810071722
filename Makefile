# make demo, make test, make help. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test slow wheel doors breadth zoo check lint format docs clean .venv

help:  ## show this list
	@grep -hE '^[a-z.]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z.]+):.*## (.*)/\1	\2/' | expand -t 10

demo: $(STAMP)  ## quantize the model that comes with fewbit, run it, write run/report.html
	$(BIN)/fewbit quantize demo --out run --force
	@echo "The report: run/report.html"

test: lint  ## lint, then the fast tests, a process for each core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/pytest -m slow

wheel: $(STAMP)  ## the wheel in a virtual environment of its own, in an empty folder, and the tutorial with it
	$(BIN)/pytest -m slow tests/test_wheel.py

doors: $(STAMP)  ## bad inputs of every kind, killed runs and mutated files: a line for each that is answered wrong
	PYTHONPATH=src:tests $(BIN)/python -m doors --log build/doors.jsonl

breadth: $(STAMP)  ## families of models, each quantized and verified on both x86 targets: the table of docs/breadth.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=src $(BIN)/python bench/breadth.py --out build/breadth

zoo: $(STAMP)  ## real ONNX files out of packages of PyPI and npm on both x86 targets: the tables of docs/zoo.md
	OMP_NUM_THREADS=1 PYTHONPATH=src $(BIN)/python bench/zoo.py --out build/zoo

check: lint  ## lint, then who imports whom
	$(BIN)/pytest tests/test_imports.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the source in its format, fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs  ## the pages of docs/ and the Python reference as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The pages: site/index.html"

.venv/.docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@touch $@

.venv: $(STAMP)  ## create the environment with the versions in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fewbit needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 .venv")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check torch torchvision -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

clean:  ## remove caches and builds; .venv and run/ stay
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
