// What one warp does: wide loads and stores, and the 16 x 8 product that every step is made of.
//
// Tests compile this source for the CPU too (tests/cuda_on_cpu.h stands in for CUDA's headers).
#pragma once

#include <stdint.h>

#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace loratrf {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ inline float Widen(float value) { return value; }
__device__ inline float Widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float Widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

__device__ inline void Narrow(float value, float* out) { *out = value; }
__device__ inline void Narrow(float value, Half* out) { out->bits = __half_as_ushort(__float2half_rn(value)); }
__device__ inline void Narrow(float value, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Elements of a lane's widest load, 16 bytes; four neighbouring lanes read a chunk of a row.
template <class E>
constexpr int kWidth = 16 / sizeof(E);
template <class E>
constexpr int kChunk = 4 * kWidth<E>;

// A (rows, cols) matrix, row-major; elements outside of it read as zero and are never touched in memory.
template <class E>
struct Matrix {
  union Lane {
    uint4 whole;
    std::remove_const_t<E> each[kWidth<E>];
  };

  E* data;
  int64_t rows;
  int cols;
  bool wide;  // every row starts on 16 bytes
  bool even;  // every row starts on two elements

  __device__ Matrix(E* d, int64_t r, int c) : data(d), rows(r), cols(c) {
    const auto address = reinterpret_cast<uintptr_t>(d);
    wide = address % 16 == 0 && c % kWidth<E> == 0;
    even = address % (2 * sizeof(E)) == 0 && c % 2 == 0;
  }

  // out[i] = (row, col + i), col a multiple of the width.
  __device__ void Load(int64_t row, int col, float (&out)[kWidth<E>]) const {
    const E* from = data + row * cols + col;
    if (wide && row < rows && col < cols) {
      Lane lane;
      lane.whole = *reinterpret_cast<const uint4*>(from);
#pragma unroll
      for (int i = 0; i < kWidth<E>; ++i) out[i] = Widen(lane.each[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth<E>; ++i) out[i] = row < rows && col + i < cols ? Widen(from[i]) : 0.0f;
  }

  // Two neighbours, col even.
  __device__ void LoadPair(int64_t row, int col, float* first, float* second) const {
    const E* from = data + row * cols + col;
    struct alignas(2 * sizeof(E)) Pair {
      E first, second;
    };
    if (even && row < rows && col < cols) {
      const Pair pair = *reinterpret_cast<const Pair*>(from);
      *first = Widen(pair.first), *second = Widen(pair.second);
      return;
    }
    *first = row < rows && col < cols ? Widen(from[0]) : 0.0f;
    *second = row < rows && col + 1 < cols ? Widen(from[1]) : 0.0f;
  }

  __device__ void Store(int64_t row, int col, const float (&in)[kWidth<E>]) const {
    Lane lane;
    E* to = data + row * cols + col;
#pragma unroll
    for (int i = 0; i < kWidth<E>; ++i) Narrow(in[i], &lane.each[i]);
    if (wide && row < rows && col < cols) {
      *reinterpret_cast<uint4*>(to) = lane.whole;
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth<E>; ++i) {
      if (row < rows && col + i < cols) to[i] = lane.each[i];
    }
  }
};

// Nearest value with 10 bits of mantissa and float32's exponent, which a tensor core takes as it is.
__device__ inline float Tf32(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  if (!(fabsf(value) < INFINITY)) return value;
  return __uint_as_float((__float_as_uint(value) + 0x1000u) & ~0x1fffu);
#endif
}

// c (16,8) += a (16,8) b (8,8), of values that Tf32 leaves as they are; PTX's mma.m16n8k8. With g = lane / 4 and
// t = lane % 4 a lane holds
//   a[0] (g,t)  a[1] (g+8,t)  a[2] (g,t+4)  a[3] (g+8,t+4)    b[0] (t,g)  b[1] (t+4,g)
//   c[0] (g,2t)  c[1] (g,2t+1)  c[2] (g+8,2t)  c[3] (g+8,2t+1)
__device__ inline void Mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(LORATRF_MMA_ON_CPU)
  MmaOnCpu(c, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  // Before sm_80: every lane fetches the rows and columns of its own four sums.
  const int lane = threadIdx.x % 32, row = lane & ~3, col = 8 * (lane % 4);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int t = k % 4, high = k / 4;
    const float top = __shfl_sync(0xffffffffu, a[2 * high], row + t);
    const float bottom = __shfl_sync(0xffffffffu, a[2 * high + 1], row + t);
    const float left = __shfl_sync(0xffffffffu, b[high], col + t);
    const float right = __shfl_sync(0xffffffffu, b[high], col + 4 + t);
    c[0] += top * left, c[1] += top * right;
    c[2] += bottom * left, c[3] += bottom * right;
  }
#endif
}

// c += a b for tensors of type E. Elements of half types fit a tensor core's operand exactly, and what was computed in
// float32 (a, where kComputed) is rounded to it: no worse than E's own rounding. float32 is cut in two parts each, of
// which the three products that matter are taken. A tensor core cuts off what its sum has no bits for, always towards
// zero, which over a long sum of float32s would show: it is given short ones, and c is added to with a rounding.
template <class E, bool kComputed>
__device__ inline void Product(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  float high[4], low[4], b_high[2], b_low[2];
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = kComputed ? Tf32(a[i]) : a[i];
    Mma(c, high, b);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = Tf32(a[i]), low[i] = Tf32(a[i] - high[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) b_high[i] = Tf32(b[i]), b_low[i] = Tf32(b[i] - b_high[i]);
#if defined(LORATRF_MMA_ON_CPU) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
    float part[4] = {};
    Mma(part, low, b_high);
    Mma(part, high, b_low);
    Mma(part, high, b_high);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += part[i];
#else  // sums of rounded additions, and no registers to spare
    Mma(c, low, b_high);
    Mma(c, high, b_low);
    Mma(c, high, b_high);
#endif
  }
}

}  // namespace
}  // namespace loratrf
