.PHONY: install lint test smoke sync results

install:
	pip install -r requirements.txt

lint:
	ruff check .
	ruff format --check .

test:
	pytest

smoke:  # every algorithm file alone beside common/
	pytest tests -k smoke

sync:  # helpers that should be identical in every algorithm file but are not; nothing if all are
	python tests/sync.py

results:  # runs/report.md with its pictures, from the run folders below runs/
	python benchmarks/report.py runs
