# make demo     the whole pipeline on the embedded model and text, on a CPU, in a quarter of an hour:
#               demo-full, or demo-small where the model is too slow for that (it is timed first)
# make studies  on the demo's activations, what else the README shows: all studies over three sizes
#               of dictionary, attribution over 50 prompts, evidence of steering; about half an hour
# make test     the tests
# make lint     ruff
# make bench    the benchmarks: extraction, and training beside other libraries (hours)

PYTHON ?= python3
BIN := .venv/bin
DEMO := data/demo
STUDIES := data/studies
SIZES := 1024 16384
# How all sizes are trained, and where the demo's features are.
TRAINING = --kind topk --k 32 --n-passes $(N_PASSES) --batch-size 2048 --dead-after 500000 \
    --log-every 50 --backup-every 2 --activations-dir $(DEMO)/activations
FEATURES = --autoencoder-dir $(DEMO)/autoencoder --analysis-dir $(DEMO)/analysis

.PHONY: demo demo-full demo-small studies test lint bench clean
.DELETE_ON_ERROR:

demo: data/preset
	@$(MAKE) --no-print-directory demo-$$(cat $<)

# Kept, so that a demo that was stopped goes on with the same preset.
data/preset: .venv/installed
	$(BIN)/python -m utils.activations.preset > $@

N_PASSES := 2
demo-full: N_TOKENS := 600000
demo-full: N_LATENTS := 4608
demo-full: STUDYING := --n-loss-tokens 8192
demo-small: DEMO := data/demo-small
demo-small: N_TOKENS := 120000
demo-small: N_LATENTS := 2304
demo-small: N_PASSES := 5
demo-small: STUDYING := --n-loss-tokens 2048 --n-neuron-tokens 8192 --n-explained 60

# The embedded settings: a small LLaMA and a small Pile from the package index, no token, no GPU.
demo-full demo-small: .venv/installed
	$(BIN)/python save_activations.py --model-name embedded --dataset embedded --layer 15 \
	    --n-tokens $(N_TOKENS) --context-length 128 --activations-dir $(DEMO)/activations
	$(BIN)/python train_autoencoder.py $(TRAINING) --n-latents $(N_LATENTS) \
	    --autoencoder-dir $(DEMO)/autoencoder
	$(BIN)/python analyze_features.py $(FEATURES) --activations-dir $(DEMO)/activations \
	    $(STUDYING) --studies specificity completeness neurons explanations outputs
	$(BIN)/python influence_llm.py $(FEATURES) --influence-dir $(DEMO)/influence \
	    --study attribute --prompt "The capital of France is the city of"
	$(BIN)/python influence_llm.py $(FEATURES) --influence-dir $(DEMO)/influence \
	    --prompt "My favourite food is" --feature December --strength 0.75 1
	@printf "\n%s\n" "Look at the features in $(DEMO)/analysis/browser/index.html, then steer with one of your own:"
	@echo "  $(BIN)/python influence_llm.py $(FEATURES)" \
	    "--prompt 'Once upon a time' --feature eat --strength 1.5"

studies: demo-full
	for n in $(SIZES); do $(BIN)/python train_autoencoder.py $(TRAINING) --n-latents $$n \
	    --autoencoder-dir $(STUDIES)/autoencoder-$$n || exit; done
	$(BIN)/python analyze_features.py --activations-dir $(DEMO)/activations --n-loss-tokens 8192 \
	    --autoencoder-dir $(DEMO)/autoencoder \
	    --other-autoencoders $(SIZES:%=$(STUDIES)/autoencoder-%) --analysis-dir $(STUDIES)/analysis
	$(BIN)/python influence_llm.py $(FEATURES) --influence-dir $(STUDIES)/influence \
	    --study attribute --prompt "The capital of France is the city of" --n-prompts 50 \
	    --activations-dir $(DEMO)/activations
	$(BIN)/python influence_llm.py $(FEATURES) --influence-dir $(STUDIES)/influence --study evidence

# On as many cores as there are, up to four: each worker needs a gigabyte.
test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed .venv-peers/installed
	$(BIN)/python -m tests.benchmarks.extraction
	$(BIN)/python -m tests.benchmarks.training speed
	$(BIN)/python -m tests.benchmarks.training quality
	$(BIN)/python -m tests.benchmarks.planted

# The other libraries, in an environment of their own. sae-lens and its like bring a torchvision
# that breaks transformers on a CPU.
.venv-peers/installed: tests/benchmarks/peers-requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement $<
	.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

.venv/installed: requirements.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or later is needed'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-%: .venv/installed pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache
