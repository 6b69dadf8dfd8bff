# make demo   the whole pipeline on the embedded sample, from web pages to a model that writes
# make test   the tests
# make lint   ruff
# make bench  measures what the README says: benchmarks/results/*.json and pictures/readme_*.png
# make notebook  builds and executes notebooks/luojiu.ipynb, after a change of a script
# make clean  removes what the demo (or any run with default paths) has written

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv

.PHONY: install demo test lint bench notebook clean
.DEFAULT_GOAL := demo

install: $(VENV)/installed

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11, 3.12 or 3.13 is needed; name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

# The commands are printed as you would type them inside the environment.
demo test lint notebook bench_%: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

demo: $(VENV)/installed
	python filter_cc.py
	python extend_vocab.py --base_model data/sample/tiny-llama --corpus data/cc_filtered --vocab_size 8000
	python train_pt.py --block_size 256 --gradient_accumulation_steps 1 --learning_rate 3e-3 --warmup_steps 20 --num_train_epochs 15
	python merge_lora.py
	python -c "from transformers import pipeline; print(pipeline('text-generation', 'outputs/merged')('春天的', max_new_tokens=60)[0]['generated_text'])"

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # a worker a core, a thread a worker

lint: $(VENV)/installed-dev
	ruff check .

# What the machine lacks is left out with a line that says so, and a failure does not stop the
# others. 70 minutes on two cores; 45 GB of disk, with less some tables are left out.
MATERIAL := $(wildcard ../shared/data)
GPU := $(shell command -v nvidia-smi)
BENCHES := bench_plan bench_train bench_merge $(if $(MATERIAL),bench_filter bench_vocab) $(if $(GPU),bench_gpu)

bench:
	@test -n "$(MATERIAL)" || echo "skipped: bench_filter.py and bench_vocab.py; ../shared/data is missing"
	@test -n "$(GPU)" || echo "skipped: bench_gpu.py; there is no GPU"
	@$(MAKE) --no-print-directory --keep-going --jobs=1 $(BENCHES)

bench_%: $(VENV)/installed-dev
	python benchmarks/$@.py

notebook: $(VENV)/installed-dev
	python notebooks/make_notebook.py

clean:
	rm -rf outputs data/cc_filtered
