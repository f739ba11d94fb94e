// The entry to the kernels: checks, and the choice of instruction set at run time. Compiled for the baseline CPU.
#include "loratrf.h"

#include <string.h>

#include "check_call.h"
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
  if (rows < 1 || cols < 1) return Status::kBadSize;
  if (!weight || !out) return Status::kNullPointer;
  isa->pack(type, rows, cols, weight, out);
  return Status::kOk;
}

Status Run(const Isa* isa, ParallelFor parallel, const Call& call, Detail* detail) {
  const bool grouped = call.adapter_ids;
  if (Status status = CheckCall(call, kMaxRank, detail); status != Status::kOk) return status;
  if (call.T == 0) return Status::kOk;
  if (Status status = CheckTensors(call, !grouped); status != Status::kOk) return status;
  return grouped ? RunGrouped(isa, parallel, call) : isa->run(call, parallel);
}

}  // namespace loratrf
