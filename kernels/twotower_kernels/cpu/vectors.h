// Functions that the kernels share: bf16 in vectors of fp32, and functions of a vector.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

using bf16 = uint16_t;

constexpr int kLane = 32;   // bf16 values of a vector
constexpr int kFloats = 16;  // fp32 values of a vector

inline __m512bh load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512bh load(const bf16* p, int count) {
  return (__m512bh)_mm512_maskz_loadu_epi16(count >= kLane ? ~0u : (1u << count) - 1, p);
}

// 16 bf16 as fp32.
inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m512 load_wide(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512 load_wide(const bf16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }

inline float widen(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// The first `count` of 16 lanes.
inline __mmask16 lanes(int64_t count) { return count >= kFloats ? 0xffff : (1u << count) - 1; }

// 16 values rounded to nearest even.
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline void store_bf16(bf16* to, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(v)); }
inline void store_bf16(bf16* to, __m512 v, __mmask16 mask) { _mm256_mask_storeu_epi16(to, mask, narrow(v)); }
inline __m512 rounded(__m512 v) { return widen(narrow(v)); }

// The sums of 16 vectors, in order.
inline __m512 sums(const __m512* v) {
  __m512 a[8], b[4];
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

// e^x within 2 ulp: e^x = 2^n e^r, |r| <= ln(2) / 2. NaN stays NaN.
inline __m512 exp(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));  // of NaN the second operand
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace
