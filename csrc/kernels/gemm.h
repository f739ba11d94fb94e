// out(t, row) = src(t, row) + sum_k in(t, k) W(row, k): the one product behind all four weights of an adapter.
//
// Included by each isa_*.cc, in its own anonymous namespace (see lanes.h). Three forms: Gemm on packed weights, blocked
// in registers over tokens and rows; PackingGemm on weights as they are, for one use; Dots on weights as they are, for
// so few tokens that reading the weight is all that counts.
//
// Packed layout: rows in panels of kPanel; a panel holds, for each k, its rows side by side, the last panel's padded
// with zeros to whole vectors. Panel p starts at p * kPanel * cols.
#pragma once

#include "lanes.h"

// Rows of a matrix, `stride` elements apart.
template <class E>
struct View {
  E* data;
  int64_t stride;

  E* row(int64_t t) const { return data + t * stride; }
  // The view whose first element is (row, column).
  View from(int64_t t, int64_t column) const { return {row(t) + column, stride}; }
  operator View<const E>() const { return {data, stride}; }
};
// Where a product takes views, they come first: three of them are just the registers that a call has for arguments.
using ConstFloats = View<const float>;
using Floats = View<float>;

#if LORATRF_LANES == 4
constexpr int kPanelVecs = 4;
#else
constexpr int kPanelVecs = 2;
#endif
constexpr int kPanel = kPanelVecs * kLanes;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;  // of 32 registers
#else
constexpr int kAccumulators = 12;  // of 16
#endif
// Eight independent chains hide the latency of a multiply-add; more rows would only run out of address registers.
constexpr int kMaxTokens = 8;
constexpr int TokensAtOnce(int vecs) { return kAccumulators / vecs < kMaxTokens ? kAccumulators / vecs : kMaxTokens; }

inline int64_t PanelVecs(int64_t rows, int64_t first_row) { return Min(kPanelVecs, CeilDiv(rows - first_row, kLanes)); }

size_t PackedSize(int64_t rows, int64_t cols) { return static_cast<size_t>(RoundUp(rows, kLanes) * cols); }

// out: depth rows of `width` floats, out[k][row] = w[row][k] for row < valid, 0 beyond.
inline void PackFloats(ConstFloats w, int64_t valid, int64_t width, int64_t depth, float* out) {
  const int64_t whole = depth / 4 * 4;
  int64_t row = 0;
  for (; row + 4 <= valid; row += 4) {
    const float* from = w.row(row);
    float* to = out + row;
    for (int64_t k = 0; k < whole; k += 4, from += 4, to += 4 * width) {
      Vec4 part[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) part[i] = *reinterpret_cast<const LooseVec4*>(from + i * w.stride);
      Transpose(part[0], part[1], part[2], part[3]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) *reinterpret_cast<LooseVec4*>(to + i * width) = part[i];
    }
    for (int64_t k = whole; k < depth; ++k) {
      for (int i = 0; i < 4; ++i) out[k * width + row + i] = w.row(row + i)[k];
    }
  }
  for (; row < width; ++row) {
    for (int64_t k = 0; k < depth; ++k) out[k * width + row] = row < valid ? w.row(row)[k] : 0.0f;
  }
}

// Packs k's [k0, k0 + depth) of the panel that starts at first_row of w (rows, cols).
template <class E>
void PackPanel(const E* w, int64_t rows, int64_t cols, int64_t first_row, int64_t k0, int64_t depth, float* out) {
  const int64_t width = PanelVecs(rows, first_row) * kLanes;
  const int64_t valid = Min(width, rows - first_row);
  w += first_row * cols + k0;
  if constexpr (IsFloat<E>::value) {
    PackFloats({w, cols}, valid, width, depth, out);
  } else {
    constexpr int64_t kStep = 64;
    alignas(64) float block[kPanel * kStep];
    for (int64_t done = 0; done < depth; done += kStep) {
      const int64_t count = Min(kStep, depth - done);
      for (int64_t row = 0; row < valid; ++row) Convert(w + row * cols + done, block + row * kStep, count);
      PackFloats({block, kStep}, valid, width, count, out + done * width);
    }
  }
}

