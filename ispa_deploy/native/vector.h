/* What the kernels share: bfloat16 in and out of registers, and powers of two. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

static inline __m512 load_bf16(const uint16_t *x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

static inline void store_bf16(uint16_t *y, __m512 x) { _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(x)); }

/* 2^x to 2e-7 for x <= 127; 0 below -150, -inf included. Coefficients: minimax of 2^f on [0, 1], degree 5. */
static inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x); /* in this order NaN stays */
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(1.8775767e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(8.9893397e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5826318e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4015361e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9315308e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.9999994e-1f));
  return _mm512_scalef_ps(y, x); /* takes the whole part of x itself */
}
