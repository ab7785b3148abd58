# make demo: the whole workflow on the sample data. make test: everything that CI checks.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DATA ?= ./data
VENV := .venv
BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# percent of the library's lines that the tests must run
FLOOR := 95
# which tests: all, or `make test PART="not apart"` and `make test PART=apart` (guides, notebook, Ray, processes, kills)
PART ?=
# test processes, of one thread each: with more, they wait for each other
JOBS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# from Python 3.12 on, coverage costs little with sys.monitoring
CORE = $(shell $(BIN)/python -c "import sys; print('sysmon' if sys.version_info >= (3, 12) else 'ctrace')")

# training, and the choice of the best step, see the click log alone; the evaluation asks judged queries that are in no log
DEMO := RUN_PAIRS=true RUN_EVALUATION=true RUN_INDEX=true FINETUNE_CONFIG.data_path=./click_pairs/pairs.jsonl \
	FINETUNE_CONFIG.eval_data_path=./click_pairs/heldout/pairs.jsonl FINETUNE_CONFIG.num_epochs=2 \
	EVAL_CONFIG.data_path=./train_text/heldout/queries.jsonl EVAL_CONFIG.corpus_path=./faiss/embeds_2.txt \
	EVAL_CONFIG.corpus_column=description EVAL_CONFIG.train_data_path=./click_pairs/pairs.jsonl

define CHINESE_SHOP
RUN_PAIRS=true RUN_EVALUATION=true RUN_INDEX=true \
PAIRS_CONFIG.log_path=./train_text/zh/click_log/events.csv.gz PAIRS_CONFIG.catalogue_path=./train_text/zh/catalogue \
PAIRS_CONFIG.time_zone=Asia/Shanghai PAIRS_CONFIG.output_dir=./demo/zh/click_pairs \
FINETUNE_CONFIG.model_name=multilingual-e5-small FINETUNE_CONFIG.data_path=./demo/zh/click_pairs/pairs.jsonl \
FINETUNE_CONFIG.eval_data_path=./train_text/zh/heldout \
FINETUNE_CONFIG.num_epochs=2 FINETUNE_CONFIG.output_dir=./demo/zh/saved_model \
INFERENCE_CONFIG.model_name=./demo/zh/saved_model/multilingual-e5-small-peft-lora \
INFERENCE_CONFIG.data_path=./train_text/zh/catalogue INFERENCE_CONFIG.output_path=./demo/zh/embeds_2.txt \
BASE_CONFIG.model_name=multilingual-e5-small BASE_CONFIG.output_path=./demo/zh/embeds_base.txt \
VIS_CONFIG.embedding_path=./demo/zh/embeds_2.txt VIS_CONFIG.compare_path=./demo/zh/embeds_base.txt \
VIS_CONFIG.output_path=./demo/zh/embedding_scatter.png \
'EVAL_CONFIG.models=[multilingual-e5-small,./demo/zh/saved_model/multilingual-e5-small-peft-lora]' \
EVAL_CONFIG.data_path=./demo/zh/saved_model/multilingual-e5-small-peft-lora \
EVAL_CONFIG.output_dir=./demo/zh/evaluation \
INDEX_CONFIG.embedding_path=./demo/zh/embeds_2.txt INDEX_CONFIG.output_dir=./demo/zh/index \
INDEX_CONFIG.queries_path=./train_text/zh/heldout/queries.jsonl \
BASE_INDEX_CONFIG.embedding_path=./demo/zh/embeds_base.txt BASE_INDEX_CONFIG.output_dir=./demo/zh/index_base \
'SEARCH_QUERIES=[扫地机能扫狗毛吗, 送妈妈的生日礼物, shuimian yanzhao, 宿舍用小功率电饭锅]'
endef

.PHONY: demo demo-zh test lint audit bench mutate docs clean help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# the stamps are newer than the requirements exactly when the installation is up to date
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed $(wildcard requirements-*.txt)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed ## from the sample click log to an index: the executed notebook and its files
	$(OFFLINE) $(BIN)/python -m ebr_lib notebook --set $(DEMO)

$(VENV)/installed-zh: $(VENV)/installed requirements-zh.txt
	$(BIN)/pip install --quiet -r requirements-zh.txt
	touch $@

demo-zh: $(VENV)/installed-zh ## the same on the Chinese sample data with multilingual-e5-small, in demo/zh/
	$(OFFLINE) $(BIN)/python -m ebr_lib notebook --output demo/zh/EBR_workflow.executed.ipynb --set $(CHINESE_SHOP)

test: lint ## lint, types and all tests; fails when the tests run less of the library than the floor
	$(ONE_THREAD) $(OFFLINE) COVERAGE_CORE=$(CORE) $(BIN)/python -m pytest -m "$(PART)" -n $(JOBS) --max-worker-restart 0 \
		--no-loadscope-reorder --cov=ebr_lib --cov-report=term-missing:skip-covered --cov-fail-under=$(FLOOR)

lint: $(VENV)/installed-dev ## formatting, lint, types, plain words
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/plain_words.py

bench: $(VENV)/installed ## benchmarks/RESULTS.md: about 20 minutes; DATA=folder of the data sets, ARGS=--quick to try
	$(OFFLINE) $(BIN)/python benchmarks/run.py --data $(DATA) $(ARGS)

audit: $(VENV)/installed-dev ## known weaknesses of the pinned requirements; asks PyPI, and says what it could not look up
	$(BIN)/python .ci/audit.py

mutate: $(VENV)/installed-dev ## changed lines that no test notices; hours, or ARGS="ebr_lib.data.pairs*" for one file
	$(ONE_THREAD) $(OFFLINE) $(BIN)/mutmut run --max-children 1 $(ARGS)
	$(BIN)/mutmut results | sed '/not checked/d'

docs: $(VENV)/installed ## write the generated tables into docs/
	$(BIN)/python -m ebr_lib knobs --write docs/en/knobs.md docs/zh/knobs.md

clean: ## remove the environment and what the stages wrote
	rm -rf $(VENV) mutants dist saved_model faiss evaluation click_pairs demo embedding_scatter.* \
		EBR_workflow.executed.ipynb
