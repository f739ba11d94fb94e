// The operators' table: names and inputs, as the ONNX nodes have them.
#pragma once

#include <stddef.h>

#include <vector>

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
// Index of the input tau, which the filter's weights C and D follow.
size_t TauOf(Op op);
// A weight is a matrix among the inputs: all but base, x (or z), tau and adapter_ids.
bool IsWeight(const char* input);
// The one input that is int64.
bool IsAdapterIds(const char* input);

}  // namespace loratrf
