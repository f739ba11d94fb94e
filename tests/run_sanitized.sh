#!/bin/sh
# Builds the kernels and the library with AddressSanitizer and UndefinedBehaviorSanitizer,
# and runs the operators' tests on them: first the self test, which needs no Python, then pytest, then hostile graphs
# (tests/fuzz; GRAPHS says how many).
#
#   tests/run_sanitized.sh [python]        from the repository root; extra pytest options in PYTEST_ADDOPTS
#
# The sanitized libraries stay under build/sanitized. Leaks are not looked for: Python itself leaves too many.
set -eu
python=${1:-python}
out=build/sanitized
mkdir -p "$out/loratrf_deploy"

avx2="-mavx2 -mfma -mf16c"
flags="-std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -ffp-contract=fast -Wno-psabi"
sources="tests/kernel_selftest.cc csrc/kernels/loratrf.cc csrc/kernels/grouped.cc csrc/kernels/isa_baseline.cc"
objects=
if [ "$(uname -m)" = x86_64 ]; then
  for isa in avx2 lanes16 avx512; do
    more=$avx2
    [ $isa = avx512 ] && more="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    g++ $flags $more -c csrc/kernels/isa_$isa.cc -o "$out/$isa.o"
    objects="$objects $out/$isa.o"
  done
  flags="$flags -DLORATRF_WITH_LANES16"
fi
g++ $flags $sources $objects -o "$out/selftest"
"$out/selftest"

cmake -S . -B "$out/cmake" -DLORATRF_SANITIZE=ON -DLORATRF_LANES16=ON -DLORATRF_OUTPUT="$PWD/$out/loratrf_deploy"
cmake --build "$out/cmake" --parallel 2
ln -sf "$PWD"/loratrf_deploy/*[!o] "$out/loratrf_deploy/"  # all but *.so
ln -sfn "$PWD/export" "$out/loratrf_deploy/export"

# The interpreter is not built for them, so the sanitizers' run-time comes first, with the C++ one that it wraps.
preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$preload" PYTHONPATH="$out" PYTHONSAFEPATH=1
"$python" -m pytest -q -p no:cacheprovider tests/test_kernels.py tests/test_ort_ops.py tests/test_grouped_op.py \
  -k "not aarch64 and not shared_between and not reuses_the_buffer and not are_not_read"
"$python" tests/fuzz/run.py graphs --cases "${GRAPHS:-2500}" --limit 60
