// The kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"

#define LORATRF_LANES 16

namespace loratrf {
namespace {
#include "plans.h"
}  // namespace

const Isa kIsaAvx512 = {"avx512", PackedSize, PackCall, RunCall};

}  // namespace loratrf
