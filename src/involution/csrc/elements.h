// Types of elements, and conversions between them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
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

}  // namespace
