#!/usr/bin/env bash
# Runs the kernels and the native functions under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# Builds a second module with GPTCORE_SANITIZE in build/sanitize, with a copy of the Python files beside it, and runs the
# tests that call into it from there. Takes the lowest and the highest instruction set of this machine; the kernels of
# others are compiled without the sanitizers.
set -eu
cd "$(dirname "$0")/.."
root=$PWD build=$PWD/build/sanitize
PATH=$root/.venv/bin:$PATH

pip install --quiet --constraint constraints.txt cmake ninja pybind11
highest=$(python -c "from gptcore import _C; print(_C.supported_isas()[-1])")
rm -rf "$build/package"
mkdir -p "$build/package"
cp -R gptcore "$build/package/"
rm -f "$build"/package/gptcore/*.so
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DGPTCORE_SANITIZE=address,undefined -DGPTCORE_CUDA=OFF \
  -DGPTCORE_SANITIZED_ISAS="baseline;${highest/amx/avx512_bf16;amx}" \
  -DPython_EXECUTABLE="$root/.venv/bin/python" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/package/gptcore" >/dev/null
cmake --build "$build"

cd "$build/package" # first on sys.path, so this copy of gptcore is the one that is imported
# Python itself is not instrumented, so the runtimes come first; with libstdc++, whose exceptions they watch.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
python -c "from gptcore import _C; assert 'sanitize' in _C.__file__"
# Capturing at the level of Python only: what a sanitizer prints before it aborts must be seen.
python -m pytest -q -n auto --dist worksteal --capture=sys -p no:cacheprovider "$root"/tests/test_{operations,attention,layer_norm,gelu,linear,quantized_linear,ops,transforms,native,native_calls,decode_step,linear_cross_entropy,optim}.py \
  -k "cpu-baseline or cpu-$highest or arguments" "$@"
