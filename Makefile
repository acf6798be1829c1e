# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
.DEFAULT_GOAL := help
.PHONY: help demo serve test test-export test-serve test-wheel test-clients test-docker test-reproduction reproduce lint bench bench-peers train lock clean

VENV := .venv/.installed
SERVE_VENV := .venv-serve/.installed
CLIENTS_VENV := .venv-clients/.installed

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

demo: $(VENV)  ## export both shipped models, serve them, post images they have never seen
	.venv/bin/python models/demo.py

serve: $(VENV)  ## the same, and leave the service running
	.venv/bin/python models/demo.py --keep-serving

test: test-export test-serve test-wheel test-clients  ## every test but those that need minutes or an engine of their own

# What asks services runs in the lane without TensorFlow alone, unless it asks with a client that is in this one.
RUN_ONCE := tests/e2e/connections $(filter-out tests/e2e/test_real_clients.py, $(wildcard tests/e2e/test_*.py)) \
	$(filter-out tests/serving/test_open_inference.py tests/serving/test_tf_serving.py, $(wildcard tests/serving/test_*.py))

test-export: $(VENV)  ## the lane with TensorFlow
	.venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(RUN_ONCE:%=--ignore=%)

# What looks at tenths of a second, or at this process's memory, has the machine and the process for itself.
ALONE := tests/e2e/connections tests/e2e/test_largest_body.py tests/serving/test_catalog_swaps.py \
	tests/serving/test_json_values.py

test-serve: $(SERVE_VENV)  ## the lane without it: the serving install alone
	.venv-serve/bin/python -m pytest --without-tensorflow $(ALONE)
	.venv-serve/bin/python -m pytest --without-tensorflow --numprocesses auto --dist loadfile $(ALONE:%=--ignore=%)

test-wheel: $(SERVE_VENV)  ## what `pip install` gives, in an empty environment
	.venv-serve/bin/python -m pytest --without-tensorflow tests/test_packaging.py -m wheel

test-clients: $(CLIENTS_VENV)  ## KServe's client, schemathesis and a browser ask the service, in an environment of theirs
	.venv-clients/bin/python -m pytest tests/clients

test-docker: $(VENV)  ## build and run the images in a Docker engine; as root on Debian, in one of its own
	.venv/bin/python -m pytest tests/docker -m docker

test-reproduction: $(VENV)  ## train both shipped models again; compare one of make reproduce over HTTP (3 minutes)
	.venv/bin/python -m pytest tests/reproduction -m reproduction

reproduce: $(VENV)  ## train what the paper's tables are compared with; can be interrupted and resumed (hours)
	.venv/bin/python tests/reproduction/runs.py
	PYTHONPATH=tests .venv/bin/python -m reproduction.policies
	PYTHONPATH=tests .venv/bin/python -m reproduction.served
	PYTHONPATH=tests .venv/bin/python -m reproduction.tables

lint: $(VENV)  ## formatting, style, types, who may import whom, and docker's files
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/hadolint docker/Dockerfile
	.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

bench: $(VENV)  ## how fast, as ratios side by side
	PYTHONPATH=tests .venv/bin/python -m benchmarks

bench-peers: $(VENV)  ## the service beside tritonserver and LitServe, each in an environment of its own (15 minutes)
	PYTHONPATH=tests .venv/bin/python -m benchmarks.peers

train: $(VENV)  ## train the shipped models again, in place
	.venv/bin/python models/train_digits_cnn.py
	.venv/bin/python models/train_digits_rnn.py

# One lock a lane, exact and hashed, for every Python that TensorFlow has wheels for. The dev lock holds all; the others
# follow it, so that a package has one version everywhere. The clients' alone is free of it: KServe's client holds protobuf
# back, which TensorFlow has newer.
COMPILE = .venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --custom-compile-command "make lock"
PEERS = tests/benchmarks/peers/requirements

lock: $(VENV)  ## pin the dependencies anew
	$(COMPILE) --upgrade --group build --extra dev -o requirements-dev.txt
	$(COMPILE) -c requirements-dev.txt --group build --extra test -o requirements-test.txt
	$(COMPILE) -c requirements-dev.txt --extra export -o requirements-export.txt
	$(COMPILE) -c requirements-dev.txt --extra serve -o requirements-serve.txt
	$(COMPILE:pyproject.toml=) -c requirements-dev.txt --group image -o requirements-image.txt
	$(COMPILE) --upgrade --group build --extra test --group clients -o requirements-clients.txt
	@# Whoever is compared runs the model in the same release.
	grep '^onnxruntime==' requirements-dev.txt | tr -d ' \\' > .venv/runtime.txt
	for name in litserve plot triton; do \
		$(COMPILE:pyproject.toml=$(PEERS)/$$name.in) --upgrade -c .venv/runtime.txt -o $(PEERS)/$$name.txt || exit 1; \
	done

clean:  ## remove what the targets made
	rm -rf .bench-peers .reproduction .docker-engine .venv .venv-serve .venv-clients dist models/*/ .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV): requirements-dev.txt pyproject.toml
$(SERVE_VENV): requirements-test.txt pyproject.toml
$(CLIENTS_VENV): requirements-clients.txt pyproject.toml
$(VENV) $(SERVE_VENV) $(CLIENTS_VENV):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
		"Expected Python 3.11 to 3.13, which TensorFlow has wheels for. Received: %d.%d. Set PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(@D)
	@echo "Installing what $< locks into $(@D): about a minute, and up to 3 GB of disk."
	@# Compiling all of TensorFlow would take as long again as installing it; what is imported is compiled then.
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r $<
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
