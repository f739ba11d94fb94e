// The kernels for x86-64 with AVX2, FMA and F16C.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "host_memory.h"
#include "isa.h"

#define LORATRF_LANES 8

namespace loratrf {
namespace {
#include "plans.h"
}  // namespace

const Isa kIsaAvx2 = {"avx2", PackedSize, PackCall, RunCall};

}  // namespace loratrf
