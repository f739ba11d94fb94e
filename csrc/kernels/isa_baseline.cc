// The kernels for any x86-64 (SSE2) and any aarch64 (NEON).
#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "host_memory.h"
#include "isa.h"

#define LORATRF_LANES 4

namespace loratrf {
namespace {
#include "plans.h"
}  // namespace

const Isa kIsaBaseline = {"baseline", PackedSize, PackCall, RunCall};

}  // namespace loratrf
