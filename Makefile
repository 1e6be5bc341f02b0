# Three commands matter: `make lessons`, `make demo` and `make test`. They make .venv by themselves, from Python and the package index alone.
VENV := .venv
BIN := $(VENV)/bin
META := settings.ini setup.py pyproject.toml
DOCS := $(shell sed -n 's/^docs_requirements = //p' settings.ini)
.DELETE_ON_ERROR:
.PHONY: demo lessons test test-long test-browser readme docs wheel wheel-check colab-check clean

help:
	@echo "make demo         train, sample and evaluate on the embedded data set; writes runs/demo/report.html"
	@echo "make lessons      JupyterLab with the lessons, in copies of your own"
	@echo "make test         every notebook at the tiny preset, and the other tests"
	@echo "make test-long    the same for hours: more kills, more bad input, no lesson finds another's work; then with the oldest and newest versions"
	@echo "make test-browser a lesson in JupyterLab and pages of the site, in a headless Chromium"
	@echo "make readme       README.md from nbs/index.ipynb"
	@echo "make docs         the site in _docs: the lessons as web pages, and the library"
	@echo "make wheel-check  the wheel, installed and used in an empty environment"
	@echo "make colab-check  would an install move the torch of a Colab-like machine?"

demo: $(BIN)/.demo
	$(BIN)/latentdiff-run --data rooms --preset cpu --out runs/demo

# Copies: what you run and change stays yours, and git sees nothing of it. They are not renewed: after an update move lessons/ away.
lessons: $(BIN)/.dev
	mkdir -p lessons && (cp -Rn nbs/. lessons/ || test -f lessons/00_data.ipynb)
	$(BIN)/jupyter lab lessons/00_data.ipynb

# One thread a worker: two workers with two threads each are slower than two with one.
test: $(BIN)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Hours, and 16 GB in .versions for two more environments.
test-long: $(BIN)/.dev
	OMP_NUM_THREADS=1 LATENTDIFF_LONG=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal; long=$$?; \
	$(BIN)/python scripts/versions.py oldest newest && exit $$long

# Needs the extra `browser` and a Chromium, and says so where they are missing.
test-browser: $(BIN)/.dev
	$(BIN)/python scripts/browser.py

$(BIN)/.demo: $(BIN)/python $(META)
	@echo "Installing latentdiff and what it needs: one to five minutes, several GB (torch brings its CUDA libraries along)."
	$(BIN)/pip install -q -e '.[eval]'
	@touch $@

$(BIN)/.dev: $(BIN)/python $(META)
	@echo "Installing latentdiff, what it needs and the test tools: one to five minutes, several GB."
	$(BIN)/pip install -q -e '.[eval,dev]'
	@touch $@ $(BIN)/.demo

# The site is made from text alone, so it needs no torch.
$(BIN)/.docs: $(BIN)/python $(META)
	$(BIN)/pip install -q $(DOCS:%='%')
	@touch $@

$(BIN)/python:
	@python=$$(sh scripts/find-python) && echo "Creating $(VENV) with $$python" && $$python -m venv $(VENV)

readme: $(BIN)/.dev
	$(BIN)/python scripts/readme.py

docs: $(BIN)/.docs
	$(BIN)/python scripts/docs.py _docs

wheel: $(BIN)/.dev
	rm -rf dist
	$(BIN)/python -m build

wheel-check: wheel
	sh scripts/check-wheel $(BIN)/python dist/*.whl

colab-check: $(BIN)/.dev
	$(BIN)/python scripts/colab_check.py

clean:
	rm -rf build dist _docs .versions *.egg-info
