// The operators of loratrf-deploy: pointers, sizes and, on the CPU, a parallel-for. No framework header is needed here.
//
//   h = base + (x A^T) B^T;  z = h for kAdapted, base for kBase;  y = h + ((s z) C^T) D^T
//   s = clamp(<z,tau> / (max(|z|,eps) max(|tau|,eps)), 0, 1), one scalar per token
//
// Letters: T tokens, K in-features, N out-features, R rank, F filter rank, S adapter slots. Every tensor is row-major
// and contiguous, all tensors of a call are of one Type. Sums are accumulated in float32 and y is rounded once, when it
// is stored. alpha/R is folded into B and gamma into D, so no operator carries a scale.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace loratrf {

// What a kernel reports; the bindings word it for their hosts. Declared here and nowhere else.
enum class Status : int {
  kOk = 0,
  kBadSize,       // a size is negative, or below 1 where its tensor is read; or the sizes contradict each other
  kRankTooHigh,   // R or F over kMaxRank
  kNullPointer,   // a tensor with elements has no data
  kOutOfMemory,   // scratch could not be allocated; y is unspecified
  kBadAdapterId,  // an adapter id is outside of [-1, S); y is as it was
  kDevice,        // a GPU's runtime reports an error; y is unspecified
  kBadSetting,  // an attribute, a type or an environment variable is none that there is: said before a kernel is called
};

enum class Type : int { kFloat32, kFloat16, kBFloat16 };

// Which representation the filter reads: h = base + (x A^T) B^T, or base itself.
enum class FilterInput : int { kAdapted, kBase };

// Highest R and F. Scratch grows with them, and beyond it an adapter is no longer low-rank.
constexpr int64_t kMaxRank = 1024;

// Smallest norm that the filter divides by.
constexpr float kEpsilon = 1e-8f;

// A weight matrix (rows, cols): packed by Pack, or nullptr there and the matrix itself, which every call of more than a
// few tokens then packs anew. A constant weight is worth packing once; its own data is not read again and may be null.
// CUDA and calls with adapter_ids read data alone.
struct Weight {
  const void* data;
  const float* packed;
};

// One call of any operator, on the CPU or on CUDA: one shape for both, so that whoever checks the inputs fills it once;
// what only one of them reads is said beside it. A half that is absent has R = 0 or F = 0 and null tensors: LowRank has
// no filter, TaskFilter no x, A, B, and its z is base.
//
// GroupedLoraTrf has adapter_ids: row b's tokens are computed with the weights of slot adapter_ids[b]; for id -1 their
// y is base. There R and F may both be 0, and slots that no row names are not read.
struct Call {
  Type type = Type::kFloat32;
  FilterInput filter_input = FilterInput::kAdapted;
  int64_t T = 0, K = 0, N = 0, R = 0, F = 0;
  int64_t S = 1, batch = 1;              // both 1 without adapter_ids; batch divides T
  const void* base = nullptr;            // (T,N)
  const void* x = nullptr;               // (T,K)
  const void* tau = nullptr;             // (S,N)
  Weight A{}, B{};                       // (S,R,K) (S,N,R)
  Weight C{}, D{};                       // (S,F,N) (S,N,F)
  void* y = nullptr;                     // (T,N); may be base
  const int64_t* adapter_ids = nullptr;  // (batch), in host memory
};

// What went wrong beside the Status.
struct Detail {
  int64_t bad_row = 0;       // kBadAdapterId: the first row at fault
  const char* message = "";  // kDevice: the words of the GPU's runtime
};

// Calls body(argument, i) for every i in [0, count), in any order and on any threads; returns when all are done.
struct ParallelFor {
  void (*run)(void* self, size_t count, void (*body)(void* argument, size_t i), void* argument);
  void* self;
};

// An instruction set's kernels. Packed weights belong to the Isa that packed them.
struct Isa;

// The named instruction set ("baseline", "avx2", "avx512"; "lanes16" in test builds), the best one that this CPU has
// for nullptr or "". Returns nullptr for one that is unknown or that this CPU lacks.
const Isa* FindIsa(const char* name);
const char* IsaName(const Isa* isa);

// Floats that Pack writes for a (rows, cols) weight.
size_t PackedSize(const Isa* isa, int64_t rows, int64_t cols);
// Lays out weight (rows, cols) for this Isa. out: PackedSize floats.
Status Pack(const Isa* isa, Type type, int64_t rows, int64_t cols, const void* weight, float* out);

// y of the call.  Writes every row; never accumulates into y's old content.  T == 0 is kOk.
Status Run(const Isa* isa, ParallelFor parallel, const Call& call, Detail* detail);

}  // namespace loratrf
