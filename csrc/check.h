// What both bindings check before they call a kernel, and how both word it.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "kernels/cuda/loratrf_cuda.h"
#include "kernels/loratrf.h"

namespace loratrf {

enum class Op : int { kLowRank, kTaskFilter, kLoraTrf, kGroupedLoraTrf };
constexpr Op kOps[] = {Op::kLowRank, Op::kTaskFilter, Op::kLoraTrf, Op::kGroupedLoraTrf};

struct OpInfo {
  const char* name;                 // the ONNX operator
  std::vector<const char*> inputs;  // in order; the first one is y's shape
};
const OpInfo& InfoOf(Op op);

// Whether the node has the attribute filter_input.
bool HasFilterInput(Op op);
// A weight is a matrix among the inputs: all but base, x (or z), tau and adapter_ids.
bool IsWeight(const char* input);
// The one input that is int64.
bool IsAdapterIds(const char* input);

using Shape = std::vector<int64_t>;

// The letters of a call; a half that the operator lacks has rank 0. A grouped call's T tokens are those of `batch`
// rows.
struct Dims {
  int64_t T = 0, K = 0, N = 0, R = 0, F = 0, S = 0, batch = 0;
};

// Fills *dims from the inputs' shapes, in InfoOf(op)'s order. Returns "" or what doesn't fit, with every shape.
std::string CheckShapes(Op op, const std::vector<Shape>& shapes, Dims* dims, int64_t max_rank = kMaxRank);

// "adapted" or "base"; returns "" or what was wrong.
std::string ParseFilterInput(Op op, const std::string& text, FilterInput* out);

std::string Describe(const Shape& shape);  // (2, 3)

// The kernels of the environment variable LORATRF_ISA, or the best ones of this CPU. Returns "" or what was wrong.
std::string ChooseIsa(const Isa** isa);

// The kernel on the tensors of a call, in InfoOf(op)'s order. packed may be null, or hold nulls. Returns kOk, or
// another status with *error saying what was wrong.
Status Run(Op op, const Isa* isa, ParallelFor parallel, Type type, const Dims& dims, FilterInput filter_input,
           const void* const* tensors, const float* const* packed, void* y, std::string* error);

#ifdef LORATRF_WITH_CUDA
// The same on CUDA's current device: all tensors but adapter_ids are there. allocate(self, bytes) lends the scratch,
// which the caller may give back, in the stream's order, as soon as this returns; null is kOutOfMemory.
struct Allocate {
  void* (*run)(void* self, size_t bytes);
  void* self;
};
Status RunOnCuda(Op op, Type type, const Dims& dims, FilterInput filter_input, const void* const* tensors, void* y,
                 Allocate allocate, void* stream, std::string* error);
#endif

}  // namespace loratrf
