// What both bindings check before they call a kernel, and how both word it.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "kernels/loratrf.h"

namespace loratrf {

enum class Op : int { kLowRank, kTaskFilter, kLoraTrf };

struct OpInfo {
  const char* name;                 // the ONNX operator
  std::vector<const char*> inputs;  // in order; the first one is y's shape
};
const OpInfo& InfoOf(Op op);

using Shape = std::vector<int64_t>;

// The letters of a call; a half that the operator lacks has rank 0.
struct Dims {
  int64_t T = 0, K = 0, N = 0, R = 0, F = 0;
};

// Fills *dims from the inputs' shapes, in InfoOf(op)'s order. Returns "" or what doesn't fit, with every shape.
std::string CheckShapes(Op op, const std::vector<Shape>& shapes, Dims* dims);

// "adapted" or "base"; returns "" or what was wrong.
std::string ParseFilterInput(const std::string& text, FilterInput* out);

std::string Describe(const Shape& shape);  // (2, 3)
std::string Describe(Op op, Status status);

// The kernels of the environment variable LORATRF_ISA, or the best ones of this CPU. Returns "" or what was wrong.
std::string ChooseIsa(const Isa** isa);

// The tensors of a call, in InfoOf(op)'s order, and its kernel. packed may be null, or hold nulls.
Status Run(Op op, const Isa* isa, ParallelFor parallel, Type type, const Dims& dims, FilterInput filter_input,
           const void* const* tensors, const float* const* packed, void* y);

}  // namespace loratrf
