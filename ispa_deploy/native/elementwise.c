/* The passes between matrix products, each over one row at a time while it lies in the cache: residual, norm and
 * modulation; GELU; quantisation; rotation. Arithmetic is float32, results are rounded once.
 *
 * `wide` tells float32 (1) from bfloat16 (0). Every row length is a multiple of 16.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "vector.h"

#define ROW_LIMIT 16384 /* floats of one row on the stack */
#define FOR_ROWS _Pragma("omp parallel for schedule(static)") for (int64_t row = 0; row < rows; row++)

static inline __m512 load(const void *x, int64_t at, int wide) {
  return wide ? _mm512_loadu_ps((const float *)x + at) : load_bf16((const uint16_t *)x + at);
}

static inline void store(void *y, int64_t at, __m512 value, int wide) {
  if (wide) _mm512_storeu_ps((float *)y + at, value);
  else store_bf16((uint16_t *)y + at, value);
}

/* Bits of magnitudes order as integers, NaN above infinity: the maximum drops nothing. */
static inline __m512i larger(__m512i most, __m512 value) {
  return _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff)));
}

static inline float step_within(__m512i most, float codes) {
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float amax;
  memcpy(&amax, &bits, 4);
  if (!(amax < INFINITY)) return NAN;
  const float step = amax / codes;
  return step > 1.17549435e-38f ? step : 1.17549435e-38f;
}

static inline float step_of(__m512i most) { return step_within(most, 127.0f); }

/* Whole numbers -128..127, what lies outside at the ends, as 128 + each. */
static inline void store_offset(uint8_t *to, __m512i code) {
  _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_setzero_si512(), _mm512_add_epi32(code, _mm512_set1_epi32(128)))));
}

/* Code 128 + round(value / step), as uint8. */
static inline void store_code(uint8_t *to, __m512 value, __m512 inverse) {
  store_offset(to, _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse))); /* rounds half to even */
}

static inline __m512 gelu_tanh(__m512 x) {
  /* x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the exponent in powers of two */
  const __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 inner = _mm512_fmadd_ps(cubed, _mm512_set1_ps(0.044715f), x);
  __m512 power = _mm512_mul_ps(inner, _mm512_set1_ps(-2.302208198f));
  power = _mm512_min_ps(_mm512_set1_ps(126.0f), power); /* in this order NaN stays */
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_ps(power)));
}

/* x, times `by` where channels are smoothed */
static inline __m512 smoothed(const void *x, int64_t at, int64_t column, int wide, const float *by) {
  const __m512 value = load(x, at + column, wide);
  return by ? _mm512_mul_ps(value, _mm512_loadu_ps(by + column)) : value;
}

static inline __attribute__((always_inline)) void quantise_row(
    const void *x, int64_t at, int64_t columns, int wide, const float *by, uint8_t *codes, float *scale) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += 16) most = larger(most, smoothed(x, at, c, wide, by));
  *scale = step_of(most);
  const __m512 inverse = _mm512_set1_ps(1.0f / *scale);
  for (int64_t c = 0; c < columns; c += 16) store_code(codes + c, smoothed(x, at, c, wide, by), inverse);
}

/* x (rows, columns) with `stride` between rows, times by (columns) or NULL -> codes (rows, columns) uint8, scale (rows) */
void ispa_quantise(const void *x, int wide, int64_t rows, int64_t columns, int64_t stride, const float *by, uint8_t *codes, float *scale) {
  if (by) FOR_ROWS quantise_row(x, row * stride, columns, wide, by, codes + row * columns, scale + row);
  else if (wide) FOR_ROWS quantise_row(x, row * stride, columns, 1, NULL, codes + row * columns, scale + row);
  else FOR_ROWS quantise_row(x, row * stride, columns, 0, NULL, codes + row * columns, scale + row);
}

