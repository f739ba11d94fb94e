// A vector of LORATRF_LANES floats, and loads and stores of the three element types.
//
// Written in GCC/Clang vector extensions, so one source serves SSE2, NEON, AVX2 and AVX-512. It is included once by
// each isa_*.cc, inside that file's own anonymous namespace, and includes no C++ standard header: an inline function
// that another file shares could be linked in its AVX-512 form and called on a CPU without it.
#pragma once

constexpr int kLanes = LORATRF_LANES;

typedef float Vec __attribute__((vector_size(4 * LORATRF_LANES)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * LORATRF_LANES)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * LORATRF_LANES)));
// The same at any address: tensors are aligned to their element only.
typedef Vec LooseVec __attribute__((aligned(4), may_alias));
typedef VecU16 LooseVecU16 __attribute__((aligned(2), may_alias));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class E>
struct IsFloat {
  static constexpr bool value = false;
};
template <>
struct IsFloat<float> {
  static constexpr bool value = true;
};

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// value - 0 is value, signed zeros included; + 0 is not, and would cost an instruction.
inline Vec Splat(float value) { return value - Vec{}; }
inline VecU32 Select(VecU32 mask, VecU32 yes, VecU32 no) { return (mask & yes) | (~mask & no); }

inline Vec Load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void Store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }

inline Vec Load(const BFloat16* from) {
  const VecU16 bits = *reinterpret_cast<const LooseVecU16*>(from);
  return (Vec)(__builtin_convertvector(bits, VecU32) << 16);
}

// Rounds to nearest even; a NaN stays one (the carry could otherwise make it infinite).
inline void Store(BFloat16* to, Vec value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 nan = (bits >> 16) | 0x40u;
  const VecU32 result = Select((VecU32)((bits & 0x7fffffffu) > 0x7f800000u), nan, rounded);
  *reinterpret_cast<LooseVecU16*>(to) = __builtin_convertvector(result, VecU16);
}

#if LORATRF_LANES == 8 && defined(__F16C__)

inline Vec Load(const Half* from) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline void Store(Half* to, Vec value) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}

#elif LORATRF_LANES == 16 && defined(__AVX512F__)

// The masked forms: the plain ones warn of an uninitialised register in GCC's own headers.
inline Vec Load(const Half* from) {
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
}
inline void Store(Half* to, Vec value) {
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
}

#elif LORATRF_LANES == 4 && defined(__aarch64__)

inline Vec Load(const Half* from) {
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}
inline void Store(Half* to, Vec value) {
  vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)value)));
}

#else

inline Vec Load(const Half* from) {
  const VecU32 bits = __builtin_convertvector(*reinterpret_cast<const LooseVecU16*>(from), VecU32);
  const VecU32 magnitude = bits & 0x7fffu;
  // Shifted into place the exponent is 112 too low, for subnormals as well: one exact product puts it right.
  const Vec scaled = (Vec)(magnitude << 13) * 0x1p112f;
  const VecU32 special = (VecU32)(magnitude >= 0x7c00u) & 0x7f800000u;  // infinity and NaN
  return (Vec)((VecU32)scaled | special | ((bits & 0x8000u) << 16));
}

// Rounds to nearest even, like the conversion instructions.
inline void Store(Half* to, Vec value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 magnitude = bits & 0x7fffffffu;
  // Rebias the exponent by 15 - 127, round the 13 bits that go, and let a carry run into the exponent.
  const VecU32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a half's subnormal digits in the lowest bits, rounded by the addition.
  const VecU32 subnormal = (VecU32)((Vec)magnitude + 0.5f) - 0x3f000000u;
  const VecU32 special = 0x7c00u | ((VecU32)(magnitude > 0x7f800000u) & 0x200u);
  VecU32 result = Select((VecU32)(magnitude < 0x38800000u), subnormal, normal);
  result = Select((VecU32)(magnitude >= 0x47800000u), special, result);
  *reinterpret_cast<LooseVecU16*>(to) = __builtin_convertvector(result | ((bits >> 16) & 0x8000u), VecU16);
}

#endif

// The first `count` < kLanes elements, the rest zero; reads nothing beyond them.
template <class E>
inline Vec LoadPart(const E* from, int64_t count) {
  E part[kLanes] = {};
  memcpy(part, from, static_cast<size_t>(count) * sizeof(E));
  return Load(part);
}

template <class E>
inline void StorePart(E* to, Vec value, int64_t count) {
  E part[kLanes];
  Store(part, value);
  memcpy(to, part, static_cast<size_t>(count) * sizeof(E));
}

// Lanes below `count` all ones, the rest zero.
inline VecU32 MaskBelow(int64_t count) {
  uint32_t mask[kLanes];
  for (int i = 0; i < kLanes; ++i) mask[i] = i < count ? ~0u : 0u;
  VecU32 result;
  memcpy(&result, mask, sizeof(result));
  return result;
}

typedef float Vec4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef Vec4 LooseVec4 __attribute__((aligned(4), may_alias));

// Lanes a, b, c, d of the eight that x and y have together.
#if defined(__clang__)
#define LORATRF_PICK(x, y, a, b, c, d) __builtin_shufflevector(x, y, a, b, c, d)
#else
#define LORATRF_PICK(x, y, a, b, c, d) __builtin_shuffle(x, y, (Int4){a, b, c, d})
#endif

// Rows become columns.
inline void Transpose(Vec4& a, Vec4& b, Vec4& c, Vec4& d) {
  const Vec4 ab_low = LORATRF_PICK(a, b, 0, 4, 1, 5), ab_high = LORATRF_PICK(a, b, 2, 6, 3, 7);
  const Vec4 cd_low = LORATRF_PICK(c, d, 0, 4, 1, 5), cd_high = LORATRF_PICK(c, d, 2, 6, 3, 7);
  a = LORATRF_PICK(ab_low, cd_low, 0, 1, 4, 5);
  b = LORATRF_PICK(ab_low, cd_low, 2, 3, 6, 7);
  c = LORATRF_PICK(ab_high, cd_high, 0, 1, 4, 5);
  d = LORATRF_PICK(ab_high, cd_high, 2, 3, 6, 7);
}

#undef LORATRF_PICK

// Four lanes that add up to the sum of value's lanes.
inline Vec4 Fold(Vec value) {
  Vec4 part[kLanes / 4];
  memcpy(part, &value, sizeof(value));
  Vec4 sum = part[0];
#pragma GCC unroll 4
  for (int i = 1; i < kLanes / 4; ++i) sum += part[i];
  return sum;
}

// Sums of the lanes of four vectors, each in a fixed order.
inline Vec4 Sums(Vec w, Vec x, Vec y, Vec z) {
  Vec4 a = Fold(w), b = Fold(x), c = Fold(y), d = Fold(z);
  Transpose(a, b, c, d);
  return (a + c) + (b + d);
}

inline float Sum(Vec value) {
  const Vec4 part = Fold(value);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

// to[i] = from[i] for i < count, converted (rounded to nearest even where `to` is narrower).
template <class From, class To>
inline void Convert(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(to + i, Load(from + i));
  if (i < count) StorePart(to + i, LoadPart(from + i, count - i), count - i);
}
