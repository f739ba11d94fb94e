// Argument checks, and the choice of instruction set at run time. Compiled for the baseline CPU.
#include "loratrf.h"

#include <string.h>

#include "isa.h"

namespace loratrf {
namespace {

bool Supported(const Isa* isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == &kIsaAvx2) return avx2;
#ifdef LORATRF_WITH_LANES16
  if (isa == &kIsaLanes16) return avx2;
#endif
  if (isa == &kIsaAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  (void)isa;
  return true;
}

bool BadSize(int64_t size) { return size < 1; }

bool Has(const Weight& weight) { return weight.data || weight.packed; }

Status CheckRank(int64_t rank) {
  if (BadSize(rank)) return Status::kBadSize;
  return rank > kMaxRank ? Status::kRankTooHigh : Status::kOk;
}

Status Run(const Isa* isa, const Call& call) {
  if (call.T < 0 || BadSize(call.N)) return Status::kBadSize;
  if (call.T == 0) return Status::kOk;
  if (!call.base || !call.y) return Status::kNullPointer;
  if (call.R > 0 && !(call.x && Has(call.A) && Has(call.B))) return Status::kNullPointer;
  if (call.F > 0 && !(call.tau && Has(call.C) && Has(call.D))) return Status::kNullPointer;
  return isa->run(call);
}

}  // namespace

const Isa* FindIsa(const char* name) {
  // Best first: nullptr takes the first one that this CPU supports.
  static const Isa* const kAll[] = {
#if defined(__x86_64__)
      &kIsaAvx512,
      &kIsaAvx2,
#endif
      &kIsaBaseline,
#ifdef LORATRF_WITH_LANES16
      &kIsaLanes16,
#endif
  };
  const bool best = !name || !*name;
  for (const Isa* isa : kAll) {
    if ((best || strcmp(isa->name, name) == 0) && Supported(isa)) return isa;
  }
  return nullptr;
}

const char* IsaName(const Isa* isa) { return isa->name; }

size_t PackedSize(const Isa* isa, int64_t rows, int64_t cols) { return isa->packed_size(rows, cols); }

Status Pack(const Isa* isa, Type type, int64_t rows, int64_t cols, const void* weight, float* out) {
  if (BadSize(rows) || BadSize(cols)) return Status::kBadSize;
  if (!weight || !out) return Status::kNullPointer;
  return isa->pack(type, rows, cols, weight, out);
}

Status LowRank(const Isa* isa, ParallelFor parallel, Type type, int64_t T, int64_t K, int64_t N, int64_t R,
               const void* base, const void* x, Weight A, Weight B, void* y) {
  if (BadSize(K)) return Status::kBadSize;
  if (Status status = CheckRank(R); status != Status::kOk) return status;
  Call call{};
  call.type = type;
  call.T = T, call.K = K, call.N = N, call.R = R;
  call.base = base, call.x = x, call.A = A, call.B = B, call.y = y;
  call.parallel = parallel;
  return Run(isa, call);
}

Status TaskFilter(const Isa* isa, ParallelFor parallel, Type type, int64_t T, int64_t N, int64_t F, const void* z,
                  const void* tau, Weight C, Weight D, void* y) {
  if (Status status = CheckRank(F); status != Status::kOk) return status;
  Call call{};
  call.type = type;
  call.T = T, call.N = N, call.F = F;
  call.base = z, call.tau = tau, call.C = C, call.D = D, call.y = y;
  call.parallel = parallel;
  return Run(isa, call);
}

Status LoraTrf(const Isa* isa, ParallelFor parallel, Type type, int64_t T, int64_t K, int64_t N, int64_t R, int64_t F,
               FilterInput filter_input, const void* base, const void* x, Weight A, Weight B, const void* tau, Weight C,
               Weight D, void* y) {
  if (BadSize(K)) return Status::kBadSize;
  if (Status status = CheckRank(R); status != Status::kOk) return status;
  if (Status status = CheckRank(F); status != Status::kOk) return status;
  Call call{type, filter_input, T, K, N, R, F, base, x, tau, A, B, C, D, y, parallel};
  return Run(isa, call);
}

}  // namespace loratrf
