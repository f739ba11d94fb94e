// What the dispatcher (loratrf.cc) and the per-instruction-set files share.
#pragma once

#include "loratrf.h"

namespace loratrf {

// Multiply-adds below which waking threads costs more than it gives.
constexpr int64_t kSerialWork = 1 << 18;

struct Isa {
  const char* name;
  size_t (*packed_size)(int64_t rows, int64_t cols);
  void (*pack)(Type type, int64_t rows, int64_t cols, const void* weight, float* out);
  Status (*run)(const Call& call, ParallelFor parallel);  // a call without adapter_ids that has tokens
};

// Run for a call with adapter_ids that has tokens (grouped.cc).
Status RunGrouped(const Isa* isa, ParallelFor parallel, const Call& call);

extern const Isa kIsaBaseline;  // SSE2 on x86-64, NEON on aarch64
extern const Isa kIsaAvx2;      // with FMA and F16C
extern const Isa kIsaAvx512;    // F, BW, DQ, VL
extern const Isa kIsaLanes16;   // the 16-lane code without AVX-512: tests its lane arithmetic on any machine

}  // namespace loratrf
