#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc and PyTorch: builds for that GPU, runs every GPU test against float64, times the
# operators, BERT-base and a LLaMA layer stack, and prints short tables last. Under 8 minutes; needs no network. Exits
# with 1 if a part failed, with 2 if it can't begin.
#
#   benchmarks/gpu_check.sh [python] [folder for logs and figures]
#
# Needed beside those: cmake, and for python pytest and what loratrf-deploy itself depends on. Optional, and
# what lacks them is named as left out:
#   onnxruntime-gpu, onnx_ir                                the operators in ONNX Runtime
#   transformers 5.23, peft, onnxscript, optimum as well    adapters resident on the GPU; BERT-base
#   onnxruntime-genai as well (its CPU build will do)       the LLaMA layer stack
set -uo pipefail
python=$(command -v "${1:-python3}") || { echo "error: there is no ${1:-python3}" >&2; exit 2; }
python=$(realpath --no-symlinks "$python")
root=$(realpath "$(dirname "$0")/..")
out=$(realpath -m "${2:-$root/build/gpu}")
package=$out/package
mkdir -p "$package/loratrf_deploy"
cd "$root" || exit 2

# missing MODULE...: what can't be used here, in words; nothing where all can.
missing() {
  "$python" - "$@" 2>/dev/null <<'END' || echo "$*, or one of them ends $python"
import importlib, sys

lacking = []
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
    except Exception:
        lacking.append(name.split(".")[0])
        continue
    if name == "torch" and not module.cuda.is_available():
        lacking.append("a torch that can use a GPU")
    if name == "onnxruntime" and "CUDAExecutionProvider" not in module.get_available_providers():
        lacking.append("onnxruntime-gpu")
    if name == "transformers" and tuple(map(int, module.__version__.split(".")[:2])) < (5, 23):
        lacking.append(f"transformers 5.23 (this is {module.__version__})")
print(", ".join(lacking))
END
}

lacking=$(missing torch pytest numpy safetensors ml_dtypes rich)
for tool in nvcc cmake nvidia-smi; do
  command -v $tool >/dev/null || lacking="$lacking${lacking:+, }$tool"
done
if [ -n "$lacking" ]; then
  echo "error: $python or the PATH lacks $lacking" >&2
  exit 2
fi

architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
generator=$(command -v ninja >/dev/null && echo "-G Ninja")
# shellcheck disable=SC2086
if ! { cmake -S . -B "$out/cmake" $generator -DLORATRF_CUDA=ON \
  -DCMAKE_CUDA_ARCHITECTURES="$architecture" -DLORATRF_OUTPUT="$package/loratrf_deploy" &&
  cmake --build "$out/cmake" --parallel; } >"$out/build.log" 2>&1; then
  tail -30 "$out/build.log"
  echo "error: the build failed, see $out/build.log" >&2
  exit 1
fi

# The package beside what was built, and the exporter where an installation would put it.
ln -sf "$PWD"/loratrf_deploy/*[!o] "$package/loratrf_deploy/"  # all but *.so
ln -sfn "$PWD/export" "$package/loratrf_deploy/export"
export PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}"

failed=()
# part NAME SECONDS COMMAND...: runs it into NAME.log, for as long as the 8 minutes last.
part() {
  local name=$1 left=$((460 - SECONDS)) limit=$2
  shift 2
  limit=$((left < limit ? left : limit))
  timeout $((limit < 1 ? 1 : limit)) "$@" >"$out/$name.log" 2>&1
  local status=$?
  [ $status -eq 0 ] && return
  failed+=("$name")
  [ $status -ne 124 ] || echo "$name: stopped after $limit s" >>"$out/$name.log"
}

# Not from the repository's root, whose loratrf_deploy has no exporter; and without pyproject.toml's pytest options, which
# need plugins that this machine may lack.
cd "$package" || exit 2
part tests 240 "$python" -m pytest -q -ra -c /dev/null --rootdir "$root" -p no:cacheprovider "$root/tests/test_cuda.py"
cd "$root" || exit 2

part operators 200 "$python" benchmarks/bench_cuda.py --out "$out/operators.json"

export_needs=(onnxruntime onnx_ir transformers transformers.exporters peft onnxscript optimum.exporters.tasks)
lacking=$(missing "${export_needs[@]}")
if [ -z "$lacking" ]; then
  part encoder 150 "$python" benchmarks/bench_encoder.py --device cuda --out "$out/encoder.json"
else
  echo "BERT-base is left out: there is no $lacking" >"$out/encoder.log"
fi
lacking=$(missing "${export_needs[@]}" onnxruntime_genai.models.builder)
if [ -z "$lacking" ]; then
  part llm 150 "$python" benchmarks/bench_llm_cuda.py --out "$out/llm.json"
else
  echo "The LLaMA layer stack is left out: there is no $lacking" >"$out/llm.log"
fi

for name in "${failed[@]}"; do
  echo "--- $name failed, see $out/$name.log"
  if [ "$name" = tests ]; then
    grep -E "^(FAILED|ERROR|E  )" "$out/tests.log" | head -40
  fi
  tail -20 "$out/$name.log"
done
echo "--- $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
grep "^SKIPPED" "$out/tests.log"
tail -1 "$out/tests.log"
for name in operators encoder llm; do
  [[ " ${failed[*]} " == *" $name "* ]] || { echo; cat "$out/$name.log"; }
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
