# Everything runs in $(VENV), made by $(PYTHON); change either on the command line:
# PYTHON=python3.12 make test
PYTHON ?= python3
VENV ?= .venv
NUMPY ?= numpy

# Chainer's build needs an older setuptools: older pips read the first of these
# variables for that, pip 26.2 and newer the second, those between both.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The environment is made anew when the interpreter or NumPy is another one.
STAMP := $(VENV)/installed-$(firstword $(shell echo '$(PYTHON) $(NUMPY)' | cksum))
PYTHON_STAMP := installed-$(firstword $(shell echo '$(PYTHON)' | cksum))
DEMO := $(VENV)/demo

.PHONY: help demo bench docs test test-numpy test-mpi test-peers test-cuda-compile \
	test-gpu gpu-report sanitize lint format dist clean

help:
	@echo 'make demo    set up $(DEMO), train a plain and a deformable model, draw its points'
	@echo 'make test    set up $(VENV), run the tests'
	@echo 'make docs    also install Sphinx, build docs/_build/html'
	@echo 'make bench   also install the peers, time them on the CPU; takes some minutes'
	@echo 'make test-numpy    run every function of Chainer on NumPy 1.26 and on the newest'
	@echo 'make test-mpi    also install an MPI, train with two processes'
	@echo 'make test-peers    also install the peers, compare results with OpenVINO'
	@echo 'make test-cuda-compile    also install NVRTC, compile every GPU kernel; no GPU needed'
	@echo 'make test-gpu    run the tests that need a GPU, with $(PYTHON) as it is'
	@echo 'make gpu-report    tests, times against torchvision, counters; ten minutes on a GPU'
	@echo 'make sanitize    a short run of them under compute-sanitizer'
	@echo 'make lint    check style, formatting and types'
	@echo 'make format  put the formatting right'
	@echo 'make dist    build source package and wheel, install the wheel elsewhere, try it'
	@echo 'make clean   remove $(VENV) and what the other targets made'
	@echo
	@echo 'PYTHON=python3.12 make test    another interpreter'
	@echo "NUMPY='numpy==1.26.*' make test    another NumPy"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[test,lint]' '$(NUMPY)'
	@touch $@

$(DEMO)/$(PYTHON_STAMP): pyproject.toml constraints.txt
	@echo 'Once: installing what the demo needs into $(DEMO), some 500 MB:'
	@echo 'Chainer, NumPy, SciPy, Numba, Matplotlib and scikit-learn.'
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --no-compile -e '.[demo]'
	@touch $@

demo: $(DEMO)/$(PYTHON_STAMP)
	$(DEMO)/bin/python examples/digits/train.py --model plain deformable

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2

# NumPy 1.26 needs a Python up to 3.12. The results are compared by the newer NumPy.
NUMPY1 := $(VENV)/numpy1
NUMPY2 := $(VENV)/numpy2

$(NUMPY1)/$(PYTHON_STAMP) $(NUMPY2)/$(PYTHON_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet -e . $(if $(filter $(NUMPY1)/%,$@),'numpy==1.26.*')
	@touch $@

test-numpy: $(NUMPY1)/$(PYTHON_STAMP) $(NUMPY2)/$(PYTHON_STAMP)
	results=$$(mktemp -d) && trap 'rm -rf "$$results"' EXIT && \
	{ $(NUMPY1)/bin/python -m tests.battery.run "$$results/old" & } && \
	$(NUMPY2)/bin/python -m tests.battery.run "$$results/new" && wait $$! && \
	$(NUMPY2)/bin/python -m tests.battery.compare "$$results/old" "$$results/new"

$(STAMP)-bench: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -e '.[bench]'
	@touch $@

# torchvision takes part where $$TORCHVISION_PYTHON, or /usr/bin/python3, has it.
bench: $(STAMP)-bench
	$(VENV)/bin/python benchmarks/run.py --device cpu
	$(VENV)/bin/python benchmarks/run.py --growth

# OpenVINO is too large to be installed for all tests.
test-peers: $(STAMP)-bench
	$(VENV)/bin/python -m pytest tests/functions -k openvino

$(STAMP)-docs: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -e '.[docs]'
	@touch $@

docs: $(STAMP)-docs
	rm -rf docs/api
	for f in README.rst examples/*/README.rst; do \
		$(VENV)/bin/python -m docutils --halt=warning $$f > /dev/null || exit 1; done
	$(VENV)/bin/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo 'See docs/_build/html/index.html.'

$(STAMP)-mpi: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -e '.[mpi]' mpich
	@touch $@

test-mpi: $(STAMP)-mpi
	$(VENV)/bin/mpiexec -n 2 $(VENV)/bin/python -c 'import mpi4py.MPI'
	$(VENV)/bin/python -m pytest tests/mpi
	$(VENV)/bin/python -m pytest tests/test_docs.py -k train_mn

$(STAMP)-cuda: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -e '.[cuda-compile]'
	@touch $@

test-cuda-compile: $(STAMP)-cuda
	$(VENV)/bin/python -m pytest -n 2 tests/cuda_compile

# Where there is a GPU, CuPy is already there, fit for its driver.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

# Chainer's wheel, for a machine with a GPU and without a network.
.whl: $(STAMP)
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $@ chainer==7.8.1

gpu-report:
	$(PYTHON) benchmarks/gpu_report.py $(if $(OUT),--out '$(OUT)')

sanitize:
	@command -v compute-sanitizer > /dev/null || \
		{ echo 'compute-sanitizer is not installed; it is part of the CUDA toolkit'; exit 1; }
	for tool in memcheck initcheck synccheck; do \
		compute-sanitizer --tool $$tool --kernel-name kns=chainer_deform --error-exitcode 1 \
			$(PYTHON) -m pytest -m gpu tests/gpu -k short_run || exit 1; done

lint: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/python -m mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# What people get who install the wheel by the lines of docs/install.rst. Of the
# variables above they know nothing.
dist:
	$(PYTHON) -m venv --clear $(VENV)/dist
	$(VENV)/dist/bin/python -m pip install --quiet build twine
	rm -rf dist *.egg-info
	unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT && $(VENV)/dist/bin/python -m build
	$(VENV)/dist/bin/python -m twine check --strict dist/*
	unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT && \
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(PYTHON) -m venv "$$folder/env" && PATH="$$folder/env/bin:$$PATH" && \
	cp dist/*.whl tests/installed.py "$$folder" && cd "$$folder" && \
	pip install --quiet 'setuptools>=77,<81' && \
	pip install --quiet --no-build-isolation *.whl && \
	python -W error installed.py

clean:
	rm -rf $(VENV) result docs/_build docs/api .whl build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
