# make demo: pretrain a tiny model on phantom images and score it, on a CPU, in minutes
# make test: the quick suite; make test_slow: demo, flag-less runs, kill series, README commands
PYTHON = .venv/bin/python

.PHONY: demo lint test test_slow
demo: .venv/installed
	mkdir -p demo
	$(PYTHON) pretrain.py --output_dir demo
	$(PYTHON) fewshot.py --ckpt demo/last.pt --shots 1 5 --img_size 64 --json demo/fewshot.json

lint: .venv/installed_test
	$(PYTHON) -m ruff check .

test: .venv/installed_test
	$(PYTHON) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test_slow: .venv/installed_test
	$(PYTHON) -m pytest tests --slow -m slow -n 2 --dist worksteal

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -q -r requirements.txt
	touch $@

.venv/installed_test: .venv/installed requirements-test.txt
	$(PYTHON) -m pip install -q -r requirements-test.txt
	touch $@
