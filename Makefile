# make demo    train a small GPT for three minutes, and show what it writes
# make tasks   fine-tune small GPTs on data in packages of PyPI, beside baselines
# make quick   a sample of the tests, between edits: does not rebuild the native modules
# make test    the whole test suite
# make check   style and types
# make bench   time everything against PyTorch, in about ten minutes; make bench-full for benchmarks/results, more rounds
# make fuzz    damaged and hostile files against every reader, for GPTCORE_FUZZ_SECONDS (60)
# make asan    the native tests under AddressSanitizer and UBSan
# make sweep   tests and benchmarks that need large packages (TensorFlow, llama.cpp); every mutant of the CUDA kernels
# Programs keep their compiled modules: the tests start many processes, and each would compile PyTorch's for seconds.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?= python3
BIN := .venv/bin
# More processes than cores: some tests wait for other processes, or for time to pass.
WORKERS = $(shell $(PYTHON) -c 'import os; print(3 * os.cpu_count() // 2)')
SOURCES := $(wildcard csrc/*.* csrc/*/*.* kernels/*.* kernels/*/*.*) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo tasks quick test check bench bench-full fuzz asan sweep clean
demo: .venv/installed
	$(BIN)/python examples/demo.py
tasks: .venv/installed
	$(BIN)/python examples/tasks.py
	$(BIN)/python examples/translation.py
quick:
	@test -x $(BIN)/pytest || $(MAKE) .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --quick
test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
bench: .venv/installed
	$(BIN)/python -m benchmarks
bench-full: .venv/installed
	$(BIN)/python -m benchmarks --full --output benchmarks/results
	$(BIN)/python -m benchmarks.report
fuzz: .venv/installed
	GPTCORE_FUZZ_SECONDS=$${GPTCORE_FUZZ_SECONDS:-60} $(BIN)/python -m pytest -n auto tests/test_fuzz.py
asan: .venv/installed
	bash tests/sanitize.sh
sweep: .venv/installed
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --disable-pip-version-check -e ".[test,tf]" xllamacpp
	$(BIN)/python -m pytest tests/sweep/*.py
	$(BIN)/python -m benchmarks -k "bench_llama or bench_serving" --output out/llama
	$(BIN)/python -m tools.mutants

.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --disable-pip-version-check --no-compile -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info gptcore/_C*.so gptcore/_simt*.so
