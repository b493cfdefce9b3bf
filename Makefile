# Everything happens inside .venv, which `make setup` makes from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test verl-test check format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "entropy-polarity needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt -e '.[trl]'
	touch $@

demo: setup
	$(BIN)/papo train --output $(RUN)

test: setup
	OMP_NUM_THREADS=1 PYTHONWARNDEFAULTENCODING=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# verl needs an older transformers: it has an environment of its own. Its Megatron engine imports without a GPU.
$(VENV)-verl/.installed: pyproject.toml constraints-verl.txt requirements-verl.txt
	$(PYTHON) -m venv $(VENV)-verl
	$(VENV)-verl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt \
		-r requirements-verl.txt -e '.[verl]'
	$(VENV)-verl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints-verl.txt \
		megatron-core mbridge
	touch $@

verl-test: $(VENV)-verl/.installed
	OMP_NUM_THREADS=1 $(VENV)-verl/bin/python -m pytest tests/on_verl $(ARGS)

check: setup
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	@$(BIN)/basedpyright --level error --pythonpath $(BIN)/python > $(VENV)/types.log || (cat $(VENV)/types.log; exit 1)

format: setup
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) $(VENV)-verl .ruff_cache .pytest_cache dist
