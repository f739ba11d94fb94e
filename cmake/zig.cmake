# Cross-compiles with PyPI's `ziglang` (clang, its C++ library and every system's C library in one package):
#
#   cmake -S . -B build/TARGET -DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake -DLORATRF_TARGET=x86_64-linux-gnu.2.28
#
# setup.py does it for the wheels. TARGET: x86_64- or aarch64-linux-gnu.2.28, x86_64-windows-gnu, aarch64-macos.11.0.
set(LORATRF_TARGET "x86_64-linux-gnu.2.28" CACHE STRING "What zig compiles for")
set(LORATRF_ZIG_PYTHON "python3" CACHE STRING "The Python that has ziglang")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES LORATRF_TARGET LORATRF_ZIG_PYTHON)

string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${LORATRF_TARGET}")
if(LORATRF_TARGET MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
elseif(LORATRF_TARGET MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
execute_process(COMMAND "${LORATRF_ZIG_PYTHON}" -m ziglang version OUTPUT_VARIABLE LORATRF_ZIG_VERSION
                OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${LORATRF_ZIG_PYTHON} has no ziglang, which compiles for ${LORATRF_TARGET}: `pip install ziglang`, "
                      "and -DLORATRF_ZIG_PYTHON=PYTHON names the Python that has it.")
endif()
set(CMAKE_CXX_COMPILER "${LORATRF_ZIG_PYTHON}" -m ziglang c++ -target ${LORATRF_TARGET})