/* As `ispa_quantise` in 16 bits: a row of codes is `columns` high ones and then `columns` low ones, high * 256 + low. */
void ispa_quantise_wide(const void *x, int wide, int64_t rows, int64_t columns, int64_t stride, const float *by, uint8_t *codes, float *scale) {
  FOR_ROWS {
    uint8_t *high = codes + 2 * row * columns, *low = high + columns;
    __m512i most = _mm512_setzero_si512();
    for (int64_t c = 0; c < columns; c += 16) most = larger(most, smoothed(x, row * stride, c, wide, by));
    scale[row] = step_within(most, 32639.0f);
    const __m512 inverse = _mm512_set1_ps(1.0f / scale[row]);
    for (int64_t c = 0; c < columns; c += 16) {
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(smoothed(x, row * stride, c, wide, by), inverse));
      const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
      store_offset(high + c, above);
      store_offset(low + c, _mm512_sub_epi32(code, _mm512_slli_epi32(above, 8)));
    }
  }
}

/* y = (256 * x[2 row] + x[2 row + 1]) * scale + bias: the products of the high and the low codes of each row */
void ispa_join_wide(const float *x, const float *scale, const float *bias, void *y, int wide_out, int64_t rows, int64_t columns) {
  FOR_ROWS {
    const float *high = x + 2 * row * columns, *low = high + columns;
    const __m512 factor = _mm512_set1_ps(scale[row]);
    for (int64_t c = 0; c < columns; c += 16) {
      const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(high + c), _mm512_set1_ps(256.0f), _mm512_loadu_ps(low + c));
      const __m512 value = _mm512_mul_ps(sum, factor);
      store(y, row * columns + c, bias ? _mm512_add_ps(value, _mm512_loadu_ps(bias + c)) : value, wide_out);
    }
  }
}

static inline __m512 rescaled(const void *x, int64_t at, int wide, __m512 factor, const float *bias, int64_t column) {
  const __m512 y = _mm512_mul_ps(load(x, at, wide), factor);
  return bias ? _mm512_add_ps(y, _mm512_loadu_ps(bias + column)) : y;
}

/* y = x * scale + bias, then GELU where asked; y may be x */
void ispa_rescale(const void *x, int wide, const float *scale, const float *bias, void *y, int wide_out, int gelu, int64_t rows, int64_t columns) {
  FOR_ROWS {
    const __m512 factor = _mm512_set1_ps(scale[row]);
    for (int64_t c = 0; c < columns; c += 16) {
      const __m512 value = rescaled(x, row * columns + c, wide, factor, bias, c);
      store(y, row * columns + c, gelu ? gelu_tanh(value) : value, wide_out);
    }
  }
}

/* GELU(x * scale + bias), times by (columns) or NULL -> codes and scales of the next product */
void ispa_gelu_quantise(const void *x, int wide, const float *scale, const float *bias, const float *by, uint8_t *codes, float *next, int64_t rows, int64_t columns) {
  FOR_ROWS {
    float values[ROW_LIMIT];
    const __m512 factor = _mm512_set1_ps(scale[row]);
    __m512i most = _mm512_setzero_si512();
    for (int64_t c = 0; c < columns; c += 16) {
      __m512 value = gelu_tanh(rescaled(x, row * columns + c, wide, factor, bias, c));
      if (by) value = _mm512_mul_ps(value, _mm512_loadu_ps(by + c));
      _mm512_storeu_ps(values + c, value);
      most = larger(most, value);
    }
    next[row] = step_of(most);
    const __m512 inverse = _mm512_set1_ps(1.0f / next[row]);
    for (int64_t c = 0; c < columns; c += 16) store_code(codes + row * columns + c, _mm512_loadu_ps(values + c), inverse);
  }
}

/* One row of bfloat16: sum = x + gate * y, kept in `sum` and in `values`; then LayerNorm of it, times `scale` (plus 1 if
 * `one`), plus shift, into `normed`, or times `by` into codes and their scale. y is a row of values, or with `row_scale`
 * of products that still lack it and their bias. y, gate, row_scale, bias, by, normed and codes may be NULL. */
