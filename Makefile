# What a person types: `make run`, `make demo`, `make test`; `make help` lists the rest.
# Root is asked for, with sudo, only where it is needed.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run demo venv check fmt test test-vm bench bench-quick bench-remotes mutate spec lock clean

# Debian keeps the directories of root's programs off other users' PATH.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

BIN := .venv/bin
AS_ROOT := deploy/as-root
QUICK := $(wildcard tests/unit tests/store tests/api tests/admin)

help:
	@echo 'make run     serve this machine'"'"'s Docker; installs and starts what is missing'
	@echo 'make demo    show what pynet does, in namespaces of its own'
	@echo 'make test    run everything: make check, then all suites on a real Docker'
	@echo 'make test-vm boot machines with systemd: install, reboot, firewall, removal'
	@echo 'make check   format, lint, types, import layers, tests without root'
	@echo 'make fmt     format the code'
	@echo 'make venv    make .venv from requirements.lock'
	@echo 'make spec    write what plugin-spec/ has of the code anew'
	@echo 'make lock    choose the versions in requirements.lock anew'
	@echo 'make bench   compare pynet with Docker'"'"'s own drivers; make bench-quick: a part'
	@echo 'make mutate  mutation testing of plan/, driver/ and the model'
	@echo 'make clean   remove what these have made here'

run:
	@deploy/packages run
	@deploy/venv
	@exec deploy/run

demo:
	@deploy/packages run lab
	@deploy/venv
	@exec $(AS_ROOT) $(BIN)/python -m cnmdriver.lab.demo

venv:
	@deploy/venv

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 -m 'not root and not etcd' $(QUICK)

fmt: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test:
	@$(AS_ROOT) true
	@deploy/packages run lab test
	@deploy/venv
	@$(BIN)/python tests/run.py $(QUICK)

# Needs a GB or two below PYNET_VM_DIR (/var/cache/pynet-vm), and some minutes.
test-vm:
	@deploy/packages run lab vm
	@deploy/venv
	@$(AS_ROOT) $(BIN)/python -m tests.vm

# BENCH has options: make bench BENCH='--dockerd /opt/docker/dockerd --rounds 50'
bench bench-quick:
	@deploy/packages run lab bench
	@deploy/venv
	@$(AS_ROOT) $(BIN)/python -m tests.bench $(if $(filter bench-quick,$@),--quick) $(BENCH)

# What one remote endpoint more costs, beside 10 to 10,000.
bench-remotes:
	@deploy/packages run lab
	@deploy/venv
	@$(AS_ROOT) $(BIN)/python -m tests.bench.remotes

mutate: venv
	@exec $(BIN)/python tests/mutate.py

spec: venv
	$(BIN)/python plugin-spec/generate.py

# uv resolves for every supported Python and machine at once; pip does not.
lock: venv
	$(BIN)/python -m venv .venv/uv
	.venv/uv/bin/pip install --quiet --disable-pip-version-check uv
	.venv/uv/bin/uv pip compile --quiet --no-config --upgrade --universal \
		--python-version 3.11 --generate-hashes --all-extras \
		--custom-compile-command 'make lock' \
		--output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv build cnmdriver.egg-info mutants .coverage
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find cnmdriver tests -name __pycache__ -type d -prune -exec rm -rf {} +
