#!/usr/bin/env bash
# Runs a target of the Makefile: scripts/run.sh demo|test|kernel-tests|check|bench|train-demo [ARGUMENT...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Sets `python` to an interpreter that has the named groups of requirements.
use() {
  command -v python3 >/dev/null || { echo "python3 not found: install Python 3.10 or newer" >&2; exit 1; }
  python=$(python3 scripts/environment.py "$@")
}

# Options of pytest-xdist, where it is installed: a file's tests stay together, as what they start serves them all.
workers() {
  if "$python" -c 'import xdist' 2>/dev/null; then echo "-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -p no:benchmark"; fi
}

target=${1:-}
shift || true
case $target in
  demo)       use run;                  exec "$python" -m tp_runtime.generate "$@" ;;
  test)       use run test 'parallel?' 'notebook?' 'bench?'; exec "$python" -m pytest $(workers) "$@" ;;
  kernel-tests) use run test 'parallel?'; exec "$python" -m scripts.kernel_tests $(workers) "$@" ;;
  check)      use check;                "$python" -m ruff check "$@"; exec "$python" -m mypy ;;
  bench)      use run bench;            exec "$python" -m pytest bench --benchmark-only "$@" ;;
  train-demo) use run;                  exec "$python" -m scripts.train_demo "$@" ;;
  *)          echo "usage: scripts/run.sh demo|test|kernel-tests|check|bench|train-demo [ARGUMENT...]" >&2; exit 2 ;;
esac
