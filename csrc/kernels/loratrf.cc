// The entry to the kernels: checks, and the choice of instruction set at run time. Compiled for the baseline CPU.
#include "loratrf.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <string.h>

#include "check_call.h"
#include "isa.h"

namespace loratrf {
namespace {

#if defined(__x86_64__)
// Whether the CPU has the instructions of AVX2, FMA and F16C, or of AVX-512 F, DQ, BW and VL as well, and the system
// keeps their registers. By the CPU's own numbers: __builtin_cpu_supports says no to all in what zig links.
bool CpuHas(bool avx512) {
  unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
  constexpr unsigned kFma = 1u << 12, kXgetbv = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr unsigned kFirst = kFma | kXgetbv | kAvx | kF16c;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kFirst) != kFirst) return false;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const unsigned kept = avx512 ? 0xe6 : 0x6;  // of XCR0: XMM and YMM; masks and ZMM
  const unsigned wanted = 1u << 5 | (avx512 ? 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31 : 0);
  return (low & kept) == kept && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted;
}
#endif

bool Supported(const Isa* isa) {
#if defined(__x86_64__)
  if (isa == &kIsaAvx2) return CpuHas(false);
#ifdef LORATRF_WITH_LANES16
  if (isa == &kIsaLanes16) return CpuHas(false);
#endif
  if (isa == &kIsaAvx512) return CpuHas(true);
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
