/* One register of floats or integers, on AVX512-VNNI and on AVX2: for kernels that are compiled for either. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

#ifdef __AVX512VNNI__
#define LANES 16
typedef __m512 Floats;
typedef __m512i Ints;
static inline Floats load(const float *x) { return _mm512_loadu_ps(x); }
static inline void store(float *y, Floats x) { _mm512_storeu_ps(y, x); }
static inline Floats every(float x) { return _mm512_set1_ps(x); }
static inline Ints every_int(int32_t x) { return _mm512_set1_epi32(x); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats muladd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline float first_of(Floats x) { return _mm512_cvtss_f32(x); }
static inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
static inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
static inline Floats as_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
/* 2^x to 3e-6 for x <= 127; 0 below -150, -inf included. Coefficients: minimax of 2^f on [0, 1], degree 4. */
static inline Floats power_of_two(Floats x) {
  const Floats f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats y = every(1.3534168e-2f);
  y = muladd(y, f, every(5.2011461e-2f));
  y = muladd(y, f, every(2.4144276e-1f));
  y = muladd(y, f, every(6.9300383e-1f));
  y = muladd(y, f, every(1.0000026f));
  return _mm512_scalef_ps(y, x); /* takes the whole part of x itself */
}
static inline Ints load_bytes(const int8_t *x) { return _mm512_loadu_si512(x); }
/* sum + products of four neighbours: unsigned bytes with signed ones. */
static inline Ints dot4(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
static inline void store_uint8(uint8_t *y, Floats x) {
  _mm_storeu_si128((__m128i *)y, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
}
#else
#define LANES 8
typedef __m256 Floats;
typedef __m256i Ints;
static inline Floats load(const float *x) { return _mm256_loadu_ps(x); }
static inline void store(float *y, Floats x) { _mm256_storeu_ps(y, x); }
static inline Floats every(float x) { return _mm256_set1_ps(x); }
static inline Ints every_int(int32_t x) { return _mm256_set1_epi32(x); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats muladd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline float first_of(Floats x) { return _mm256_cvtss_f32(x); }
static inline float largest(Floats x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
static inline float sum_of(Floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
static inline Floats as_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
/* 2 * LANES bytes as 16-bit numbers. */
static inline Ints load_wide(const int8_t *x) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)x)); }
/* sum + products of neighbours, 16 bits each. */
static inline Ints dot2(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
static inline void store_int16(int16_t *y, Floats x) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  _mm_storeu_si128((__m128i *)y, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
/* 2^x to 3e-6 for x <= 127; 2^-120 below that. Coefficients: minimax of 2^f on [-1/2, 1/2], degree 4. */
static inline Floats power_of_two(Floats x) {
  const Floats rounder = every(12582912.0f); /* 1.5 * 2^23: what is added to it is rounded to an integer */
  x = larger(every(-120.0f), x);             /* in this order NaN stays */
  const Floats n = add(x, rounder), f = sub(x, sub(n, rounder));
  Floats y = every(9.5701017e-3f);
  y = muladd(y, f, every(5.5917860e-2f));
  y = muladd(y, f, every(2.4024745e-1f));
  y = muladd(y, f, every(6.9312181e-1f));
  y = muladd(y, f, every(9.9999926e-1f));
  const Ints power = _mm256_slli_epi32(_mm256_castps_si256(n), 23); /* n in the lowest bits */
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
}
#endif