typedef struct {
  const uint16_t *x, *y, *gate, *scale, *shift;
  const float *row_scale, *bias, *by;
  uint16_t *sum, *normed;
  uint8_t *codes;
  float *code_scale;
  int64_t columns, group;
  float eps;
  int one;
} Passage;

static void passage(const Passage *p, int64_t row) {
  const int64_t n = p->columns, at = row * n, own = p->group ? row / p->group * n : 0;
  float values[ROW_LIMIT];
  const __m512 dequantise = _mm512_set1_ps(p->row_scale ? p->row_scale[row] : 1.0f);
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < n; c += 16) {
    __m512 x = load_bf16(p->x + at + c);
    if (p->y) {
      const __m512 y = p->row_scale ? rescaled(p->y, at + c, 0, dequantise, p->bias, c) : load_bf16(p->y + at + c);
      x = p->gate ? _mm512_fmadd_ps(load_bf16(p->gate + own + c), y, x) : _mm512_add_ps(x, y);
      store_bf16(p->sum + at + c, x);
      x = load_bf16(p->sum + at + c); /* what later layers will read is what is normed */
    }
    _mm512_storeu_ps(values + c, x);
    total = _mm512_add_ps(total, x);
  }
  if (!p->normed && !p->codes) return;
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / n);
  __m512 square = _mm512_setzero_ps();
  for (int64_t c = 0; c < n; c += 16) {
    const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(values + c), mean);
    square = _mm512_fmadd_ps(off, off, square);
  }
  const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(square) / n + p->eps));
  const __m512 one = _mm512_set1_ps(p->one ? 1.0f : 0.0f);
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < n; c += 16) {
    const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(values + c), mean), factor);
    __m512 y = _mm512_fmadd_ps(normed, _mm512_add_ps(one, load_bf16(p->scale + own + c)), load_bf16(p->shift + own + c));
    if (p->normed) {
      store_bf16(p->normed + at + c, y);
      continue;
    }
    if (p->by) y = _mm512_mul_ps(y, _mm512_loadu_ps(p->by + c));
    _mm512_storeu_ps(values + c, y);
    most = larger(most, y);
  }
  if (p->normed) return;
  p->code_scale[row] = step_of(most);
  const __m512 inverse = _mm512_set1_ps(1.0f / p->code_scale[row]);
  for (int64_t c = 0; c < n; c += 16) store_code(p->codes + at + c, _mm512_loadu_ps(values + c), inverse);
}

void ispa_passage(const Passage *p, int64_t rows) { FOR_ROWS passage(p, row); }

/* Root-mean-square norm times weight, bfloat16; `stride` between the rows of x */
void ispa_rms(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t rows, int64_t columns, int64_t stride, float eps) {
  FOR_ROWS {
    __m512 square = _mm512_setzero_ps();
    for (int64_t c = 0; c < columns; c += 16) {
      const __m512 v = load_bf16(x + row * stride + c);
      square = _mm512_fmadd_ps(v, v, square);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(square) / columns + eps));
    for (int64_t c = 0; c < columns; c += 16)
      store_bf16(y + row * columns + c, _mm512_mul_ps(_mm512_mul_ps(load_bf16(x + row * stride + c), factor), load_bf16(weight + c)));
  }
}

/* Neighbouring channels as complex numbers, bfloat16 (rows, heads, width) times turn (turns, width) of (cos, sin) pairs;
 * row r turns by r % turns. */
void ispa_rotate(const uint16_t *x, const float *turn, uint16_t *y, int64_t rows, int64_t heads, int64_t width, int64_t stride, int64_t turns) {
  FOR_ROWS {
    const float *angle = turn + row % turns * width;
    for (int64_t c = 0; c < heads * width; c += 16) {
      const __m512 v = load_bf16(x + row * stride + c), t = _mm512_loadu_ps(angle + c % width);
      const __m512 swapped = _mm512_permute_ps(v, 0xB1);
      store_bf16(y + row * heads * width + c, _mm512_fmaddsub_ps(v, _mm512_moveldup_ps(t), _mm512_mul_ps(swapped, _mm512_movehdup_ps(t))));
    }
  }
}
