// The operators of loratrf-deploy on CPU: pointers, sizes and a parallel-for. No framework header is needed here.
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
  kBadSize,       // a negative T, or K, N, R or F below 1
  kRankTooHigh,   // R or F over kMaxRank
  kNullPointer,   // a tensor with elements has no data
  kOutOfMemory,   // scratch could not be allocated; y is unspecified
  kBadAdapterId,  // an adapter id is outside of [-1, S); y is as it was
  kDevice,        // a GPU's runtime reports an error; y is unspecified
};

enum class Type : int { kFloat32, kFloat16, kBFloat16 };

// Which representation the filter reads: h = base + (x A^T) B^T, or base itself.
enum class FilterInput : int { kAdapted, kBase };

// Highest R and F. Scratch grows with them, and beyond it an adapter is no longer low-rank.
constexpr int64_t kMaxRank = 1024;

// Smallest norm that the filter divides by.
constexpr float kEpsilon = 1e-8f;

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

// A weight matrix (rows, cols): packed by Pack, or nullptr there and the matrix itself, which every call of more than a
// few tokens then packs anew. A constant weight is worth packing once; its own data is not read again and may be null.
struct Weight {
  const void* data;
  const float* packed;
};

// Floats that Pack writes for a (rows, cols) weight.
size_t PackedSize(const Isa* isa, int64_t rows, int64_t cols);
// Lays out weight (rows, cols) for this Isa. out: PackedSize floats.
Status Pack(const Isa* isa, Type type, int64_t rows, int64_t cols, const void* weight, float* out);

// y = base + (x A^T) B^T.  Writes every row; never accumulates into y's old content.
//   base, y (T,N)  x (T,K)  A (R,K)  B (N,R).  y may be base.  T == 0 is kOk.
Status LowRank(const Isa* isa, ParallelFor parallel, Type type, int64_t T, int64_t K, int64_t N, int64_t R,
               const void* base, const void* x, Weight A, Weight B, void* y);

// y = z + ((s z) C^T) D^T,  s = clamp(<z,tau> / (max(|z|,eps) max(|tau|,eps)), 0, 1), one scalar per token.
//   z, y (T,N)  tau (N)  C (F,N)  D (N,F).  y may be z.  T == 0 is kOk.
Status TaskFilter(const Isa* isa, ParallelFor parallel, Type type, int64_t T, int64_t N, int64_t F, const void* z,
                  const void* tau, Weight C, Weight D, void* y);

// h = base + (x A^T) B^T;  z = h for kAdapted, base for kBase;  y = h + ((s z) C^T) D^T with s as in TaskFilter.
//   base, y (T,N)  x (T,K)  A (R,K)  B (N,R)  tau (N)  C (F,N)  D (N,F).  y may be base.  T == 0 is kOk.
Status LoraTrf(const Isa* isa, ParallelFor parallel, Type type, int64_t T, int64_t K, int64_t N, int64_t R, int64_t F,
               FilterInput filter_input, const void* base, const void* x, Weight A, Weight B, const void* tau, Weight C,
               Weight D, void* y);

// Batch row b's tokens as LoraTrf with the weights of slot adapter_ids[b]; for id -1 their y is base.
//   base, y (batch,tokens,N)  x (batch,tokens,K)  A (S,R,K)  B (S,N,R)  tau (S,N)  C (S,F,N)  D (S,N,F)
//   adapter_ids (batch).  y may be base.  R == 0 or F == 0: no adapter has that half.  Slots that no row names are not
//   read.  kBadAdapterId: *bad_row is the first row at fault.
Status GroupedLoraTrf(const Isa* isa, ParallelFor parallel, Type type, int64_t batch, int64_t tokens, int64_t K,
                      int64_t N, int64_t R, int64_t F, int64_t S, FilterInput filter_input, const void* base,
                      const void* x, const void* A, const void* B, const void* tau, const void* C, const void* D,
                      const int64_t* adapter_ids, void* y, int64_t* bad_row);

}  // namespace loratrf
