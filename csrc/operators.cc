#include "operators.h"

#include <string.h>

namespace loratrf {

const OpInfo& InfoOf(Op op) {
  static const OpInfo kInfos[] = {
      {"LowRank", {"base", "x", "A", "B"}},
      {"TaskFilter", {"z", "tau", "C", "D"}},
      {"LoraTrf", {"base", "x", "A", "B", "tau", "C", "D"}},
      {"GroupedLoraTrf", {"base", "x", "A", "B", "tau", "C", "D", "adapter_ids"}},
  };
  return kInfos[static_cast<int>(op)];
}

bool HasFilterInput(Op op) { return op == Op::kLoraTrf || op == Op::kGroupedLoraTrf; }

size_t TauOf(Op op) { return op == Op::kTaskFilter ? 1 : 4; }

bool IsWeight(const char* input) { return input[1] == '\0' && input[0] >= 'A' && input[0] <= 'D'; }

bool IsAdapterIds(const char* input) { return strcmp(input, "adapter_ids") == 0; }

}  // namespace loratrf
