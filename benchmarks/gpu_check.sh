#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc and PyTorch: builds for that GPU, runs every GPU test against float64, times the
# operators and BERT-base, and prints short tables last. Under 8 minutes; needs no network.
#
#   benchmarks/gpu_check.sh [python] [folder for logs and figures]
#
# ONNX Runtime's part runs where onnxruntime-gpu is installed, BERT-base where the `export` extra is too; they are counted
# as skipped, or named as left out, elsewhere.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
out=${2:-build/gpu}
mkdir -p "$out"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python has no PyTorch that can use a GPU" >&2
  exit 2
fi
command -v nvcc >/dev/null || { echo "error: nvcc is not on the PATH" >&2; exit 2; }
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')

if ! pybind11=$("$python" -m pybind11 --cmakedir 2>/dev/null); then
  echo "error: pybind11 is not installed for $python" >&2
  exit 2
fi
generator=$(command -v ninja >/dev/null && echo "-G Ninja")
# shellcheck disable=SC2086
if ! { cmake -S . -B "$out/cmake" $generator -DCMAKE_CUDA_ARCHITECTURES="$architecture" -Dpybind11_DIR="$pybind11" \
  -DPython_EXECUTABLE="$(command -v "$python")" && cmake --build "$out/cmake" --parallel; } >"$out/build.log" 2>&1; then
  tail -30 "$out/build.log"
  echo "error: the build failed, see $out/build.log" >&2
  exit 1
fi

# The package beside its sources, and the exporter where an installation would put it.
package=$(readlink -f "$out")/package
mkdir -p "$package/loratrf_deploy"
ln -sf "$PWD"/loratrf_deploy/*.py "$PWD"/loratrf_deploy/*.so "$package/loratrf_deploy/"
ln -sfn "$PWD/export" "$package/loratrf_deploy/export"
export PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}"
# Without pyproject.toml's pytest options, which need plugins that this machine may lack.
timeout 240 "$python" -m pytest -q -ra -c /dev/null --rootdir "$PWD" -p no:cacheprovider tests/test_cuda.py >"$out/tests.log" 2>&1
tests=$?

timeout 200 "$python" benchmarks/bench_cuda.py --out "$out/bench.json" >"$out/bench.log" 2>&1
bench=$?

encoder=0
if "$python" -c 'import onnxruntime, peft, transformers.exporters, sys
sys.exit("CUDAExecutionProvider" not in onnxruntime.get_available_providers())' 2>/dev/null; then
  timeout 120 "$python" benchmarks/bench_encoder.py --device cuda --out "$out/encoder.json" >"$out/encoder.log" 2>&1
  encoder=$?
else
  echo "BERT-base is left out: it needs onnxruntime-gpu and the export extra" >"$out/encoder.log"
fi

[ $tests -eq 0 ] || grep -E "^(FAILED|ERROR|E  )" "$out/tests.log" | head -40
[ $bench -eq 0 ] || tail -20 "$out/bench.log"
[ $encoder -eq 0 ] || tail -20 "$out/encoder.log"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
tail -1 "$out/tests.log"
cat "$out/bench.log" "$out/encoder.log"
exit $((tests | bench | encoder))
