// Who does which tokens and columns: the tile plan, the split plan, packing, and the entry of each instruction set.
// Included by each isa_*.cc, in its own anonymous namespace (see lanes.h).
#pragma once

#include "fused.h"

// Runs body(i) for i in [0, count): in this thread where `serial`, else through the caller's parallel-for.
template <class Body>
void For(ParallelFor parallel, bool serial, int64_t count, Body& body) {
  if (serial || count == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  parallel.run(
      parallel.self, static_cast<size_t>(count),
      [](void* argument, size_t i) { (*static_cast<Body*>(argument))(static_cast<int64_t>(i)); }, &body);
}

template <class E>
void RunTiles(Work<E>& work, bool serial) {
  const Call& call = work.call;
  const int64_t tiles = RoundUp(CeilDiv(call.T, kTileTokens), serial ? 1 : 2);
  // Half types keep a tile's y in float32 until its one rounding; LowRank stores each piece at once.
  const int64_t tile_stride = IsFloat<E>::value ? 0 : work.filter() ? RoundUp(call.N, kColumns) : kColumns;
  auto body = [&](int64_t tile) {
    const int64_t t0 = call.T * tile / tiles, tokens = call.T * (tile + 1) / tiles - t0;
    if (!tokens) return;
    const int64_t block_size = IsFloat<E>::value ? 0 : tokens * kColumns;
    HostMemory scratch(
        ScratchSize(tokens * work.r_stride, tokens * work.f_stride, tokens * 2, block_size, tokens * tile_stride));
    if (!scratch) {
      __atomic_store_n(&work.failed, true, __ATOMIC_RELAXED);
      return;
    }
    const Floats u{scratch.Take<float>(tokens * work.r_stride), work.r_stride};
    const Floats v{scratch.Take<float>(tokens * work.f_stride), work.f_stride};
    float* sums = scratch.Take<float>(tokens * 2);
    float* block = scratch.Take<float>(block_size);
    const Floats y{scratch.Take<float>(tokens * tile_stride), tile_stride};
    Moments* moments = reinterpret_cast<Moments*>(sums);
    Zero(u.data, tokens * u.stride);
    Zero(v.data, tokens * v.stride);
    Zero(sums, tokens * 2);
    if (work.low_rank()) Reduce(work, t0, tokens, 0, call.K, block, u);
    if (work.filter()) {
      Forward(work, t0, tokens, 0, call.N, u, y, moments, v);
      Score(work, tokens, moments, v);
      Filter(work, t0, tokens, 0, call.N, v, y);
    } else {
      for (int64_t n0 = 0; n0 < call.N; n0 += kColumns) {
        Forward(work, t0, tokens, n0, Min(kColumns, call.N - n0), u, y, moments, v);
      }
    }
  };
  For(work.parallel, serial, tiles, body);
}

// to[i] += sum over pieces of from[piece * size + i].
inline void AddPieces(const float* from, int64_t pieces, int64_t size, float* to) {
  for (int64_t piece = 0; piece < pieces; ++piece, from += size) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
  }
}

// Columns in pieces of equal size, of whole panels.
struct Pieces {
  int64_t total, width, count;
  int64_t begin(int64_t piece) const { return piece * width; }
  int64_t size(int64_t piece) const { return Min(width, total - begin(piece)); }
};

inline Pieces PiecesOf(int64_t total) {
  if (total == 0) return {0, 0, 0};
  const int64_t width = RoundUp(CeilDiv(total, CeilDiv(total, kSplitColumns)), kPanel);
  return {total, width, CeilDiv(total, width)};
}

template <class E>
void RunSplit(Work<E>& work, bool serial) {
  const Call& call = work.call;
  const int64_t T = call.T, N = call.N;
  const Pieces k = PiecesOf(work.low_rank() ? call.K : 0), n = PiecesOf(N);
  const int64_t u_size = T * work.r_stride, v_size = T * work.f_stride, sums_size = T * 2;
  const int64_t block_size = IsFloat<E>::value ? 0 : T * kColumns;
  const int64_t tile_stride = IsFloat<E>::value ? 0 : RoundUp(N, kColumns);
  // Every piece has sums of its own, behind the total: added up in a fixed order.
  HostMemory scratch(ScratchSize(u_size * (k.count + 1), v_size * (n.count + 1), sums_size * (n.count + 1),
                                 block_size * k.count, T * tile_stride));
  if (!scratch) {
    work.failed = true;
    return;
  }
  const Floats u{scratch.Take<float>(u_size * (k.count + 1)), work.r_stride};
  const Floats v{scratch.Take<float>(v_size * (n.count + 1)), work.f_stride};
  float* sums = scratch.Take<float>(sums_size * (n.count + 1));
  float* blocks = scratch.Take<float>(block_size * k.count);
  const Floats y{scratch.Take<float>(T * tile_stride), tile_stride};
  Zero(u.data, u_size * (k.count + 1));
  Zero(v.data, v_size * (n.count + 1));
  Zero(sums, sums_size * (n.count + 1));
  if (work.low_rank()) {
    auto reduce = [&](int64_t piece) {
      Reduce(work, 0, T, k.begin(piece), k.size(piece), blocks + piece * block_size, u.from((piece + 1) * T, 0));
    };
    For(work.parallel, serial, k.count, reduce);
    AddPieces(u.row(T), k.count, u_size, u.data);
  }
  auto forward = [&](int64_t piece) {
    Forward(work, 0, T, n.begin(piece), n.size(piece), u, y.from(0, n.begin(piece)),
            reinterpret_cast<Moments*>(sums + (piece + 1) * sums_size), v.from((piece + 1) * T, 0));
  };
  For(work.parallel, serial, n.count, forward);
  if (!work.filter()) return;
  AddPieces(v.row(T), n.count, v_size, v.data);
  AddPieces(sums + sums_size, n.count, sums_size, sums);
  Score(work, T, reinterpret_cast<Moments*>(sums), v);
  auto filter = [&](int64_t piece) { Filter(work, 0, T, n.begin(piece), n.size(piece), v, y.from(0, n.begin(piece))); };
  For(work.parallel, serial, n.count, filter);
}

