// From a binding's inputs to a kernel: one Call, filled once, and what went wrong in words.
#pragma once

#include <stddef.h>

#include "check.h"

namespace loratrf {

// The kernels of the environment variable LORATRF_ISA, or the best ones of this CPU.
Fault ChooseIsa(const Isa** isa);

// Fills the call's sizes and tensors from the node's inputs, in InfoOf(op)'s order, if they fit each other. Its type,
// filter_input and y are the binding's to fill.
Fault FillCall(Op op, const std::vector<Input>& inputs, int64_t max_rank, Call* call);

// The kernel on such a call.
Fault Run(Op op, const Isa* isa, ParallelFor parallel, const Call& call);

#ifdef LORATRF_WITH_CUDA
// Loads the kernels of `op` for `type` into CUDA's current device.
Fault LoadOnCuda(Op op, Type type);

// Bytes of scratch that RunOnCuda needs on the tensors' device, often 0: the binding borrows them from its host.
Fault ScratchOnCuda(Op op, const Call& call, size_t* bytes);

// The same as Run on CUDA's current device, where all tensors but adapter_ids and the scratch are. The scratch may be
// given back, in the stream's order, as soon as this returns.
Fault RunOnCuda(Op op, const Call& call, void* scratch, void* stream);
#endif

}  // namespace loratrf
