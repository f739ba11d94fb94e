// What the dispatcher (loratrf.cc) and the per-instruction-set files share.
#pragma once

#include "loratrf.h"

namespace loratrf {

// Multiply-adds below which waking threads costs more than it gives.
constexpr int64_t kSerialWork = 1 << 18;

// One call. A half that is absent (R == 0 or F == 0) has null tensors.
struct Call {
  Type type;
  FilterInput filter_input;
  int64_t T, K, N, R, F;
  const void* base;  // (T,N)
  const void* x;     // (T,K)
  const void* tau;   // (N)
  Weight A, B;       // (R,K) (N,R)
  Weight C, D;       // (F,N) (N,F)
  void* y;           // (T,N)
  ParallelFor parallel;
};

struct Isa {
  const char* name;
  size_t (*packed_size)(int64_t rows, int64_t cols);
  Status (*pack)(Type type, int64_t rows, int64_t cols, const void* weight, float* out);
  Status (*run)(const Call& call);
};

extern const Isa kIsaBaseline;  // SSE2 on x86-64, NEON on aarch64
extern const Isa kIsaAvx2;      // with FMA and F16C
extern const Isa kIsaAvx512;    // F, BW, DQ, VL
extern const Isa kIsaLanes16;   // the 16-lane code without AVX-512: tests its lane arithmetic on any machine

}  // namespace loratrf
