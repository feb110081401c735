# Two commands do everything: `make demo` deblurs a photograph, `make test` runs the tests; each from nothing, in its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PHOTO = src/nonexpansive/photographs/astronaut.png
OUT = demo-output
DOCUMENTED = nonexpansive nonexpansive.checkpoint nonexpansive.math nonexpansive.nn nonexpansive.nn.models nonexpansive.nn.classifier \
	nonexpansive.restore nonexpansive.restore.physics nonexpansive.restore.operators nonexpansive.restore.likelihood nonexpansive.restore.adapters nonexpansive.restore.variational nonexpansive.robust.radius nonexpansive.robust.attacks nonexpansive.robust.curves \
	nonexpansive.robust.evaluate nonexpansive.train nonexpansive.train.images \
	nonexpansive.app.images

.PHONY: demo test check docs clean

demo: $(VENV)/.app
	mkdir -p $(OUT)
	$(BIN)/nonexpansive deblur $(PHOTO) --kernel shake:27,seed=3 --noise 1% --degrade \
		-o $(OUT)/restored.png --figure $(OUT)/figure.png --json $(OUT)/result.json

test: $(VENV)/.dev check docs
	$(BIN)/python -m pytest -q -n 2 --durations=10

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -W error::UserWarning -m pdoc -o docs/api $(DOCUMENTED)

$(VENV)/.app: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[app]'
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ $(VENV)/.app

clean:
	rm -rf $(VENV) $(OUT) docs/api
