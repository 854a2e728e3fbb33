# Everything runs in a virtual environment that these targets make. `make PYTHON=python3.12 test`
# picks another interpreter, and FLAGS are added to the training of demo and finetune.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Python compiles what it imports when it imports it; compiling all of JAX takes 12 seconds more.
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
AS_USED = JAX_DISABLE_MOST_OPTIMIZATIONS=0
CODE = llama_jax configs tests benchmarks docs $(wildcard *.py)
PYTEST = $(RUN) -m pytest -n 2 --dist loadfile
# Test files with a mark; those of other targets are not even imported, which takes a minute.
marked = $(shell grep -rlE --include="test_*.py" "mark\.$(1)\b|from cases import .*$(1)" tests)
unexport PYTHONDONTWRITEBYTECODE  # what pytest makes of the tests is kept for the next process

.PHONY: help demo chat finetune serve test unit test-slow test-parity test-faults test-serve test-page test-readme test-package test-tpu docs lint types clean

help:
	@echo "make demo         train a small model on stories and let it write (5 minutes)"
	@echo "make chat         talk to SmolLM2, a small model of the package index (2 minutes)"
	@echo "make finetune     teach SmolLM2 twenty facts about a shop, by LoRA (5 minutes)"
	@echo "make serve        serve SmolLM2 with a chat page at http://127.0.0.1:8000"
	@echo "make test         lint, types and tests, as CI runs them"
	@echo "make test-slow    what takes longer, and the laws compiled as users do; SLOW=long has more"
	@echo "make test-parity  comparisons with PyTorch, transformers and lm-evaluation-harness"
	@echo "make test-faults  kills, full disks, damaged files; FAULTS=12 takes hours (3 minutes)"
	@echo "make test-serve   servers, spoken to with the openai client and LangChain"
	@echo "make test-page    the chat page in a browser (needs Debian's chromium)"
	@echo "make test-readme  the README's blocks, copied and run (10 minutes)"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make test-package wheel and sdist, installed and run on each Python (10 minutes)"
	@echo "make test-tpu     what the TPU compiler makes of our programs; no TPU needed"
	@echo "make clean        remove the virtual environment"

$(RUN):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(RUN) pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(RUN) pyproject.toml
	$(PIP) -e ".[test]"
	@touch $(VENV)/.installed $@

$(VENV)/.installed-slow: $(VENV)/.installed-test
	$(PIP) -e ".[notebooks]"
	@touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-test
	$(PIP) -e ".[parity,eval]"
	@touch $@

$(VENV)/.installed-serve: $(RUN) pyproject.toml
	$(PIP) -e ".[serve]"
	@touch $(VENV)/.installed $@

$(VENV)/.installed-test-serve: $(VENV)/.installed-test
	$(PIP) -e ".[test-serve,test-page]"
	@touch $(VENV)/.installed-serve $@

$(VENV)/.installed-docs: $(RUN) pyproject.toml
	$(PIP) -e ".[docs]"
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	$(RUN) train.py --config configs/demo.py $(FLAGS)
	@echo; echo "The loss curve is in ckpt/loss.png. Three stories:"; echo
	@$(RUN) sample.py --ckpt ckpt --prompt "Once upon a time" --num_samples 3 --temperature 0.7

chat: $(VENV)/.installed
	@$(RUN) sample.py --ckpt smollm2 --chat

serve: $(VENV)/.installed-serve
	@$(RUN) serve.py --model smollm2

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check $(CODE)
	$(RUN) -m ruff format --check --quiet $(CODE)

types: $(VENV)/.installed-test
	$(RUN) -m mypy

finetune: $(VENV)/.installed
	@test -d data/lantern_shop || $(RUN) prepare.py examples/lantern_shop.jsonl --chat chatml \
		--tokenizer smollm2 --validation 0.1 --output data/lantern_shop
	$(RUN) train.py --config configs/sft_demo.py $(FLAGS)

# Types are checked beside the tests: each leaves a core idle at times.
test: lint
	@$(MAKE) --no-print-directory -j 2 types unit

unit: $(VENV)/.installed-test
	$(PYTEST) -m "not parity and not slow and not faults and not serve and not page and not readme and not tpu" \
		--ignore=tests/parity --ignore=tests/faults

test-slow: $(VENV)/.installed-slow
	$(PYTEST) -m "slow and not as_used $(if $(filter long,$(SLOW)),,and not long)" $(call marked,slow)
	$(AS_USED) $(PYTEST) -m "as_used $(if $(filter long,$(SLOW)),,and not long)" $(call marked,as_used)

test-parity: $(VENV)/.installed-parity
	$(PYTEST) -m parity $(call marked,parity)

test-faults: $(VENV)/.installed-test
	$(PYTEST) -m faults $(call marked,faults)

test-serve: $(VENV)/.installed-test-serve
	$(PYTEST) -m serve $(call marked,serve)

test-page: $(VENV)/.installed-test-serve
	$(PYTEST) -m page $(call marked,page)

test-readme: $(VENV)/.installed-test-serve
	$(RUN) -m pytest -m readme tests/test_readme_blocks.py

docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

test-package:
	$(PYTHON) tests/packaging/try_package.py

test-tpu: $(VENV)/.installed-test
	-$(PIP) -e ".[plan]"  # where there is no libtpu, the tests are skipped
	$(AS_USED) $(RUN) -m pytest -m tpu tests/tpu

clean:
	rm -rf $(VENV)
