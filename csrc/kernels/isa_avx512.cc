// The kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "host_memory.h"
#include "isa.h"

#define LORATRF_LANES 16

namespace loratrf {
namespace {
#include "plans.h"
}  // namespace

const Isa kIsaAvx512 = {"avx512", PackedSize, PackCall, RunCall};

}  // namespace loratrf
