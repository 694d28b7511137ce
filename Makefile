# The book, in one command each. Every target sets up .venv by itself; a second run reuses it.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
READY := .venv/.ready
SYSTEM := $(shell uname -s)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_CPU := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help weights book serve lab test refresh processors reproduce bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "With MODEL=... make book shows all chapters on that model, and make refresh stores them."

# Torch for Linux comes with about 3.7 GB of GPU libraries: without a GPU, its CPU build is tried first.
$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "The book needs Python 3.11, 3.12 or 3.13. Name one: make book PYTHON=python3.12"; exit 1; }
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@if [ "$(SYSTEM)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidia0 ]; then \
	  echo "Installing the CPU build of PyTorch, since there is no GPU here ..."; \
	  $(INSTALL) --no-deps --index-url $(TORCH_CPU) --retries 0 --timeout 5 \
	    "$$(grep '^torch==' constraints.txt)" 2>/dev/null || \
	  echo "It cannot be had: the ordinary build comes with its GPU libraries, about 3.7 GB more."; \
	fi
	@echo "Installing the book into .venv ..."
	$(INSTALL) -r requirements.txt -e '.[book,test]'
	@touch $@

# Without them the chapters that open on SmolLM2 cannot run; all else can.
weights: $(READY)
	-@$(BIN)/sparse-signals fetch smollm2-135m

ifeq ($(MODEL),smollm2-135m)
book: weights
endif
book: $(READY) ## build the site into _build/html
	@$(BIN)/python scripts/vendor_assets.py
	@$(BIN)/python scripts/build_book.py

serve: ## show the built site at http://127.0.0.1:8000
	@test -f _build/html/index.html || { echo "There is no site yet: run make book first."; exit 1; }
	@echo "The book is at http://127.0.0.1:$(PORT) (stop with Ctrl-C)"
	@$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html >/dev/null

lab: weights ## open the chapters in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=book

test: export MODEL =
test: export OMP_NUM_THREADS = 1
test: weights ## style, unit tests, the built site in a browser, every notebook compared cell by cell
	@$(BIN)/python scripts/check.py

refresh: weights ## run again the chapters that are out of date, and store their outputs
	$(BIN)/python scripts/refresh.py

processors: export MODEL =
processors: weights ## run a chapter as on other processors, and compare what it prints
	$(BIN)/python scripts/processors.py $(NOTEBOOKS)

reproduce: $(READY) ## the published numbers of GPT-2 small, computed again (MODEL=gpt2-small)
	$(BIN)/sparse-signals reproduce --model "$(or $(MODEL),gpt2-small)"

bench: $(READY) ## measure the speed of the method
	$(BIN)/python benchmarks/bench.py

clean: ## remove the site and what was fetched for it
	rm -rf _build book/_static/vendor node_modules
