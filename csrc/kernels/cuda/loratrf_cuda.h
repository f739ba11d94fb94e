// The operators of loratrf-deploy on CUDA: pointers, sizes, a stream. No CUDA header is needed to include this.
//
// Call, letters, layouts and meanings are those of kernels/loratrf.h; all tensors but adapter_ids are in device memory,
// and a CUDA graph keeps those ids that it was captured with. Sums are accumulated in float32 and y is rounded once.
// Nothing is allocated and the host never waits: a call only launches, once where one launch can hold the grid, so that
// it can be captured in a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../loratrf.h"

namespace loratrf {

// Highest R and F here: what a block's shared memory holds on every architecture.
constexpr int64_t kMaxCudaRank = 256;

// Loads the kernels for `type` into the current device, so that none is loaded while a CUDA graph is captured.
Status CudaLoad(Type type, Detail* detail);

// Bytes of memory that CudaRun needs on the device that the call's `base` is on, aligned to 16; often 0.
Status CudaScratchSize(const Call& call, size_t* bytes, Detail* detail);

// y = LoraTrf, or the half of it that the call has (see kernels/loratrf.h), on `stream` (a cudaStream_t) of the device
// that `base` is on, whichever is current. No tokens is kOk without a launch. kDevice also reports an earlier call's
// error that the device still holds.
Status CudaRun(const Call& call, void* scratch, void* stream, Detail* detail);

}  // namespace loratrf
