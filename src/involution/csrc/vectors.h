// Vectors of elements: loads, stores, shuffles, and conversions in registers.

#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "elements.h"

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

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

// A loaded value that is to stay in a register. g++ would read it anew as an operand of each multiply-add where these are few, and the
// taps that the others could be are read by instructions of their own then. Other processors have no such operands, or no free register.
template <class V>
inline V in_register(V value) {
#if defined(__AVX512BW__) && !defined(__clang__)
  if constexpr (sizeof(V) >= 16) asm("" : "+v"(value));
#endif
  return value;
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

// The same with as many lanes as there are numbers.
template <class Real, class V, int... I>
inline auto pick(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  constexpr int LANES = sizeof(V) / sizeof(Real);
  return typename Vector<Real, sizeof...(I)>::type{(I < LANES ? a[I % LANES] : b[I % LANES])...};
#endif
}

// The lanes of `a`, then those of `b`.
template <class Real, class V>
inline auto joined(V a, V b) {
  return pick<Real>(a, b, std::make_integer_sequence<int, 2 * sizeof(V) / sizeof(Real)>{});
}

// Stores lanes of `v`, as many as the sequence is long, from the lane FIRST on.
template <int FIRST, class Real, class V, int... I>
inline void store_some(Real* to, V v, std::integer_sequence<int, I...>) {
#if defined(__AVX512BW__)
  // Compilers move the lanes to the lowest ones first, by a port that is busy in loops that end like this.
  if constexpr (sizeof(V) == 64 && sizeof(Real) == 4 && sizeof...(I) == 4 && FIRST % 4 == 0)
    return _mm_storeu_ps(to, _mm512_extractf32x4_ps(__m512(v), FIRST / 4));
#endif
#if defined(__clang__) || __GNUC__ >= 12
  store<typename Vector<Real, sizeof...(I)>::type>(to, __builtin_shufflevector(v, v, (FIRST + I)...));
#else
  Real lanes[sizeof(V) / sizeof(Real)];
  store<V>(lanes, v);
  std::memcpy(to, lanes + FIRST, sizeof(Real) * sizeof...(I));
#endif
}

// Stores the first `count` lanes, at least half of them.
template <int LANES, class Real, class V>
inline void store_first(Real* to, V v, Index count) {
#if defined(__AVX512VL__)
  const __mmask16 lanes = __mmask16((1u << count) - 1);
  if constexpr (sizeof(V) == 64 && sizeof(Real) == 4) return _mm512_mask_storeu_ps(to, lanes, __m512(v));
  if constexpr (sizeof(V) == 64 && sizeof(Real) == 8) return _mm512_mask_storeu_pd(to, __mmask8(lanes), __m512d(v));
  if constexpr (sizeof(V) == 32 && sizeof(Real) == 4) return _mm256_mask_storeu_ps(to, __mmask8(lanes), __m256(v));
  if constexpr (sizeof(V) == 32 && sizeof(Real) == 8) return _mm256_mask_storeu_pd(to, __mmask8(lanes), __m256d(v));
#endif
  // One half, and another that may overlap it.
  using Half = typename Vector<Real, LANES / 2>::type;
  Real all[LANES];
  store<V>(all, v);
  const Half first = load<Half>(all), last = load<Half>(all + count - LANES / 2);
  store<Half>(to, first);
  store<Half>(to + count - LANES / 2, last);
}

template <class V>
using LaneOf = std::decay_t<decltype(std::declval<V>()[0])>;
template <class V>
constexpr int LANES_OF = sizeof(V) / sizeof(LaneOf<V>);

// The bits of elements of 16.
template <int LANES>
using Halves = typename Vector<std::uint16_t, LANES>::type;

#if defined(__AVX512BW__)
// The words I * TIMES / 2 + FIRST of a register.
template <int TIMES, int FIRST, int... I>
inline __m512i numbers_of_words(std::integer_sequence<int, I...>) {
  return __m512i(Halves<32>{std::uint16_t((I * TIMES / 2 + FIRST) % 32)...});
}
#endif

// Elements of 16 bits as a vector V of floats. Compilers do not make vectors of conversions of float16 by themselves, and g++ 12
// takes apart what one instruction does with bfloat16.
template <class V, class Element>
inline V widened(Halves<LANES_OF<V>> halves) {
  constexpr int LANES = LANES_OF<V>;
#if defined(__AVX512BW__)
  [[maybe_unused]] constexpr auto words = std::make_integer_sequence<int, 32>{};
  if constexpr (std::is_same_v<Element, Float16> && LANES == 16) return V(_mm512_cvtph_ps(__m256i(halves)));
  if constexpr (std::is_same_v<Element, BFloat16> && LANES == 16)
    return V(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, numbers_of_words<1, 0>(words), _mm512_castsi256_si512(__m256i(halves))));
#endif
#if defined(__F16C__)
  if constexpr (std::is_same_v<Element, Float16> && LANES == 8) return V(_mm256_cvtph_ps(__m128i(halves)));
  if constexpr (std::is_same_v<Element, Float16> && LANES == 4) {
    long long bits;
    std::memcpy(&bits, &halves, sizeof bits);
    return V(_mm_cvtph_ps(_mm_cvtsi64_si128(bits)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Element, BFloat16> && LANES == 8)
    return V(_mm256_slli_epi32(_mm256_cvtepu16_epi32(__m128i(halves)), 16));
#endif
  V result;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    using Bits = typename Vector<std::uint32_t, LANES>::type;
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    std::memcpy(&result, &bits, sizeof bits);
  } else {
    for (int lane = 0; lane < LANES; ++lane) result[lane] = widen(Element{halves[lane]});
  }
  return result;
}

// Whether floats may be any NaN. Those that come of bfloat16 alone have a lower half of zeros, or are the processor's own, which have,
// too: rounded to bfloat16 like numbers they stay NaN. This saves instructions where it can, and means nothing to other types.
enum class Nan { ANY, OF_HALVES };

#if defined(__AVX2__)
// Floats as `narrow` rounds them to bfloat16, in the lower halves of words.
template <Nan NAN_IS>
inline __m256i rounded_to_bfloat16(__m256 floats) {
  const __m256i bits = _mm256_castps_si256(floats), odd = _mm256_srli_epi32(_mm256_slli_epi32(bits, 15), 31);
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  if constexpr (NAN_IS == Nan::OF_HALVES) return _mm256_srli_epi32(up, 16);
  const __m256 nan = _mm256_cmp_ps(floats, floats, _CMP_UNORD_Q), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan)), 16);
}
#endif

