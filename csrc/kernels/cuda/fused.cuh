// The operators as three steps over a tile of 16 tokens: Reduce u = x A^T; Forward <z,z>, <z,tau>, <tau,tau> and z C^T
// over h = base + u B^T; Apply y = base + u B^T + (s z C^T) D^T.
//
// Two kernels run them. Tiles: a block takes its tile through all three, so that x and y pass through memory once and
// base, the second time, comes from the cache. Split: where tiles are too few for the machine, each step's columns are
// cut into pieces, a block each; the pieces' sums meet in scratch, in a fixed order, with a barrier of the whole grid
// between the steps (or a launch for each).
#pragma once

#include "warp.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace loratrf {
namespace {

#ifdef __CUDACC__
__device__ inline float* SharedMemory() {
  extern __shared__ float memory[];
  return memory;
}
#endif

constexpr int kTile = 16;  // tokens
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kGroup = 32;   // columns of u or v that a warp sums up in one pass
constexpr int kMoments = 4;  // <z,z>, <z,tau>, <tau,tau> and a blank, before each row of v
// Floats between rows of u, and of v, in shared memory. r_size is 0 modulo 8 and v_size 4: so rows start 4 modulo 8
// floats apart, and those that a warp reads together lie in different banks.
constexpr int kPadU = 12, kPadV = 8;
constexpr int kRows = 256;  // batch rows of one launch
constexpr float kEps = 1e-8f;

enum Step { kReduce = 1, kForward = 2, kApply = 4 };

// A launch's argument; tensors as in Call, from the launch's first row on.
struct Work {
  const void *base, *x, *A, *B, *tau, *C, *D;
  void* y;
  float* scratch;  // split: u of every tile and piece (kTile,r_size), then their moments and v (kTile,v_size)
  int64_t tokens, tiles_per_row, tiles;
  int K, N, R, F;
  int r_size, v_size;            // R and kMoments + F, rounded up to 8s
  int pieces, k_piece, n_piece;  // a piece's columns
  int steps;                     // of this launch
  bool filter_base;
  int32_t slots[kRows];  // by batch row; -1 for base alone
};

inline __host__ __device__ int RoundUp(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

inline __host__ __device__ int SharedFloats(int r_size, int v_size) {
  return kTile * (r_size + kPadU) + kTile * (v_size + kPadV) + kWarps * kTile * (kMoments + kGroup);
}

// A block at work on one tile.
template <class E>
struct Block {
  static constexpr int W = kWidth<E>;

  const Work& work;
  const int lane, warp, g, t;  // g, t: see Mma
  const int64_t row, first;    // the tile's batch row and its first token there
  const int slot;
  const int R, F;  // 0 where the row has no adapter
  const Matrix<const E> base, x, A, B, tau, C, D;
  const Matrix<E> y;
  const int u_stride, v_stride;
  float *u, *v, *warps;  // shared: (kTile,u_stride) (kTile,v_stride) (kWarps,kTile,kMoments+kGroup)

  __device__ Block(const Work& w, int64_t tile, float* shared)
      : work(w),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(lane / 4),
        t(lane % 4),
        row(tile / w.tiles_per_row),
        first(tile % w.tiles_per_row * kTile),
        slot(w.slots[row]),
        R(slot < 0 ? 0 : w.R),
        F(slot < 0 ? 0 : w.F),
        base(Tokens(w.base, w.N)),
        x(Tokens(w.x, w.K)),
        A(Weight(w.A, R, w.K)),
        B(Weight(w.B, w.N, R)),
        tau(Weight(w.tau, 1, w.N)),
        C(Weight(w.C, F, w.N)),
        D(Weight(w.D, w.N, F)),
        y(const_cast<E*>(Tokens(w.y, w.N).data), base.rows, w.N),
        u_stride(w.r_size + kPadU),
        v_stride(w.v_size + kPadV),
        u(shared),
        v(u + kTile * u_stride),
        warps(v + kTile * v_stride) {}

  // The tile's rows of a (batch,tokens,cols) tensor.
  __device__ Matrix<const E> Tokens(const void* data, int cols) const {
    const int64_t left = work.tokens - first;
    return {static_cast<const E*>(data) + (row * work.tokens + first) * cols, left < kTile ? left : kTile, cols};
  }

  // The row's slot of a (S,rows,cols) weight.
  __device__ Matrix<const E> Weight(const void* data, int rows, int cols) const {
    return {static_cast<const E*>(data) + static_cast<int64_t>(slot < 0 ? 0 : slot) * rows * cols, rows, cols};
  }

  // A warp's sums, as a product leaves them, into its own rows of `warps`.
  __device__ void Put(const float (&sums)[kGroup / 8][4]) const {
    float* out = warps + (warp * kTile + g) * (kMoments + kGroup) + kMoments + 2 * t;
#pragma unroll
    for (int j = 0; j < kGroup / 8; ++j) {
      out[8 * j] = sums[j][0], out[8 * j + 1] = sums[j][1];
      out[8 * (kMoments + kGroup) + 8 * j] = sums[j][2], out[8 * (kMoments + kGroup) + 8 * j + 1] = sums[j][3];
    }
  }

  // out[row * stride + i] = the sum over warps of their column from + i, for i < count. All threads call it.
  __device__ void SumWarps(int from, int count, float* out, int stride) const {
    for (int i = threadIdx.x; i < kTile * count; i += kThreads) {
      const int token = i / count, column = i % count;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warps[(w * kTile + token) * (kMoments + kGroup) + from + column];
      out[token * stride + column] = sum;
    }
  }

  // to (kTile,stride) = the sum over pieces of from (pieces,kTile,size), both in rows of `size` values.
  __device__ void SumPieces(const float* from, int size, float* to, int stride) const {
    for (int i = threadIdx.x; i < kTile * size; i += kThreads) {
      float sum = 0;
      for (int piece = 0; piece < work.pieces; ++piece) sum += from[piece * kTile * size + i];
      to[i / size * stride + i % size] = sum;
    }
    __syncthreads();
  }

  // out (kTile,stride) = x A^T over columns [begin, end); the columns of out beyond R are 0.
  __device__ void Reduce(int begin, int end, float* out, int stride) const {
    for (int r0 = 0; r0 < work.r_size; r0 += kGroup) {
      float sums[kGroup / 8][4] = {};
      for (int col = begin + warp * kChunk<E>; col < end && R; col += kWarps * kChunk<E>) {
        float top[W], bottom[W];
        x.Load(g, col + W * t, top);
        x.Load(g + 8, col + W * t, bottom);
#pragma unroll
        for (int j = 0; j < kGroup / 8; ++j) {
          if (r0 + 8 * j >= R) break;
          float a[W];
          A.Load(r0 + 8 * j + g, col + W * t, a);
          // Lane t's W columns stand for the product's t and t + 4, two at a time.
#pragma unroll
          for (int i = 0; i < W; i += 2) {
            Product<E, false>(sums[j], {top[i], bottom[i], top[i + 1], bottom[i + 1]}, {a[i], a[i + 1]});
          }
        }
      }
      Put(sums);
      __syncthreads();
      SumWarps(kMoments, Min(kGroup, work.r_size - r0), out + r0, stride);
      __syncthreads();
    }
  }

  static __device__ int Min(int a, int b) { return a < b ? a : b; }

  // The chunk's (16, 4 W) of h += w M^T for w (kTile,stride) in shared memory and M (N,rank). Lane (g,t) holds columns
  // W t to W t + W - 1 of rows g and g + 8.
  __device__ void AddProduct(float (&top)[W], float (&bottom)[W], const float* w, int stride, const Matrix<const E>& M,
                             int rank, int chunk) const {
    for (int r = 0; r < rank; r += 8) {
      const float* at = w + g * stride + r + 2 * t;
      const float a[4] = {at[0], at[8 * stride], at[1], at[8 * stride + 1]};
#pragma unroll
      for (int i = 0; i < W; i += 2) {
        // The product's column c belongs to lane c / 2, which holds it at i + c % 2.
        float b[2], c[4] = {top[i], top[i + 1], bottom[i], bottom[i + 1]};
        M.LoadPair(chunk + W * (g / 2) + i + g % 2, r + 2 * t, &b[0], &b[1]);
        Product<E, true>(c, a, b);
        top[i] = c[0], top[i + 1] = c[1], bottom[i] = c[2], bottom[i + 1] = c[3];
      }
    }
  }

  // out (kTile,stride) = the moments of z and z C^T over columns [begin, end); reads u unless z is base.
  __device__ void Forward(int begin, int end, float* out, int stride) const {
    for (int f0 = 0; f0 < work.v_size - kMoments; f0 += kGroup) {
      float sums[kGroup / 8][4] = {}, moments[2][3] = {};
      for (int chunk = begin + warp * kChunk<E>; chunk < end && F; chunk += kWarps * kChunk<E>) {
        const int col = chunk + W * t;
        float top[W], bottom[W], along[W];
        base.Load(g, col, top);
        base.Load(g + 8, col, bottom);
        tau.Load(0, col, along);
        if (!work.filter_base) AddProduct(top, bottom, u, u_stride, B, R, chunk);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          moments[0][0] += top[i] * top[i], moments[1][0] += bottom[i] * bottom[i];
          moments[0][1] += top[i] * along[i], moments[1][1] += bottom[i] * along[i];
          moments[0][2] += along[i] * along[i], moments[1][2] += along[i] * along[i];
        }
#pragma unroll
        for (int j = 0; j < kGroup / 8; ++j) {
          if (f0 + 8 * j >= F) break;
          float c[W];
          C.Load(f0 + 8 * j + g, col, c);
#pragma unroll
          for (int i = 0; i < W; i += 2) {
            Product<E, true>(sums[j], {top[i], bottom[i], top[i + 1], bottom[i + 1]}, {c[i], c[i + 1]});
          }
        }
      }
      Put(sums);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < 3; ++m) {
          float sum = moments[half][m];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (t == m) warps[(warp * kTile + g + 8 * half) * (kMoments + kGroup) + m] = sum;
        }
        if (t == 3) warps[(warp * kTile + g + 8 * half) * (kMoments + kGroup) + 3] = 0;
      }
      __syncthreads();
      if (f0 == 0) SumWarps(0, kMoments, out, stride);
      SumWarps(kMoments, Min(kGroup, work.v_size - kMoments - f0), out + kMoments + f0, stride);
      __syncthreads();
    }
  }

  // v *= s, by token.
  __device__ void Score() const {
    const int size = work.v_size - kMoments;
    for (int i = threadIdx.x; i < kTile * size; i += kThreads) {
      float* token = v + i / size * v_stride;
      const float cosine = token[1] / (fmaxf(sqrtf(token[0]), kEps) * fmaxf(sqrtf(token[2]), kEps));
      token[kMoments + i % size] *= fminf(fmaxf(cosine, 0.0f), 1.0f);
    }
    __syncthreads();
  }

  // y over columns [begin, end), from u and the scored v. A lane reads its base before it writes its y.
  __device__ void Apply(int begin, int end) const {
    for (int chunk = begin + warp * kChunk<E>; chunk < end; chunk += kWarps * kChunk<E>) {
      float top[W], bottom[W];
      base.Load(g, chunk + W * t, top);
      base.Load(g + 8, chunk + W * t, bottom);
      AddProduct(top, bottom, u, u_stride, B, R, chunk);
      AddProduct(top, bottom, v + kMoments, v_stride, D, F, chunk);
      y.Store(g, chunk + W * t, top);
      y.Store(g + 8, chunk + W * t, bottom);
    }
  }
};