// `tokens` rows of in by `panels` whole panels of `vecs` vectors, one register block after the other.
template <int tokens, int vecs>
void Block(ConstFloats in, ConstFloats src, Floats out, const float* panel, int64_t panel_stride, int64_t panels,
           int64_t depth) {
  for (; panels > 0; --panels, panel += panel_stride, src.data += vecs * kLanes, out.data += vecs * kLanes) {
    Vec sum[tokens][vecs];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) sum[t][v] = Load(src.row(t) + v * kLanes);
    }
    for (int64_t k = 0; k < depth; ++k) {
      Vec weight[vecs];
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) weight[v] = Load(panel + (k * vecs + v) * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const Vec value = Splat(in.row(t)[k]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) sum[t][v] += value * weight[v];
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) Store(out.row(t) + v * kLanes, sum[t][v]);
    }
  }
}

// One token: four independent sums per vector keep the multiply-adds from waiting for each other.
template <int vecs>
void Line(ConstFloats in, ConstFloats src, Floats out, const float* panel, int64_t panel_stride, int64_t panels,
          int64_t depth) {
  constexpr int kWays = 4;
  for (; panels > 0; --panels, panel += panel_stride, src.data += vecs * kLanes, out.data += vecs * kLanes) {
    Vec sum[kWays][vecs] = {};
    int64_t k = 0;
    for (; k + kWays <= depth; k += kWays) {
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) {
        const Vec value = Splat(in.data[k + way]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) sum[way][v] += value * Load(panel + ((k + way) * vecs + v) * kLanes);
      }
    }
    for (; k < depth; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) sum[0][v] += Splat(in.data[k]) * Load(panel + (k * vecs + v) * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      const Vec total = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
      Store(out.data + v * kLanes, Load(src.data + v * kLanes) + total);
    }
  }
}

typedef void (*BlockFn)(ConstFloats in, ConstFloats src, Floats out, const float* panel, int64_t panel_stride,
                        int64_t panels, int64_t depth);

template <int vecs, int tokens = TokensAtOnce(vecs)>
BlockFn PickBlock(int64_t wanted) {
  if constexpr (tokens > 1) {
    if (wanted < tokens) return PickBlock<vecs, tokens - 1>(wanted);
    return Block<tokens, vecs>;
  } else {
    return Line<vecs>;
  }
}

inline BlockFn PickBlock(int64_t vecs, int64_t tokens) {
#if LORATRF_LANES == 4
  if (vecs == 4) return PickBlock<4>(tokens);
  if (vecs == 3) return PickBlock<3>(tokens);
#endif
  return vecs == 2 ? PickBlock<2>(tokens) : PickBlock<1>(tokens);
}

// A stretch of a weight: rows [first_row, first_row + count), k's [k0, k0 + depth).
struct Stretch {
  int64_t rows, cols;        // of the whole weight
  int64_t first_row, count;  // first_row is a multiple of kPanel
  int64_t k0, depth;
};

// The panels from `row` of the stretch on that have `vecs` vectors each; src and out already point at that row.
void GemmPanels(ConstFloats in, ConstFloats src, Floats out, const float* packed, const Stretch& w, int64_t row,
                int64_t vecs, int64_t panels, int64_t tokens) {
  const float* panel = packed + (w.first_row + row) * w.cols + w.k0 * vecs * kLanes;
  const int64_t groups = CeilDiv(tokens, TokensAtOnce(static_cast<int>(vecs)));
  for (int64_t t = 0, group = 0; group < groups; ++group) {
    // Equal shares: 8 tokens go as 4 + 4, not 6 + 2.
    const int64_t share = CeilDiv(tokens - t, groups - group);
    PickBlock(vecs, share)(in.from(t, 0), src.from(t, 0), out.from(t, 0), panel, kPanel * w.cols, panels, w.depth);
    t += share;
  }
}

// out(t, i) = src(t, i) + sum_k in(t, k) W(first_row + i, k0 + k) for i < count and t < tokens. `padded` says that src
// and out have whole vectors behind row count - 1 (and the result there is src's).
void Gemm(ConstFloats in, ConstFloats src, Floats out, const float* packed, const Stretch& w, int64_t tokens,
          bool padded) {
  const int64_t whole = w.count / kPanel, rest = w.count % kPanel;
  if (whole) GemmPanels(in, src, out, packed, w, 0, kPanelVecs, whole, tokens);
  if (!rest) return;
  const int64_t row = whole * kPanel;
  const int64_t vecs = PanelVecs(w.rows, w.first_row + row);
  src = src.from(0, row), out = out.from(0, row);
  if (padded || rest == vecs * kLanes) {
    GemmPanels(in, src, out, packed, w, row, vecs, 1, tokens);
    return;
  }
  alignas(64) float edge[kMaxTokens][kPanel] = {};
  const size_t bytes = static_cast<size_t>(rest) * sizeof(float);
  for (int64_t t = 0; t < tokens; t += kMaxTokens) {
    const int64_t share = Min(kMaxTokens, tokens - t);
    for (int64_t i = 0; i < share; ++i) memcpy(edge[i], src.row(t + i), bytes);
    GemmPanels(in.from(t, 0), ConstFloats{edge[0], kPanel}, Floats{edge[0], kPanel}, packed, w, row, vecs, 1, share);
    for (int64_t i = 0; i < share; ++i) memcpy(out.row(t + i), edge[i], bytes);
  }
}

