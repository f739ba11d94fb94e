// What a call must be before a kernel reads it, on the CPU and on CUDA alike.
//
// In an unnamed namespace: tests compile the CUDA half without the CPU's.
#pragma once

#include "loratrf.h"

namespace loratrf {
namespace {

// Sizes and adapter ids; the pointers to them, but adapter_ids, are CheckTensors'.
inline Status CheckCall(const Call& call, int64_t max_rank, Detail* detail) {
  const bool grouped = call.adapter_ids || call.batch == 0;  // without rows there may be no ids to point to
  if (call.T < 0 || call.K < 0 || call.N < 1 || call.R < 0 || call.F < 0) return Status::kBadSize;
  if (call.S < 0 || call.batch < 0 || (call.R && call.K < 1)) return Status::kBadSize;
  if (call.batch ? call.T % call.batch : call.T) return Status::kBadSize;
  if (!grouped && (call.batch != 1 || call.S != 1 || call.R + call.F < 1)) return Status::kBadSize;
  if (call.R > max_rank || call.F > max_rank) return Status::kRankTooHigh;
  for (int64_t row = 0; grouped && row < call.batch; ++row) {
    if (call.adapter_ids[row] >= -1 && call.adapter_ids[row] < call.S) continue;
    detail->bad_row = row;
    return Status::kBadAdapterId;
  }
  return Status::kOk;
}

// The tensors of a call that has tokens; `packed` says that the kernel takes packed weights.
inline Status CheckTensors(const Call& call, bool packed) {
  const auto has = [&](const Weight& weight) { return weight.data || (packed && weight.packed); };
  if (!call.base || !call.y) return Status::kNullPointer;
  if (call.S && call.R && !(call.x && has(call.A) && has(call.B))) return Status::kNullPointer;
  if (call.S && call.F && !(call.tau && has(call.C) && has(call.D))) return Status::kNullPointer;
  return Status::kOk;
}

// Tokens of a batch row.
inline int64_t RowTokens(const Call& call) { return call.batch ? call.T / call.batch : 0; }

}  // namespace
}  // namespace loratrf