// A block for each tile.
template <class E>
__global__ void __launch_bounds__(kThreads, 2) Tiles(const Work work) {
  const Block<E> block(work, blockIdx.x, SharedMemory());
  if (work.steps & kReduce) block.Reduce(0, work.K, block.u, block.u_stride);
  if (work.steps & kForward) {
    block.Forward(0, work.N, block.v, block.v_stride);
    block.Score();
  }
  block.Apply(0, work.N);
}

// A block for each tile's piece. A launch of more than one step is cooperative.
template <class E>
__global__ void __launch_bounds__(kThreads, 2) Split(const Work work) {
  const int64_t item = blockIdx.x, tile = item / work.pieces;
  const int piece = static_cast<int>(item % work.pieces);
  const Block<E> block(work, tile, SharedMemory());
  const auto bound = [](int64_t column, int columns) { return static_cast<int>(column < columns ? column : columns); };
  const int n0 = bound(int64_t{piece} * work.n_piece, work.N), n1 = bound(int64_t{n0} + work.n_piece, work.N);
  float* const u_pieces = work.scratch;
  float* const v_pieces = u_pieces + work.tiles * work.pieces * kTile * work.r_size;
  const auto sum_u = [&] {
    if (!work.r_size) return;
    block.SumPieces(u_pieces + tile * work.pieces * kTile * work.r_size, work.r_size, block.u, block.u_stride);
  };
  if (work.steps & kReduce) {
    const int k0 = bound(int64_t{piece} * work.k_piece, work.K), k1 = bound(int64_t{k0} + work.k_piece, work.K);
    block.Reduce(k0, k1, u_pieces + item * kTile * work.r_size, work.r_size);
    if (work.steps != kReduce) cooperative_groups::this_grid().sync();
  }
  if (work.steps & kForward) {
    if (!work.filter_base) sum_u();
    block.Forward(n0, n1, v_pieces + item * kTile * work.v_size, work.v_size);
    if (work.steps & kApply) cooperative_groups::this_grid().sync();
  }
  if (work.steps & kApply) {
    sum_u();
    if (work.v_size) {
      block.SumPieces(v_pieces + tile * work.pieces * kTile * work.v_size, work.v_size, block.v, block.v_stride);
      block.Score();
    }
    block.Apply(n0, n1);
  }
}

}  // namespace
}  // namespace loratrf