// A vector of floats as elements of 16 bits.
template <class Element, Nan NAN_IS = Nan::ANY, class V>
inline Halves<LANES_OF<V>> narrowed(V floats) {
  constexpr int LANES = LANES_OF<V>;
  using Result = Halves<LANES>;
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<Element, Float16> && LANES == 16) return Result(_mm512_cvtps_ph(__m512(floats), 0));
  if constexpr (std::is_same_v<Element, BFloat16> && LANES == 16) {
    constexpr auto words = std::make_integer_sequence<int, 32>{};
    const __m512i bits = _mm512_castps_si512(__m512(floats)), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i rounded = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
    if constexpr (NAN_IS == Nan::ANY) {
      const __mmask16 nan = _mm512_cmp_ps_mask(__m512(floats), __m512(floats), _CMP_UNORD_Q);
      rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    }
    return Result(_mm512_castsi512_si256(_mm512_permutexvar_epi16(numbers_of_words<4, 1>(words), rounded)));
  }
#endif
#if defined(__F16C__)
  if constexpr (std::is_same_v<Element, Float16> && LANES == 8) return Result(_mm256_cvtps_ph(__m256(floats), 0));
  if constexpr (std::is_same_v<Element, Float16> && LANES == 4) {
    const long long bits = _mm_cvtsi128_si64(_mm_cvtps_ph(__m128(floats), 0));
    Result result;
    std::memcpy(&result, &bits, sizeof bits);
    return result;
  }
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Element, BFloat16> && LANES == 8) {
    const __m256i rounded = rounded_to_bfloat16<NAN_IS>(__m256(floats));
    return Result(_mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
#endif
  if constexpr (std::is_same_v<Element, BFloat16>) {
    using Bits = typename Vector<std::uint32_t, LANES>::type;
    Bits bits;
    std::memcpy(&bits, &floats, sizeof bits);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // as `narrow` does
    const Bits nan = Bits((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Result);
  } else {
    Result result;
    for (int lane = 0; lane < LANES; ++lane) {
      Element element;
      narrow(floats[lane], element);
      result[lane] = element.bits;
    }
    return result;
  }
}
// Two of them: four lanes of `a` and of `b` in turn.
template <class Element, Nan NAN_IS = Nan::ANY, class V, int... I>
inline Halves<2 * LANES_OF<V>> narrowed_in_turn(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Element, BFloat16> && LANES_OF<V> == 8)
    return Halves<16>(_mm256_packus_epi32(rounded_to_bfloat16<NAN_IS>(__m256(a)), rounded_to_bfloat16<NAN_IS>(__m256(b))));
#endif
  return pick<std::uint16_t>(narrowed<Element, NAN_IS>(a), narrowed<Element, NAN_IS>(b),
                             std::integer_sequence<int, (I / 8 * 4 + I % 4 + (I % 8 < 4 ? 0 : LANES_OF<V>))...>{});
}
// The same, one behind the other.
template <class Element, Nan NAN_IS = Nan::ANY, class V>
inline Halves<2 * LANES_OF<V>> narrowed(V a, V b) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Element, BFloat16> && LANES_OF<V> == 8) {
    const auto in_turn = narrowed_in_turn<Element, NAN_IS>(a, b, std::make_integer_sequence<int, 16>{});
    return Halves<16>(_mm256_permute4x64_epi64(__m256i(in_turn), 0b11011000));
  }
