/* Sums of outer products of bfloat16 rows on AVX512-BF16: totals += weight * aᵀa (upper triangle) and weight * aᵀf.
 *
 * Products of bfloat16 numbers are exact in float32, sums are float32. Two rows at a time are interleaved into panels
 * of PANEL columns, (panel, 2 rows, PANEL, 2): one such pair of a column is what a dot product reads, for the rows of a
 * tile as well as for its columns, so one packed form of `a` serves on both sides.
 */
#include <immintrin.h>
#include <stdint.h>

#include "vector.h"

#define PANEL 48
#define TILE 8
#define BLOCK 256 /* pairs of rows packed at a time: a panel of them stays in the second level of cache */

typedef uint16_t bf16;

static inline int64_t panels(int64_t width) { return (width + PANEL - 1) / PANEL; }

/* One panel of `rows` rows; what lies past the last row or column is zero. sum (PANEL) += the rows. */
static void pack(const bf16 *x, int64_t stride, int64_t rows, int columns, uint32_t *to, float *sum) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (int c = 0; c < PANEL; c += 16) {
    if (c >= columns) {
      for (int64_t p = 0; p < (rows + 1) / 2; p++) _mm512_storeu_si512(to + p * PANEL + c, _mm512_setzero_si512());
      continue;
    }
    __m512 total = _mm512_loadu_ps(sum + c);
    for (int64_t r = 0; r < rows; r += 2) {
      __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + r * stride + c)));
      if (r + 1 < rows) {
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + (r + 1) * stride + c)));
        both = _mm512_or_si512(both, _mm512_slli_epi32(odd, 16));
      }
      total = _mm512_dpbf16_ps(total, (__m512bh)both, ones);
      _mm512_storeu_si512(to + r / 2 * PANEL + c, both);
    }
    _mm512_storeu_ps(sum + c, total);
  }
}

/* c (TILE, columns <= PANEL) += weight * what `pairs` pairs of rows of a (TILE of its panel) and b give. */
static void tile(const uint32_t *a, const uint32_t *b, int64_t pairs, float weight, float *c, int64_t stride, int columns) {
  __m512 sum[TILE][3];
  for (int i = 0; i < TILE; i++)
    for (int j = 0; j < 3; j++) {
      sum[i][j] = _mm512_setzero_ps();
      if (16 * j < columns) __builtin_prefetch(c + i * stride + 16 * j, 1); /* the totals of all layers outgrow the caches */
    }
  for (int64_t p = 0; p < pairs; p++, a += PANEL, b += PANEL) {
    __m512bh right[3];
    for (int j = 0; j < 3; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i]);
#pragma GCC unroll 3
      for (int j = 0; j < 3; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
  const __m512 factor = _mm512_set1_ps(weight);
  for (int i = 0; i < TILE; i++)
    for (int j = 0; j < 3 && 16 * j < columns; j++) {
      float *at = c + i * stride + 16 * j;
      _mm512_storeu_ps(at, _mm512_fmadd_ps(factor, sum[i][j], _mm512_loadu_ps(at)));
    }
}

/* a, f (rows, width) with row strides; gram, cross (width, width); sums (2, panels * PANEL) of a and f, to add to;
 * room: see ispa_sums_room. width is a multiple of 16. */
void ispa_sums(const bf16 *a, const bf16 *f, int64_t rows, int64_t width, int64_t a_stride, int64_t f_stride, float weight,
               float *gram, float *cross, float *sums, uint32_t *room) {
  const int64_t count = panels(width), size = BLOCK * PANEL;
  uint32_t *packed_f = room + count * size;
  for (int64_t first = 0; first < rows; first += 2 * BLOCK) {
    const int64_t here = rows - first < 2 * BLOCK ? rows - first : 2 * BLOCK, pairs = (here + 1) / 2;
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < 2 * count; n++) {
        const int64_t panel = n % count, left = width - panel * PANEL;
        const int columns = (int)(left < PANEL ? left : PANEL);
        const bf16 *x = n < count ? a + first * a_stride : f + first * f_stride;
        pack(x + panel * PANEL, n < count ? a_stride : f_stride, here, columns, room + n * size, sums + n * PANEL);
      }
#pragma omp for schedule(dynamic)
      for (int64_t panel = 0; panel < count; panel++) {
        const int64_t column = panel * PANEL, left = width - column;
        const int columns = (int)(left < PANEL ? left : PANEL);
        for (int64_t row = 0; row < width; row += TILE) {
          const uint32_t *mine = room + row / PANEL * size + row % PANEL;
          tile(mine, packed_f + panel * size, pairs, weight, cross + row * width + column, width, columns);
          if (row < column + columns) tile(mine, room + panel * size, pairs, weight, gram + row * width + column, width, columns);
        }
      }
    }
  }
}

/* Elements of uint32. */
int64_t ispa_sums_room(int64_t width) { return 2 * panels(width) * BLOCK * PANEL; }

int64_t ispa_sums_columns(int64_t width) { return panels(width) * PANEL; }
