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
  ParallelFor parallel;
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

// A (T,cols) tensor of the call, from (t0, column) on.
template <class E>
View<const E> From(const void* tensor, int64_t cols, int64_t t0, int64_t column) {
  return View<const E>{static_cast<const E*>(tensor), cols}.from(t0, column);
}

template <class E>
View<E> From(void* tensor, int64_t cols, int64_t t0, int64_t column) {
  return View<E>{static_cast<E*>(tensor), cols}.from(t0, column);
}

// Half types' first `count` columns into float32, and back; returns where they are now.
template <class E>
Floats Widen(View<const E> from, int64_t tokens, int64_t count, Floats to) {
  for (int64_t t = 0; t < tokens; ++t) Convert(from.row(t), to.row(t), count);
  return to;
}

template <class E>
void Round(ConstFloats from, int64_t tokens, int64_t count, View<E> to) {
  for (int64_t t = 0; t < tokens; ++t) Convert(from.row(t), to.row(t), count);
}

// out = src + in W^T over a stretch of the weight, in the form that suits.
template <class E>
void Product(ConstFloats in, ConstFloats src, Floats out, const Weight& weight, const Stretch& stretch, int64_t tokens,
             bool padded) {
  const E* data = static_cast<const E*>(weight.data);
  if (weight.packed) {
    Gemm(in, src, out, weight.packed, stretch, tokens, padded);
  } else if (tokens <= kMaxDotTokens) {
    Dots(in, src, out, data, stretch, tokens);
  } else {
    PackingGemm(in, src, out, data, stretch, tokens, padded);
  }
}

// u (tokens,R) += x[:, k0:k0+depth] A[:, k0:k0+depth]^T. block: (tokens,kColumns), where half types are widened.
template <class E>
void Reduce(const Work<E>& work, int64_t t0, int64_t tokens, int64_t k0, int64_t depth, float* block, Floats u) {
  const Call& call = work.call;
  // Few tokens of float32 have nothing to keep in a cache: long runs through the weight are what counts.
  const int64_t step = IsFloat<E>::value && tokens <= kMaxDotTokens ? depth : kColumns;
  for (int64_t end = k0 + depth; k0 < end; k0 += step) {
    const int64_t count = Min(step, end - k0);
    const View<const E> x = From<E>(call.x, call.K, t0, k0);
    ConstFloats in;
    if constexpr (IsFloat<E>::value) {
      in = x;
    } else {
      in = Widen(x, tokens, count, {block, kColumns});
    }
    Product<E>(in, u, u, call.A, {call.R, call.K, 0, call.R, k0, count}, tokens, true);
  }
}

// Adds <z,z> and <z,tau> over the first `count` columns to the tokens' moments.
inline void AddMoments(ConstFloats rows, const float* tau, int64_t tokens, int64_t count, Moments* moments) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* z = rows.row(t);
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
// types keep y in float32, its column 0 being column n0; v (tokens,F).
template <class E>
void Forward(const Work<E>& work, int64_t t0, int64_t tokens, int64_t n0, int64_t count, ConstFloats u, Floats tile,
             Moments* moments, Floats v) {
  const Call& call = work.call;
  const int64_t N = call.N;
  for (int64_t end = n0 + count; n0 < end; n0 += kColumns, tile.data += kColumns) {
    const int64_t width = Min(kColumns, end - n0);
    const View<const E> base = From<E>(call.base, N, t0, n0);
    const View<E> out = From<E>(call.y, N, t0, n0);
    ConstFloats z;
    Floats y;
    if constexpr (IsFloat<E>::value) {
      z = base, y = out;
    } else {
      z = y = Widen(base, tokens, width, tile);
    }
    const auto gather = [&] {
      AddMoments(z, work.tau + n0, tokens, width, moments);
      Product<E>(z, v, v, call.C, {call.F, N, 0, call.F, n0, width}, tokens, true);
    };
    const bool from_base = !work.low_rank() || call.filter_input == FilterInput::kBase;
    if (work.filter() && from_base) gather();
    if (work.low_rank()) {
      Product<E>(u, z, y, call.B, {N, call.R, n0, width, 0, call.R}, tokens, false);
      z = y;
    }
    if (work.filter() && !from_base) gather();
    if constexpr (!IsFloat<E>::value) {
      if (!work.filter()) Round(tile, tokens, width, out);
    }
  }
}

// v *= s, token by token.
template <class E>
void Score(const Work<E>& work, int64_t tokens, const Moments* moments, Floats v) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float norm = __builtin_sqrtf(moments[t].square);
    const float cosine = moments[t].along / ((norm > kEpsilon ? norm : kEpsilon) * work.tau_norm);
    const float score = cosine < 0.0f ? 0.0f : cosine > 1.0f ? 1.0f : cosine;  // a NaN stays a NaN
    for (int64_t f = 0; f < v.stride; ++f) v.row(t)[f] *= score;
  }
}

// y += v D^T over columns [n0, n0+count); v has been scored. tile as in Forward.
template <class E>
void Filter(const Work<E>& work, int64_t t0, int64_t tokens, int64_t n0, int64_t count, ConstFloats v, Floats tile) {
  const Call& call = work.call;
  const int64_t N = call.N;
  for (int64_t end = n0 + count; n0 < end; n0 += kColumns, tile.data += kColumns) {
    const int64_t width = Min(kColumns, end - n0);
    const Stretch stretch{N, call.F, n0, width, 0, call.F};
    const View<E> y = From<E>(call.y, N, t0, n0);
    if constexpr (IsFloat<E>::value) {
      const ConstFloats src = work.low_rank() ? y : From<E>(call.base, N, t0, n0);
      Product<E>(v, src, y, call.D, stretch, tokens, false);
    } else {
      Product<E>(v, tile, tile, call.D, stretch, tokens, false);
      Round(tile, tokens, width, y);
    }
  }
}