#endif
  return joined<std::uint16_t>(narrowed<Element, NAN_IS>(a), narrowed<Element, NAN_IS>(b));
}

// A vector V of the type computed in, from elements of any type at any address, and one or two of them to such elements.
template <class V, class Element>
inline V load_as(const Element* from) {
  if constexpr (sizeof(Element) == 2) return widened<V, Element>(load<Halves<LANES_OF<V>>>(&from->bits));
  else return load<V>(from);
}
template <Nan NAN_IS = Nan::ANY, class Element, class V>
inline void store_as(Element* to, V value) {
  if constexpr (sizeof(Element) == 2) store<Halves<LANES_OF<V>>>(&to->bits, narrowed<Element, NAN_IS>(value));
  else store<V>(to, value);
}
template <Nan NAN_IS = Nan::ANY, class Element, class V>
inline void store_as(Element* to, V a, V b) {
  if constexpr (sizeof(Element) == 2) {
    store<Halves<2 * LANES_OF<V>>>(&to->bits, narrowed<Element, NAN_IS>(a, b));
  } else {
    store<V>(to, a);
    store<V>(to + LANES_OF<V>, b);
  }
}

template <int LANES, class To, class From>
inline void copy_lanes(To* to, const From* from) {
  using Real = std::common_type_t<decltype(widen(To{})), decltype(widen(From{}))>;
  if constexpr (LANES == 1) {
    narrow(widen(*from), *to);
  } else {
    constexpr int WIDE = lanes_of<Real>(LANES);
    using V = typename Vector<Real, WIDE>::type;
    int lane = 0;
    for (; lane + 2 * WIDE <= LANES; lane += 2 * WIDE) store_as(to + lane, load_as<V>(from + lane), load_as<V>(from + lane + WIDE));
    if (lane < LANES) store_as(to + lane, load_as<V>(from + lane));
  }
}

// A run of elements, often too short for it to pay that memcpy is called. The last ones may be copied anew.
template <class To, class From>
inline void copy_run(To* to, const From* from, Index count) {
  Index i = 0;
  for (; i + 48 <= count; i += 48) copy_lanes<48>(to + i, from + i);  // almost all of 7 x 7 taps
  for (; i + 16 <= count; i += 16) copy_lanes<16>(to + i, from + i);
  if (i > 0 && i + 4 <= count) return copy_lanes<16>(to + count - 16, from + count - 16);
  for (; i + 4 <= count; i += 4) copy_lanes<4>(to + i, from + i);
  if (i < count && count >= 4) return copy_lanes<4>(to + count - 4, from + count - 4);
  for (; i < count; ++i) copy_lanes<1>(to + i, from + i);
}

}  // namespace
