#!/usr/bin/env bash
# Everything that wants a GPU, in one command, on a machine that may have no network:
#
#     benchmarks/gpu.sh RESULTS_DIR
#
# Runs the tests marked gpu, then every benchmark, then, in the time that is left, a training
# recipe. A stage that fails or has nothing to run does not stop the next. RESULTS_DIR receives
# stages.tsv (stage, exit code, seconds), a log a stage, the benchmarks' rows and the run's figures.
#
#   BUDGET   seconds for all of it (default 540); a stage still running then is ended (exit code 124)
#   PYTHON   interpreter whose torch sees the GPU (default python3)
#   RECIPE   arguments of `blspkd train` (default none: the built-in tiny recipe)
#
# Nothing is installed into the machine: sources are used in place, and wheels from a folder .whl of
# the repository, if there is one, are unpacked into a temporary folder.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh RESULTS_DIR" >&2
    exit 2
fi
mkdir -p "$1"
results=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
budget=${BUDGET:-540}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD/cli:$PWD/src/cif:$PWD/src/plora:$PWD/src/kd_losses:$PWD/src/adapters"
export PYTHONPATH="$PYTHONPATH:$scratch/site" PYTHONDONTWRITEBYTECODE=1
printf 'stage\texit\tseconds\n' >"$results/stages.tsv"

# stage NAME COMMAND...: run it within the budget, log it, record its exit code
stage() {
    local name=$1 begin=$SECONDS left=$((budget - SECONDS)) code=124
    shift
    if [ "$left" -gt 5 ]; then
        echo "== $name (at most $left s)"
        timeout --kill-after=20 --signal=INT "$left" "$@" >"$results/$name.log" 2>&1
        code=$?
        tail -n 5 "$results/$name.log"
    fi
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - begin)) >>"$results/stages.tsv"
    echo "== $name: exit code $code after $((SECONDS - begin)) s"
}

if compgen -G '.whl/*.whl' >/dev/null; then
    # --no-deps: the machine's own torch must stay the one that is imported
    stage wheels "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/site" .whl/*.whl
fi
stage machine "$python" - <<'PYTHON_END'
import importlib.metadata, platform
import torch
print("python", platform.python_version())
for name in ("torch", "transformers", "triton", "accelerate"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
print("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else None)
PYTHON_END

# Exit code 5: there is no such test. A library that is missing here costs only its own tests, and
# what this machine's versions deprecate fails none.
stage tests "$python" -m pytest -m gpu -W default -p no:cacheprovider --continue-on-collection-errors

for name in $("$python" -m benchmarks --list | cut -f1); do
    stage "benchmark-$name" "$python" -m "benchmarks.$name" --out "$results" --seconds 3
done

# shellcheck disable=SC2086 # RECIPE holds several arguments
stage train "$python" -m blspkd train ${RECIPE:-} "output=$scratch/run" --json
if [ -d "$scratch/run" ]; then
    mkdir -p "$results/run"
    find "$scratch/run" -maxdepth 1 -type f -size -4M ! -name '*.safetensors' \
        -exec cp {} "$results/run/" \;
fi
cat "$results/stages.tsv"
