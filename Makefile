# make demo, make test: on a fresh machine with Python >= 3.11 and git each sets up what it needs.
BIN := .venv/bin

.PHONY: demo docs test test-slow test-min releases check conformance benchmarks numbers tiny clean

demo: ## run the main job on a made-up scan and write a page to look at
	@scripts/install.sh
	@$(BIN)/ctinstruct demo -o demo_output

docs: ## the documents as a site, in site/; fails on a dead link
	@scripts/install.sh dev
	@$(BIN)/mkdocs build

test: ## all tests but those marked slow
	@scripts/install.sh dev
	@$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: ## the rest: full width, thousands of broken files, benchmarks, conformance
	@scripts/install.sh dev
	@scripts/install_ohif.sh || echo "The test of the viewer OHIF will be skipped." >&2
	@$(BIN)/python -m pytest -m slow --timeout=3600

test-min: ## all tests with the lowest versions that pyproject.toml allows, in .venv-min
	@scripts/test_versions.sh min

releases: ## once a month: which new release of a dependency breaks us, in .venv-newest
	@$(or $(PYTHON),python3) scripts/check_releases.py

check: ## lint, format, types, who may import whom, what bandit finds unsafe, known holes in dependencies
	@scripts/install.sh dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/bandit -q -c pyproject.toml -r src
	@$(BIN)/python scripts/audit.py

conformance: ## Transformers' own suites on every public class
	@scripts/install.sh dev
	@$(BIN)/python conformance/run.py -n 2

benchmarks: ## tables of ours against theirs; exits 1 where a stated ratio is missed
	@scripts/install.sh dev
	@$(BIN)/python benchmarks/volumes.py --check
	@$(BIN)/python benchmarks/model.py --check
	@$(BIN)/python benchmarks/data.py --check
	@$(BIN)/python benchmarks/evaluation.py --check
	@$(BIN)/python benchmarks/study.py --check
	@$(BIN)/python benchmarks/scale.py --check --runs 1

numbers: ## run the quick benchmarks, write docs/numbers.json and the table of docs/numbers.md
	@scripts/install.sh dev
	@$(BIN)/python scripts/write_numbers.py

tiny: ## train the bundled checkpoint again: two hours and a half on two cores; goes on where it was stopped
	@scripts/install.sh dev
	@$(BIN)/ctinstruct pretrain tiny
	@$(BIN)/ctinstruct pretrain tiny-masks
	@$(BIN)/ctinstruct instruct tiny
	@$(BIN)/ctinstruct instruct tiny-choices
	@$(BIN)/ctinstruct instruct tiny-reports
	@$(BIN)/ctinstruct calibrate --model runs/tiny-reports/model --data phantoms:trunk:3400-3600
	@$(BIN)/python scripts/bundle_tiny.py -i runs/tiny-reports/model

full-size: ## a random checkpoint of the release's size: converted, quantised, asked; hours on two cores, 45 GB of disk
	@scripts/install.sh dev
	@$(BIN)/python scripts/full_size.py --scan ../shared/data/chest_lidc0001/ct.nii.gz --tensors ../shared/reference/released_full_tensors.json \
		--work $${TMPDIR:-/tmp}/ctinstruct-full-size

clean:
	rm -rf .venv .venv-* .conformance demo_output build dist site
