// The operators, fused: every token's y is made in one or two visits while it is in the cache.
//
// Included by each isa_*.cc, in its own anonymous namespace (see lanes.h). Two plans:
//   tiles   many tokens: each task takes some tokens through all three steps
//   split   few tokens, so that reading the weights is what takes time: each step is one parallel-for over the weights
// The steps: Reduce u = x A^T; Forward y = base + u B^T with <z,z>, <z,tau> and z C^T on the way; Filter y += (s z C^T)
// D^T. Pieces have fixed sizes, so results don't depend on the number of threads.
#pragma once

#include "gemm.h"

constexpr int64_t kColumns = 256;  // columns of x or y at a time: weights' panel and y's tile share the L1/L2 cache
constexpr int64_t kSplitColumns = 512;  // most columns per task of the split plan
constexpr int64_t kSplitTokens = 32;    // most tokens that the split plan takes
constexpr int64_t kTileTokens = 24;     // most tokens per tile
static_assert(kColumns % kPanel == 0 && kSplitColumns % kColumns == 0, "pieces are whole panels");

// Bytes of scratch for so many floats each.
template <class... Counts>
int64_t ScratchSize(Counts... floats) {
  return (HostMemory::Size<float>(floats) + ...);
}

inline void Zero(float* to, int64_t count) { memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

// A call, with everything that its tasks share.
template <class E>
struct Work {
  const Call& call;
  int64_t r_stride, f_stride;  // of u and v rows: ranks rounded up to whole vectors
  const float* tau;            // (N), widened
  float tau_norm;              // max(|tau|, eps)
  bool failed;                 // a task found no memory

  bool low_rank() const { return call.R > 0; }
  bool filter() const { return call.F > 0; }
};

// Running sums of one token's filter: <z,z> and <z,tau>.
struct Moments {
  float square, along;
};

// out = src + in W^T over rows [first_row, +count) and k's [k0, +depth) of w (rows, cols), in the form that suits.
template <class E>
void Product(const Weight& w, int64_t rows, int64_t cols, int64_t first_row, int64_t count, int64_t k0, int64_t depth,
             int64_t tokens, const float* in, int64_t in_stride, const float* src, int64_t src_stride, float* out,
             int64_t out_stride, bool padded) {
  const E* data = static_cast<const E*>(w.data);
  if (w.packed) {
    const Stretch stretch{w.packed, rows, cols, first_row, count, k0, depth};
    Gemm(stretch, tokens, in, in_stride, src, src_stride, out, out_stride, padded);
  } else if (tokens <= kMaxDotTokens) {
    const RawStretch<E> stretch{data, rows, cols, first_row, count, k0, depth};
    Dots(stretch, tokens, in, in_stride, src, src_stride, out, out_stride);
  } else {
    const RawStretch<E> stretch{data, rows, cols, first_row, count, k0, depth};
    PackingGemm(stretch, tokens, in, in_stride, src, src_stride, out, out_stride, padded);
  }
}

// u (tokens, r_stride) += x[:, k0:k0+depth] A[:, k0:k0+depth]^T. block: (tokens, kColumns), for half types.
template <class E>
void Reduce(const Work<E>& work, int64_t t0, int64_t tokens, int64_t k0, int64_t depth, float* block, float* u) {
  const Call& call = work.call;
  // Few tokens of float32 have nothing to keep in a cache: long runs through the weight are what counts.
  const int64_t step = IsFloat<E>::value && tokens <= kMaxDotTokens ? depth : kColumns;
  for (int64_t end = k0 + depth; k0 < end; k0 += step) {
    const int64_t count = Min(step, end - k0);
    const E* x = static_cast<const E*>(call.x) + t0 * call.K + k0;
    const float* in;
    int64_t stride;
    if constexpr (IsFloat<E>::value) {
      in = x, stride = call.K;
    } else {
      for (int64_t t = 0; t < tokens; ++t) Convert(x + t * call.K, block + t * kColumns, count);
      in = block, stride = kColumns;
    }
    Product<E>(call.A, call.R, call.K, 0, call.R, k0, count, tokens, in, stride, u, work.r_stride, u, work.r_stride,
               true);
  }
}

// Adds <z,z> and <z,tau> over columns [n0, n0+count) to the moments.
inline void AddMoments(const float* z, int64_t stride, const float* tau, int64_t tokens, int64_t count,
                       Moments* moments) {
  for (int64_t t = 0; t < tokens; ++t, z += stride) {
    Vec square[2] = {}, along[2] = {};
    int64_t n = 0;
    for (; n + 2 * kLanes <= count; n += 2 * kLanes) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vec value = Load(z + n + i * kLanes);
        square[i] += value * value;
        along[i] += value * Load(tau + n + i * kLanes);
      }
    }
    for (; n < count; n += kLanes) {
      const int64_t part = Min(kLanes, count - n);
      const Vec value = LoadPart(z + n, part);
      square[0] += value * value;
      along[0] += value * LoadPart(tau + n, part);
    }
    moments[t].square += Sum(square[0] + square[1]);
    moments[t].along += Sum(along[0] + along[1]);
  }
}

