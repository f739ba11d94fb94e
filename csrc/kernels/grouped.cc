// GroupedLoraTrf: every run of neighbouring rows with one adapter is a LoraTrf call with that slot's weights.
// Compiled for the baseline CPU; the instruction set does the calls.
#include <string.h>

#include "host_memory.h"
#include "isa.h"
#include "loratrf.h"

namespace loratrf {
namespace {

// Up to so many runs are called one after the other, each on all threads; more are shared out between the threads.
constexpr int64_t kFewRuns = 2;
// A shared-out run is cut into pieces, each of which packs the weights for itself. Most tokens of a piece: enough that
// packing is a small part; fewer in a call that would not give this many pieces. Both are fixed, so that results don't
// depend on the number of threads.
constexpr int64_t kPieceTokens = 128, kLeastPieceTokens = 24, kPieces = 32;

// Tokens [first, first + count) with the weights of `slot`, or base alone for -1.
struct Piece {
  int64_t first, count, slot;
};

struct Work {
  const Isa* isa;
  Call call;  // of the whole batch, with slot 0's weights
  int64_t element_size;
  const Piece* pieces;
  int status;  // a Status; the atomic store takes no enum

  const void* At(const void* tensor, int64_t elements) const {
    return tensor ? static_cast<const char*>(tensor) + elements * element_size : nullptr;
  }

  Status Compute(const Piece& piece, ParallelFor parallel) const {
    Call part = call;
    part.parallel = parallel;
    part.T = piece.count;
    part.base = At(call.base, piece.first * call.N);
    part.x = At(call.x, piece.first * call.K);
    part.y = const_cast<void*>(At(call.y, piece.first * call.N));
    if (piece.slot < 0 || (call.R == 0 && call.F == 0)) {
      if (part.y != part.base) memcpy(part.y, part.base, static_cast<size_t>(piece.count * call.N * element_size));
      return Status::kOk;
    }
    part.A.data = At(call.A.data, piece.slot * call.R * call.K);
    part.B.data = At(call.B.data, piece.slot * call.N * call.R);
    part.tau = At(call.tau, piece.slot * call.N);
    part.C.data = At(call.C.data, piece.slot * call.F * call.N);
    part.D.data = At(call.D.data, piece.slot * call.N * call.F);
    return isa->run(part);
  }
};

void RunSerially(void*, size_t count, void (*body)(void*, size_t), void* argument) {
  for (size_t i = 0; i < count; ++i) body(argument, i);
}

// Rows from `row` on that share its adapter.
int64_t RunLength(const int64_t* adapter_ids, int64_t batch, int64_t row) {
  int64_t end = row + 1;
  while (end < batch && adapter_ids[end] == adapter_ids[row]) ++end;
  return end - row;
}

// Cuts each run into equal pieces of at most piece_tokens and returns their number; pieces may be null, to count.
int64_t Cut(const int64_t* adapter_ids, int64_t batch, int64_t tokens, int64_t piece_tokens, Piece* pieces) {
  int64_t count = 0;
  for (int64_t row = 0, rows; row < batch; row += rows) {
    rows = RunLength(adapter_ids, batch, row);
    const int64_t run = rows * tokens, parts = (run + piece_tokens - 1) / piece_tokens;
    for (int64_t part = 0; part < parts; ++part, ++count) {
      const int64_t begin = run * part / parts, end = run * (part + 1) / parts;
      if (pieces) pieces[count] = {row * tokens + begin, end - begin, adapter_ids[row]};
    }
  }
  return count;
}

int64_t Clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

}  // namespace

Status GroupedLoraTrf(const Isa* isa, ParallelFor parallel, Type type, int64_t batch, int64_t tokens, int64_t K,
                      int64_t N, int64_t R, int64_t F, int64_t S, FilterInput filter_input, const void* base,
                      const void* x, const void* A, const void* B, const void* tau, const void* C, const void* D,
                      const int64_t* adapter_ids, void* y, int64_t* bad_row) {
  if (batch < 0 || tokens < 0 || K < 1 || N < 1 || R < 0 || F < 0 || S < 0) return Status::kBadSize;
  if (R > kMaxRank || F > kMaxRank) return Status::kRankTooHigh;
  if (batch && !adapter_ids) return Status::kNullPointer;
  for (int64_t row = 0; row < batch; ++row) {
    if (adapter_ids[row] >= -1 && adapter_ids[row] < S) continue;
    *bad_row = row;
    return Status::kBadAdapterId;
  }
  if (batch == 0 || tokens == 0) return Status::kOk;
  if (!base || !y) return Status::kNullPointer;
  if (S && R && !(x && A && B)) return Status::kNullPointer;
  if (S && F && !(tau && C && D)) return Status::kNullPointer;

  const int64_t T = batch * tokens;
  const Call call{type,         filter_input, T, K,       N, R, F, base, x, tau, {A, nullptr}, {B, nullptr},
                  {C, nullptr}, {D, nullptr}, y, parallel};
  Work work{isa, call, type == Type::kFloat32 ? 4 : 2, nullptr, 0};

  const int64_t runs = Cut(adapter_ids, batch, tokens, T, nullptr);
  const bool few = runs <= kFewRuns;
  const int64_t piece_tokens = few ? T : Clamp(T / kPieces, kLeastPieceTokens, kPieceTokens);
  const int64_t count = few ? runs : Cut(adapter_ids, batch, tokens, piece_tokens, nullptr);
  HostMemory memory(HostMemory::Size<Piece>(count));
  if (!memory) return Status::kOutOfMemory;
  Piece* pieces = memory.Take<Piece>(count);
  Cut(adapter_ids, batch, tokens, piece_tokens, pieces);
  work.pieces = pieces;

  if (few) {
    for (int64_t i = 0; i < count && !work.status; ++i) {
      work.status = static_cast<int>(work.Compute(pieces[i], parallel));
    }
  } else {
    const bool serial = T * (R * (K + N) + 2 * F * N) < kSerialWork;
    (serial ? RunSerially : parallel.run)(
        parallel.self, static_cast<size_t>(count),
        [](void* argument, size_t i) {
          Work* shared = static_cast<Work*>(argument);
          const int status = static_cast<int>(shared->Compute(shared->pieces[i], {RunSerially, nullptr}));
          if (status) __atomic_store_n(&shared->status, status, __ATOMIC_RELAXED);
        },
        &work);
  }
  return static_cast<Status>(work.status);
}

}  // namespace loratrf
