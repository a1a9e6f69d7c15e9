# `make demo` shows the embedded trained model at work, `make finetune` trains one. All targets create the environment in .venv.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
# what pip downloads and installs, a line each
STEPS = sed -un 's/^Collecting \([^ ]*\).*/  reading \1/p; s/^ *Downloading \([^ ]*\) *\(.*\)/  \1 \2/p; /^Installing collected/c\  unpacking all of them'
SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c

.PHONY: demo finetune web test test-slow gpu deepspeed conformance matrix base lint types clean

demo: $(VENV)/installed
	$(RUN) run_gres.py configs/demo.yaml

# Fine-tune the embedded base and evaluate it before and after. A stopped run continues.
finetune: $(VENV)/installed
	$(VENV)/bin/accelerate launch --config_file configs/accelerate/cpu.yaml run_gres.py configs/finetune_shapes.yaml

# Open the web demo of MODEL in a browser.
MODEL ?= assets/tiny_gsva_gres
web: $(VENV)/installed
	$(RUN) -m demo --model $(MODEL)

test: $(VENV)/installed
	$(RUN) -m pytest -n auto --dist loadscope -m "not slow and not deepspeed"

test-slow: $(VENV)/installed
	$(RUN) -m pytest

# Run the tests marked gpu and measure workload L on one CUDA card, without a network (python -m benchmarks gpu --help). It takes
# the environment of PYTHON, in which torch is, and installs nothing. make gpu --dry-run needs no card: it runs all of it on tiny
# shapes, which is why the line begins with + (make itself would only print it). GPU="--only loading" gives it arguments.
GPU ?=
gpu:
	+@$(PYTHON) -m benchmarks gpu $(if $(findstring n,$(firstword -$(MAKEFLAGS))),--dry_run) $(GPU)

# Train with the real DeepSpeed on two CPU processes. DeepSpeed compiles an operation once, into TORCH_EXTENSIONS_DIR.
deepspeed: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint configs/constraints.txt --editable '.[deepspeed]'
	export TORCH_EXTENSIONS_DIR=$${TORCH_EXTENSIONS_DIR:-$(abspath $(VENV))/torch_extensions} PATH="$(abspath $(VENV))/bin:$$PATH"; \
		$(RUN) -c "from deepspeed.ops.op_builder import ShareMemCommBuilder; ShareMemCommBuilder().load()" && \
		$(RUN) -m pytest -m "deepspeed and not slow" tests/trainers

# Run the common tests of the installed transformers, from its source distribution (tests/conformance/README.md).
conformance: $(VENV)/installed
	tests=$$($(RUN) tests/conformance/fetch.py $(VENV)/transformers_tests) && TRANSFORMERS_TESTS=$$tests HF_HUB_OFFLINE=1 \
		$(RUN) -m pytest tests/conformance -W ignore::pytest.PytestUnknownMarkWarning

# Run the fast tests with the oldest and the newest libraries that setup.cfg allows. For one of the two: make matrix ENDS=oldest.
ENDS ?= oldest,newest
matrix: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint configs/constraints.txt "tox>=4.32"
	$(RUN) -m tox run --recreate -e $(ENDS)

# Train assets/tiny_gsva again: at most an hour on two cores. A stopped run continues. make base ARCH=today trains
# assets/tiny_gsva_today, the base of today's parts, and make base ARCH=gres fine-tunes that one to assets/tiny_gsva_gres.
ARCH ?= llava_v1
base: $(VENV)/installed
ifeq ($(ARCH),gres)
	$(RUN) run_gres.py configs/tiny_gsva_gres.yaml
	$(RUN) assets/embed_run.py runs/tiny_gsva_gres assets/tiny_gsva_gres
else
	$(RUN) assets/make_tiny_gsva.py --arch $(ARCH)
endif

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/installed
	$(RUN) -m mypy

$(VENV)/installed: setup.cfg pyproject.toml configs/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (transformers 5.23 \
	requires it), but this is %s. Name another one: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@echo "Installing PyTorch and then some 120 packages into $(VENV). This takes one to four minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --constraint configs/constraints.txt torch | $(STEPS)
	@$(RUN) -m pip install --constraint configs/constraints.txt --editable '.[test]' | $(STEPS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