// A weight that the caller didn't pack, and where to pack it.
struct Unpacked {
  Weight* weight;
  int64_t rows, cols;
  float* out;
};

// Packs what the caller didn't, all panels in one parallel-for.
template <class E>
void PackWeights(ParallelFor parallel, bool serial, Unpacked* weights, int count) {
  int64_t tasks = 0;
  for (int i = 0; i < count; ++i) tasks += CeilDiv(weights[i].rows, kPanel);
  auto body = [&](int64_t task) {
    const Unpacked* unpacked = weights;
    for (int64_t panels; task >= (panels = CeilDiv(unpacked->rows, kPanel)); ++unpacked) task -= panels;
    const int64_t row = task * kPanel;
    PackPanel(static_cast<const E*>(unpacked->weight->data), unpacked->rows, unpacked->cols, row, 0, unpacked->cols,
              unpacked->out + row * unpacked->cols);
  };
  For(parallel, serial, tasks, body);
  for (int i = 0; i < count; ++i) weights[i].weight->packed = weights[i].out;
}

template <class E>
Status RunTyped(Call call, ParallelFor parallel) {
  const int64_t weight_size = call.R * (call.K + call.N) + 2 * call.F * call.N;
  const bool serial = call.T * weight_size < kSerialWork;
  // A weight that each task would pack anew is packed once before; one that is read once, where it is needed.
  const bool split = call.T <= kMaxDotTokens || (call.T <= kSplitTokens && !serial);

  Unpacked unpacked[4];
  int unpacked_count = 0;
  int64_t unpacked_size = 0;
  const auto want = [&](Weight* weight, int64_t rows, int64_t cols) {
    if (split || call.T <= kTileTokens || weight->packed || rows == 0 || cols == 0) return;
    unpacked[unpacked_count++] = {weight, rows, cols, nullptr};
    unpacked_size += ScratchSize(static_cast<int64_t>(PackedSize(rows, cols)));
  };
  want(&call.A, call.R, call.K);
  want(&call.B, call.R ? call.N : 0, call.R);
  want(&call.C, call.F, call.N);
  want(&call.D, call.F ? call.N : 0, call.F);

  const int64_t tau_size = call.F && !IsFloat<E>::value ? call.N : 0;
  HostMemory shared(unpacked_size + ScratchSize(tau_size));
  if (!shared) return Status::kOutOfMemory;
  for (int i = 0; i < unpacked_count; ++i) {
    unpacked[i].out = shared.Take<float>(static_cast<int64_t>(PackedSize(unpacked[i].rows, unpacked[i].cols)));
  }
  if (unpacked_count) PackWeights<E>(parallel, serial, unpacked, unpacked_count);

  Work<E> work{call, parallel, RoundUp(call.R, kLanes), RoundUp(call.F, kLanes), nullptr, 0.0f, false};
  if (call.F) {
    if constexpr (IsFloat<E>::value) {
      work.tau = static_cast<const float*>(call.tau);
    } else {
      float* widened = shared.Take<float>(tau_size);
      Convert(static_cast<const E*>(call.tau), widened, call.N);
      work.tau = widened;
    }
    Moments moments{};
    AddMoments({work.tau, call.N}, work.tau, 1, call.N, &moments);
    const float norm = __builtin_sqrtf(moments.square);
    work.tau_norm = norm > kEpsilon ? norm : kEpsilon;
  }
  if (split) {
    RunSplit(work, serial);
  } else {
    RunTiles(work, serial);
  }
  return work.failed ? Status::kOutOfMemory : Status::kOk;
}

Status RunCall(const Call& call, ParallelFor parallel) {
  switch (call.type) {
    case Type::kFloat32:
      return RunTyped<float>(call, parallel);
    case Type::kFloat16:
      return RunTyped<Half>(call, parallel);
    default:
      return RunTyped<BFloat16>(call, parallel);
  }
}

template <class E>
void PackAll(int64_t rows, int64_t cols, const void* weight, float* out) {
  for (int64_t row = 0; row < rows; row += kPanel) {
    PackPanel(static_cast<const E*>(weight), rows, cols, row, 0, cols, out + row * cols);
  }
}

void PackCall(Type type, int64_t rows, int64_t cols, const void* weight, float* out) {
  switch (type) {
    case Type::kFloat32:
      PackAll<float>(rows, cols, weight, out);
      break;
    case Type::kFloat16:
      PackAll<Half>(rows, cols, weight, out);
      break;
    case Type::kBFloat16:
      PackAll<BFloat16>(rows, cols, weight, out);
      break;
  }
}
