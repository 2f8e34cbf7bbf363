# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN ?= demo
BIN := .venv/bin
export KTO_RAY_ENVS ?= $(CURDIR)/.envs

.PHONY: demo demo-offline test unit lint types docs bench bake-off release clean system

demo: .venv/installed
	$(BIN)/python jobs/online_kto.py --recipe shapes_demo run=$(RUN)

demo-offline: .venv/installed
	$(BIN)/python jobs/label_shapes.py runs/_shapes_labelled
	$(BIN)/python jobs/offline_kto.py --recipe shapes_offline run=$(RUN)-offline

test: .venv/installed-dev system
	$(BIN)/kto-ray env build --all
	$(BIN)/pytest --numprocesses 2 tests/unit
	$(BIN)/pytest --numprocesses 2 --dist loadfile tests/integration tests/end_to_end

unit: .venv/installed-dev
	$(BIN)/pytest --numprocesses 2 tests/unit

system:
	tests/system_packages.sh

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/python -m kto_ray.config.reference > docs/configuration.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo build/site/index.html

bench: .venv/installed-dev system
	$(BIN)/kto-ray env build --all
	$(BIN)/python benchmarks/run.py

bake-off: .venv/installed
	$(BIN)/python jobs/bake_off.py

release: .venv/installed-dev
	$(BIN)/python .ci/release.py $(VERSION)

clean:
	rm -rf .venv runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
