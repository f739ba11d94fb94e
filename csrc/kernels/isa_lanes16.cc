// The 16-lane source built without AVX-512, so that its arithmetic is tested on machines that lack it.
#include <stdint.h>
#include <string.h>

#include "host_memory.h"
#include "isa.h"

#define LORATRF_LANES 16

namespace loratrf {
namespace {
#include "plans.h"
}  // namespace

const Isa kIsaLanes16 = {"lanes16", PackedSize, PackCall, RunCall};

}  // namespace loratrf
