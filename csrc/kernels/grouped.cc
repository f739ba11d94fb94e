// GroupedLoraTrf: every run of neighbouring rows with one adapter is a LoraTrf call with that slot's weights.
// Compiled for the baseline CPU; the instruction set does the calls.
#include <string.h>

#include "check_call.h"
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

// A call, with what its pieces share.
struct Job {
  const Isa* isa;
  const Call& call;
  const Piece* pieces;
  int status;  // a Status; the atomic store takes no enum

  int64_t Bytes(int64_t elements) const { return elements * (call.type == Type::kFloat32 ? 4 : 2); }

  const void* At(const void* tensor, int64_t elements) const {
    return tensor ? static_cast<const char*>(tensor) + Bytes(elements) : nullptr;
  }

  // The piece as a call of its own, with its slot's weights.
  Call Part(const Piece& piece) const {
    Call part = call;
    part.T = piece.count;
    part.S = part.batch = 1;
    part.adapter_ids = nullptr;
    part.base = At(call.base, piece.first * call.N);
    part.x = At(call.x, piece.first * call.K);
    part.y = const_cast<void*>(At(call.y, piece.first * call.N));
    if (piece.slot < 0) return part;
    part.A = {At(call.A.data, piece.slot * call.R * call.K), nullptr};
    part.B = {At(call.B.data, piece.slot * call.N * call.R), nullptr};
    part.tau = At(call.tau, piece.slot * call.N);
    part.C = {At(call.C.data, piece.slot * call.F * call.N), nullptr};
    part.D = {At(call.D.data, piece.slot * call.N * call.F), nullptr};
    return part;
  }

  Status Compute(const Piece& piece, ParallelFor parallel) const {
    const Call part = Part(piece);
    if (piece.slot >= 0 && (call.R || call.F)) return isa->run(part, parallel);
    if (part.y != part.base) memcpy(part.y, part.base, static_cast<size_t>(Bytes(piece.count * call.N)));
    return Status::kOk;
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

Status RunGrouped(const Isa* isa, ParallelFor parallel, const Call& call) {
  const int64_t* ids = call.adapter_ids;
  const int64_t T = call.T, batch = call.batch, tokens = RowTokens(call);
  const int64_t runs = Cut(ids, batch, tokens, T, nullptr);
  const bool few = runs <= kFewRuns;
  const int64_t piece_tokens = few ? T : Clamp(T / kPieces, kLeastPieceTokens, kPieceTokens);
  const int64_t count = few ? runs : Cut(ids, batch, tokens, piece_tokens, nullptr);
  HostMemory memory(HostMemory::Size<Piece>(count));
  if (!memory) return Status::kOutOfMemory;
  Piece* pieces = memory.Take<Piece>(count);
  Cut(ids, batch, tokens, piece_tokens, pieces);

  Job job{isa, call, pieces, 0};
  if (few) {
    for (int64_t i = 0; i < count && !job.status; ++i) {
      job.status = static_cast<int>(job.Compute(pieces[i], parallel));
    }
  } else {
    const bool serial = T * (call.R * (call.K + call.N) + 2 * call.F * call.N) < kSerialWork;
    (serial ? RunSerially : parallel.run)(
        parallel.self, static_cast<size_t>(count),
        [](void* argument, size_t i) {
          Job* shared = static_cast<Job*>(argument);
          const int status = static_cast<int>(shared->Compute(shared->pieces[i], {RunSerially, nullptr}));
          if (status) __atomic_store_n(&shared->status, status, __ATOMIC_RELAXED);
        },
        &job);
  }
  return static_cast<Status>(job.status);
}

}  // namespace loratrf
