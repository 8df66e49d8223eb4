// Types of elements, conversions between them, and vectors of them.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &value, sizeof half);
  return half;
#else
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  std::uint32_t bits = rest << 13;
  float result;
  if (rest >= 0x7c00) {
    bits |= 0x7f800000;  // infinity, NaN
  } else {               // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal
    std::memcpy(&result, &bits, sizeof result);
    result *= 0x1p112f;
    std::memcpy(&bits, &result, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }

inline void narrow(float value, BFloat16& out) {  // round to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = nan ? 0x7fc0 : std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float value, Float16& out) {
#if defined(__F16C__)
  out.bits = std::uint16_t(_cvtss_sh(value, 0));
#elif defined(__aarch64__)
  const __fp16 half = value;
  std::memcpy(&out, &half, sizeof out);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 2^16 or more
    out.bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds at the place of the last bit
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    out.bits = sign | std::uint16_t(bits - 0x3f000000);
  } else {
    out.bits = sign | std::uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
  }
#endif
}

template <class Real, int LANES>
struct Vector {
  typedef Real type __attribute__((vector_size(sizeof(Real) * LANES), aligned(sizeof(Real)), may_alias));
};

// Of the vectors in which `width` elements lie: the widest registers, or one that they just fill.
template <class Real>
constexpr int lanes_of(int width) {
  return width * int(sizeof(Real)) < VECTOR_BYTES ? width : VECTOR_BYTES / int(sizeof(Real));
}

// At any address. clang forgets in a template that the type asks for no alignment, and would move it as if it were aligned;
// g++ does not, and makes somewhat slower code of a copy.
template <class V, class Real>
inline V load(const Real* from) {
#if defined(__clang__)
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
#else
  static_assert(alignof(V) == alignof(Real));
  return *reinterpret_cast<const V*>(from);
#endif
}
template <class V, class Real>
inline void store(Real* to, V value) {
#if defined(__clang__)
  std::memcpy(to, &value, sizeof value);
#else
  static_assert(alignof(V) == alignof(Real));
  *reinterpret_cast<V*>(to) = value;
#endif
}

// Any lanes of `a` and, numbered on from these, of `b`.
template <int... I, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  using Lane = std::conditional_t<sizeof(V) / sizeof...(I) == 4, std::int32_t, std::int64_t>;
  typedef Lane Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

// The lanes of `a`, then those of `b`.
template <class Real, class V, int... I>
inline auto joined(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  typename Vector<Real, sizeof...(I)>::type both;
  std::memcpy(&both, &a, sizeof a);
  std::memcpy(reinterpret_cast<char*>(&both) + sizeof a, &b, sizeof b);
  return both;
#endif
}

// Stores lanes of `v`, as many as the sequence is long, from the lane FIRST on.
template <int FIRST, class Real, class V, int... I>
inline void store_some(Real* to, V v, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  store<typename Vector<Real, sizeof...(I)>::type>(to, __builtin_shufflevector(v, v, (FIRST + I)...));
#else
  Real lanes[sizeof(V) / sizeof(Real)];
  store<V>(lanes, v);
  std::memcpy(to, lanes + FIRST, sizeof(Real) * sizeof...(I));
#endif
}

#if defined(__AVX2__)
// Eight floats, as `narrow` rounds them, in the lower halves of words.
inline __m256i rounded_to_bfloat16(const float* from) {
  const __m256 floats = _mm256_loadu_ps(from);
  const __m256i bits = _mm256_castps_si256(floats), odd = _mm256_srli_epi32(_mm256_slli_epi32(bits, 15), 31);
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 nan = _mm256_cmp_ps(floats, floats, _CMP_UNORD_Q), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan)), 16);
}
#endif

template <int LANES, class To, class From>
inline void copy_lanes(To* to, const From* from) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<To, BFloat16> && std::is_same_v<From, float> && LANES == 16) {
    const __m256i halves = _mm256_packus_epi32(rounded_to_bfloat16(from), rounded_to_bfloat16(from + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(halves, 0b11011000));
    return;
  }
#endif
  if constexpr (LANES * (sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From)) > VECTOR_BYTES) {
    copy_lanes<LANES / 2>(to, from);
    return copy_lanes<LANES / 2>(to + LANES / 2, from + LANES / 2);
  }
#if defined(__F16C__)  // compilers do not make vectors of these conversions by themselves
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, Float16> && LANES % 8 == 0) {
    for (int lane = 0; lane < LANES; lane += 8)
      _mm256_storeu_ps(to + lane, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lane))));
    return;
  }
  if constexpr (std::is_same_v<To, Float16> && std::is_same_v<From, float> && LANES % 8 == 0) {
    for (int lane = 0; lane < LANES; lane += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + lane), _mm256_cvtps_ph(_mm256_loadu_ps(from + lane), 0));
    return;
  }
#endif
#if defined(__AVX2__)  // g++ 12 takes apart what one instruction does
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, BFloat16> && LANES % 8 == 0) {
    for (int lane = 0; lane < LANES; lane += 8) {
      const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lane)));
      _mm256_storeu_ps(to + lane, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
    return;
  }
  if constexpr (std::is_same_v<To, BFloat16> && std::is_same_v<From, float> && LANES == 8) {
    const __m256i rounded = rounded_to_bfloat16(from);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
    return;
  }
#endif
  // Elsewhere they need to be told of vectors of these, too.
  if constexpr (LANES >= 4 && (std::is_same_v<To, BFloat16> || std::is_same_v<From, BFloat16>)) {
    using Floats = typename Vector<float, LANES>::type;
    using Bits = typename Vector<std::uint32_t, LANES>::type;
    using Half = typename Vector<std::uint16_t, LANES>::type;
    Floats floats;
    Bits bits;
    if constexpr (std::is_same_v<From, BFloat16>) {
      bits = __builtin_convertvector(load<Half>(&from->bits), Bits) << 16;
      std::memcpy(&floats, &bits, sizeof bits);
      store<Floats>(to, floats);
    } else {
      floats = load<Floats>(from);
      std::memcpy(&bits, &floats, sizeof bits);
      const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // as `narrow` does
      const Bits nan = Bits((bits & 0x7fffffff) > 0x7f800000);
      store<Half>(&to->bits, __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Half));
    }
    return;
  }
  if constexpr (std::is_same_v<To, From>) {
    using V = typename Vector<To, LANES>::type;
    store<V>(to, load<V>(from));
  } else if constexpr (sizeof(To) > sizeof(From)) {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = widen(from[lane]);
  } else {
    for (int lane = 0; lane < LANES; ++lane) narrow(from[lane], to[lane]);
  }
}

// A run of elements, to another type.
template <class To, class From>
inline void copy_run(To* to, const From* from, Index count) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, sizeof(To) * count);
  } else {
    Index i = 0;
    for (; i + 16 <= count; i += 16) copy_lanes<16>(to + i, from + i);
    for (; i < count; ++i) copy_lanes<1>(to + i, from + i);
  }
}

}  // namespace
