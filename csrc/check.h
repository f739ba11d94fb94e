// What both bindings check before they call a kernel, and how both word it.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "kernels/loratrf.h"
#include "operators.h"

namespace loratrf {

// What was wrong, for a binding to raise as its host does; false as a bool if nothing was.
struct Fault {
  Status status = Status::kOk;
  std::string message;  // whole sentences, with the operator's name

  explicit operator bool() const { return status != Status::kOk; }
};

using Shape = std::vector<int64_t>;

// An input of a node, as a binding lends it.
struct Input {
  Shape shape;
  const void* data = nullptr;
  const float* packed = nullptr;  // of a weight, where the binding packed it; then data may be null
};

// Fills the call's sizes from the node's inputs, in InfoOf(op)'s order; a half that op lacks keeps rank 0. What doesn't
// fit comes back with every shape.
Fault CheckShapes(Op op, const std::vector<Input>& inputs, int64_t max_rank, Call* call);

// "adapted" or "base".
Fault ParseFilterInput(Op op, const std::string& text, FilterInput* out);

std::string Describe(const Shape& shape);  // (2, 3)

}  // namespace loratrf