// y = base + u B^T over columns [n0, n0+count), with the filter's sums over the same columns. `tile` is where half
// types keep y in float32: (tokens, tile_stride), its column 0 being column n0.
template <class E>
void Forward(const Work<E>& work, int64_t t0, int64_t tokens, int64_t n0, int64_t count, const float* u, float* tile,
             int64_t tile_stride, Moments* moments, float* v) {
  const Call& call = work.call;
  const int64_t N = call.N;
  for (int64_t end = n0 + count; n0 < end; n0 += kColumns, tile += kColumns) {
    const int64_t width = Min(kColumns, end - n0);
    const E* base = static_cast<const E*>(call.base) + t0 * N + n0;
    const float* z;
    float* y;
    int64_t stride;
    if constexpr (IsFloat<E>::value) {
      z = base, y = static_cast<float*>(call.y) + t0 * N + n0, stride = N;
    } else {
      for (int64_t t = 0; t < tokens; ++t) Convert(base + t * N, tile + t * tile_stride, width);
      z = y = tile, stride = tile_stride;
    }
    const auto gather = [&] {
      AddMoments(z, stride, work.tau + n0, tokens, width, moments);
      Product<E>(call.C, call.F, N, 0, call.F, n0, width, tokens, z, stride, v, work.f_stride, v, work.f_stride, true);
    };
    const bool from_base = !work.low_rank() || call.filter_input == FilterInput::kBase;
    if (work.filter() && from_base) gather();
    if (work.low_rank()) {
      Product<E>(call.B, N, call.R, n0, width, 0, call.R, tokens, u, work.r_stride, z, stride, y, stride, false);
      z = y;
    }
    if (work.filter() && !from_base) gather();
    if constexpr (!IsFloat<E>::value) {
      if (!work.filter()) {
        E* out = static_cast<E*>(call.y) + t0 * N + n0;
        for (int64_t t = 0; t < tokens; ++t) Convert(tile + t * tile_stride, out + t * N, width);
      }
    }
  }
}

// v *= s, token by token.
template <class E>
void Score(const Work<E>& work, int64_t tokens, const Moments* moments, float* v) {
  for (int64_t t = 0; t < tokens; ++t, v += work.f_stride) {
    const float norm = __builtin_sqrtf(moments[t].square);
    const float cosine = moments[t].along / ((norm > kEpsilon ? norm : kEpsilon) * work.tau_norm);
    const float score = cosine < 0.0f ? 0.0f : cosine > 1.0f ? 1.0f : cosine;  // a NaN stays a NaN
    for (int64_t f = 0; f < work.f_stride; ++f) v[f] *= score;
  }
}

// y += v D^T over columns [n0, n0+count); v has been scored. tile as in Forward.
template <class E>
void Filter(const Work<E>& work, int64_t t0, int64_t tokens, int64_t n0, int64_t count, const float* v, float* tile,
            int64_t tile_stride) {
  const Call& call = work.call;
  const int64_t N = call.N;
  for (int64_t end = n0 + count; n0 < end; n0 += kColumns, tile += kColumns) {
    const int64_t width = Min(kColumns, end - n0);
    E* y = static_cast<E*>(call.y) + t0 * N + n0;
    if constexpr (IsFloat<E>::value) {
      const float* src = work.low_rank() ? y : static_cast<const float*>(call.base) + t0 * N + n0;
      Product<E>(call.D, N, call.F, n0, width, 0, call.F, tokens, v, work.f_stride, src, N, y, N, false);
    } else {
      Product<E>(call.D, N, call.F, n0, width, 0, call.F, tokens, v, work.f_stride, tile, tile_stride, tile,
                 tile_stride, false);
      for (int64_t t = 0; t < tokens; ++t) Convert(tile + t * tile_stride, y + t * N, width);
    }
  }
}
