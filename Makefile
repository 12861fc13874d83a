# Two commands set a fresh machine up: `make demo` and `make test`. All installs go to .venv, in versions that were tested.
PYTHON ?= $(firstword $(shell command -v python3.11 python3))
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The zoo's packages are wanted for their files; what they'd pull in (torchvision, opencv, …) nothing here imports.
ZOO = $(shell $(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['zoo'])")
BOTH := --numprocesses 2 --dist loadfile  # for tests that hold nothing to a clock and share no device
SAMPLES = $(sort $(wildcard samples/[0-9]*.py))

.PHONY: venv demo test check check-all lint qemu devices browser zoo npu environments samples bench golden size clean

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[torch,images,text,sign,device,dev]'
	$(INSTALL) --no-deps $(foreach package,$(ZOO),'$(package)')
	touch $@

demo: venv  ## a real model, real photos, a package with its report
	$(BIN)/python $(firstword $(SAMPLES))

test: check-all  ## all that CI runs

check: lint  ## before each commit: no real models, under 90 s on 2 cores
	$(BIN)/pytest $(BOTH)

check-all: qemu devices browser check zoo npu  ## compilers first: fast tests want one too; the zoo tests run the samples
	$(BIN)/pytest -m 'slow and not zoo' --durations 8 $(BOTH) --ignore tests/devices
	$(BIN)/pytest -m 'slow and not zoo' --durations 8 tests/devices

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

qemu:  ## CPUs this one isn't, for tests/test_saturation.py; in CI (CI=true) those tests fail without it
	@command -v qemu-x86_64 >/dev/null || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq qemu-user; \
	else echo "no qemu-x86_64, and no apt-get or root to install it: install qemu-user to test under emulation"; fi

devices: venv browser  ## an ARM board made of QEMU (needs Debian and root) and a browser's runtime, for tests/devices
	@{ command -v mmdebstrap && command -v qemu-aarch64-static && command -v ssh-keygen && command -v adb; } >/dev/null || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			mmdebstrap qemu-user-static openssh-client adb; \
	else echo "no mmdebstrap, qemu-aarch64-static or adb, and no apt-get or root to install them"; fi
	$(BIN)/python -m tests.devices

browser:  ## Chromium, npm, CMake and Kotlin for tests of pages and packages; in CI (CI=true) those fail without them
	@{ command -v npm && command -v cmake && command -v c++ && command -v kotlinc && command -v aarch64-linux-gnu-g++; } >/dev/null || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nodejs npm cmake g++ g++-aarch64-linux-gnu kotlin; \
	else echo "no npm, cmake, c++ or kotlinc, and no apt-get or root to install them: some packages go untested"; fi
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; \
	else echo "no chromium, and no apt-get or root to install it: install it to test the pages in a browser"; fi

zoo: venv
	$(BIN)/python -m tests.zoo fetch
	$(BIN)/pytest -m zoo --durations 12 tests/test_zoo.py tests/devices
	$(BIN)/pytest -m zoo --durations 8 $(BOTH) --ignore tests/test_zoo.py --ignore tests/devices

npu: venv  ## Qualcomm's NPU; on x86-64 Linux its plug-in is an emulator. In CI (CI=true) these tests fail without it
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(INSTALL) --editable '.[qnn]'; else echo "no emulator for $$(uname -sm)"; fi
	$(BIN)/python -m tests.zoo fetch
	$(BIN)/pytest -m qnn --durations 8

environments: venv browser  ## 2.5 GB of Python environments for tests of OpenVINO, WebGPU, RKNN and Core ML; without them these are skipped
	$(BIN)/python -m tests.environments

samples: venv
	set -e; for sample in $(SAMPLES); do echo "== $$sample"; $(BIN)/python $$sample; done

bench: venv
	$(BIN)/pytest -m bench -s tests/bench

golden: venv  ## renew files that tests compare with; read the difference before you commit it
	$(BIN)/python -c "from edgeq.report.codec import write_schema; write_schema()"

size:
	@$(PYTHON) -m tests.size

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
