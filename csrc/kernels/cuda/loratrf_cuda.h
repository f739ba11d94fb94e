// The operators of loratrf-deploy on CUDA: pointers, sizes, a stream. No CUDA header is needed to include this.
//
// Letters, layouts and meanings are those of kernels/loratrf.h; all tensors but adapter_ids are in device memory. Sums
// are accumulated in float32 and y is rounded once. Nothing is allocated and the host never waits: a call only
// launches, once where one launch can hold the grid, so that it can be captured in a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../loratrf.h"

namespace loratrf {

// Highest R and F here: what a block's shared memory holds on every architecture.
constexpr int64_t kMaxCudaRank = 256;

// One call of any operator. LowRank has F = 0 and no tau, C, D; TaskFilter R = 0 and no x, A, B. The operators but
// GroupedLoraTrf have adapter_ids null, batch = S = 1 and tokens = T.
struct CudaCall {
  Type type;
  FilterInput filter_input;
  int64_t batch, tokens, K, N, R, F, S;
  const void* base;            // (batch,tokens,N)
  const void* x;               // (batch,tokens,K)
  const void *A, *B;           // (S,R,K) (S,N,R)
  const void* tau;             // (S,N)
  const void *C, *D;           // (S,F,N) (S,N,F)
  const int64_t* adapter_ids;  // (batch), in host memory; a CUDA graph keeps those that it was captured with
  void* y;                     // (batch,tokens,N); may be base
};

// What went wrong beside the Status.
struct CudaFault {
  int64_t bad_row = 0;       // kBadAdapterId: the first row at fault
  const char* message = "";  // kDevice: the CUDA runtime's words
};

// Bytes of device memory that CudaRun needs on the current device, aligned to 16; often 0.
Status CudaScratchSize(const CudaCall& call, size_t* bytes, CudaFault* fault);

// y = LoraTrf, or the half of it that the call has (see kernels/loratrf.h), on `stream` (a cudaStream_t) of the current
// device. No tokens is kOk without a launch. kDevice also reports an earlier call's error that the device still holds.
Status CudaRun(const CudaCall& call, void* scratch, void* stream, CudaFault* fault);

}  // namespace loratrf
