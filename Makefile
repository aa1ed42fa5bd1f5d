# make train [DATA=file-or-folder]   train a GPT over two ranks (a rank a GPU where there are several)
# make test-gpu, bench-gpu           what needs a CUDA device: tests, benchmarks/transport_gpu.py, step_gpu.py, transport_gpus.py
# make test                          everything that must pass, in minutes;  make test-all: the whole grids as well
#
# Both make .venv, install pinned dependencies, build and install pipekern. Needs python3 >= 3.10 with pip and venv, gcc, g++.

PYTHON ?= python3
DATA ?=
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
CHECKED := pipekern examples benchmarks tests

export OMP_NUM_THREADS := 1
export CMAKE_BUILD_PARALLEL_LEVEL := 2

.PHONY: train test test-all test-gpu bench-gpu install lint types python-tests csrc-tests format clean

train: $(VENV)/built
	ranks=$$($(RUN) -c "import torch; n = torch.cuda.device_count(); print(n if n > 1 else 2)") && \
	$(VENV)/bin/torchrun --standalone --nproc-per-node=$$ranks -m examples.gpt.train --data "$(DATA)" $(ARGS)

test: lint types python-tests csrc-tests

test-all: lint types csrc-tests $(VENV)/proved
	$(RUN) -m pytest -q -m "full or not full" $(ARGS)

# With the Python that has torch for CUDA and pipekern installed (PYTHON=...); neither makes a .venv.
test-gpu:
	$(PYTHON) -c 'import torch; torch.cuda.is_available() or print("torch sees no CUDA device: every test is skipped")'
	$(PYTHON) -m pytest -q -m gpu $(ARGS)

bench-gpu:
	$(PYTHON) -m benchmarks.transport_gpu --out benchmarks/results/transport_gpu.csv $(ARGS)
	$(PYTHON) -m benchmarks.step_gpu --out benchmarks/results/step_gpu.csv $(ARGS)
	if $(PYTHON) -c 'import torch, sys; sys.exit(torch.cuda.device_count() < 2)'; \
	then $(PYTHON) -m benchmarks.transport_gpus --out benchmarks/results/transport_gpus.csv; \
	else echo "one GPU: links between several are not measured"; fi

install: $(VENV)/built

lint: $(VENV)/tested
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests/csrc -name "*.h" -o -name "*.cpp" | xargs --no-run-if-empty $(VENV)/bin/clang-format --dry-run -Werror

types: $(VENV)/built $(VENV)/tested
	$(VENV)/bin/mypy $(CHECKED)
	$(VENV)/bin/mypy kernels

python-tests: $(VENV)/built $(VENV)/tested
	$(RUN) -m pytest -q $(ARGS)

csrc-tests: build/address build/thread

# C++ tests under sanitizers. The thread sanitizer needs a memory layout without much randomness.
.PHONY: build/address build/thread
build/address: SANITIZE := address,undefined
build/thread: SANITIZE := thread
build/address build/thread: $(VENV)/tested
	$(VENV)/bin/cmake -S . -B $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DPIPEKERN_PYTHON=OFF -DPIPEKERN_TESTS=ON -DPIPEKERN_SANITIZE=$(SANITIZE)
	$(VENV)/bin/cmake --build $@
	$$(setarch -R true 2>/dev/null && echo setarch -R) $(VENV)/bin/ctest --test-dir $@ --output-on-failure --no-tests=error

format: $(VENV)/tested
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc tests/csrc -name "*.h" -o -name "*.cpp" | xargs --no-run-if-empty $(VENV)/bin/clang-format -i

clean:
	rm -rf $(VENV) build dist *.egg-info pipekern/_C*.so pipekern/_build.json

# The set-up: a file a step, made again only when what it depends on has changed.
$(VENV)/made:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("pipekern needs Python 3.10 or later; make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: requirements/train.txt $(VENV)/made
	$(PIP) --quiet -r $<
	touch $@

$(VENV)/tested: requirements/test.txt requirements/train.txt $(VENV)/installed
	$(PIP) --quiet -r $<
	touch $@

$(VENV)/proved: requirements/prove.txt $(VENV)/tested
	$(PIP) --quiet -r $<
	touch $@

$(VENV)/built: $(NATIVE) $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) --quiet --no-build-isolation --no-deps --editable .
	touch $@