// As Gemm, packing what it needs as it goes: for weights that are read once, so that what is packed stays in the L1
// cache. src may be out.
template <class E>
void PackingGemm(ConstFloats in, ConstFloats src, Floats out, const E* data, const Stretch& w, int64_t tokens,
                 bool padded) {
  constexpr int64_t kDepth = 256;
  alignas(64) float packed[kPanel * kDepth];  // a vector that straddles two cache lines is read twice
  for (int64_t done = 0; done < w.depth; done += kDepth) {
    const int64_t depth = Min(kDepth, w.depth - done);
    for (int64_t row = 0; row < w.count; row += kPanel) {
      PackPanel(data, w.rows, w.cols, w.first_row + row, w.k0 + done, depth, packed);
      const Stretch panel{w.rows - w.first_row - row, depth, 0, Min(kPanel, w.count - row), 0, depth};
      Gemm(in.from(0, done), src.from(0, row), out.from(0, row), packed, panel, tokens, padded);
    }
    src = out;
  }
}

constexpr int kMaxDotTokens = 4;

// As Gemm for 1 to kMaxDotTokens tokens; nothing is packed, nor does it take padding. src may be out.
template <class E, int tokens>
void DotsOf(ConstFloats in, ConstFloats src, Floats out, const E* data, const Stretch& w) {
  constexpr int kRows = tokens == 1 ? 8 : 4;
  const int64_t whole = w.depth / kLanes * kLanes, rest = w.depth - whole;
  const E* end = data + w.rows * w.cols;
  const VecU32 mask = MaskBelow(rest);
  Vec in_rest[tokens];
  for (int t = 0; t < tokens; ++t) in_rest[t] = LoadPart(in.row(t) + whole, rest);
  for (int64_t row = 0; row < w.count; row += kRows) {
    const int64_t valid = Min(kRows, w.count - row);
    Vec sum[kRows][tokens] = {};
    const E* from = data + (w.first_row + row) * w.cols + w.k0;
    // Rows past the end read the last one again; their sums are dropped.
    int64_t offset[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) offset[i] = Min(i, valid - 1) * w.cols;
    for (int64_t k = 0; k < whole; k += kLanes) {
      Vec value[tokens];
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) value[t] = Load(in.row(t) + k);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec weight = Load(from + offset[i] + k);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) sum[i][t] += weight * value[t];
      }
    }
    if (rest) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        // A whole vector where the weight has one left, with what is not ours masked off: it could be infinite.
        const E* tail = from + offset[i] + whole;
        const Vec weight = end - tail >= kLanes ? (Vec)((VecU32)Load(tail) & mask) : LoadPart(tail, rest);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) sum[i][t] += weight * in_rest[t];
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < kRows; i += 4) {
        const Vec4 four = Sums(sum[i][t], sum[i + 1][t], sum[i + 2][t], sum[i + 3][t]);
        const float* from_src = src.row(t) + row + i;
        float* to = out.row(t) + row + i;
        if (i + 4 <= valid) {
          *reinterpret_cast<LooseVec4*>(to) = *reinterpret_cast<const LooseVec4*>(from_src) + four;
        } else {
          for (int64_t j = 0; i + j < valid; ++j) to[j] = from_src[j] + four[j];
        }
      }
    }
  }
}

template <class E>
void Dots(ConstFloats in, ConstFloats src, Floats out, const E* data, const Stretch& w, int64_t tokens) {
  auto* dots = tokens == 1 ? DotsOf<E, 1> : tokens == 2 ? DotsOf<E, 2> : tokens == 3 ? DotsOf<E, 3> : DotsOf<E, 4>;
  dots(in, src, out, data, w);
}
