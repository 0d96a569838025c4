/* Attention with log-sum-exp for bfloat16 on AVX512-BF16. Scores and sums are float32, weights meet values in bfloat16.
 *
 * Keys and values are packed once per call into the order the dot products read them:
 *   keys   (head, 16 keys, D / 2 pairs, 16, 2)     values  (head, 2 keys, D / 16 columns, 16, 2)
 * Then every block of QUERY_BLOCK queries walks the keys KEY_BLOCK at a time, ROWS queries in registers. The softmax
 * keeps a running reference per row; it follows the maximum only when that has risen by more than SLACK powers of two,
 * which changes no result (reference and sum move together) and makes rescaling rare.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "vector.h"

#define ROWS 6
#define QUERY_BLOCK 78
#define KEY_BLOCK 256
#define SLACK 8.0f

typedef uint16_t bf16;

typedef struct {
  const bf16 *q, *k, *v;
  bf16 *out;
  float *lse;
  bf16 *packed_k, *packed_v;
  int64_t batch, heads, queries, keys;
  int64_t q_item, q_row, q_head, k_item, k_row, k_head, v_item, v_row, v_head; /* strides in elements */
  float scale;
} Call;

static inline int64_t padded(int64_t keys) { return (keys + 63) / 64 * 64; }

static inline __m512bh bf(__m512i x) { return (__m512bh)x; }

/* 16 keys at a time: a 16 x 16 transposition of pairs. Keys past the end are zero. */
static void pack_keys(const bf16 *k, int64_t row, int64_t keys, int width, bf16 *to) {
  const __m512i step = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)(row / 2)));
  for (int64_t n = 0; n < padded(keys); n += 16) {
    int64_t left = keys - n;
    __mmask16 inside = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
    for (int d = 0; d < width / 2; d++, to += 32)
      _mm512_storeu_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), inside, step, (const int *)(k + n * row) + d, 4));
  }
}

static void pack_values(const bf16 *v, int64_t row, int64_t keys, int width, bf16 *to) {
  for (int64_t n = 0; n < padded(keys); n += 2)
    for (int c = 0; c < width; c += 16, to += 32) {
      __m512i even = _mm512_setzero_si512(), odd = even;
      if (n < keys) even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v + n * row + c)));
      if (n + 1 < keys) odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v + (n + 1) * row + c)));
      _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

/* Scores of ROWS queries with `count` keys (a multiple of 64) into s (ROWS, KEY_BLOCK). */
static inline __attribute__((always_inline)) void scores(
    const bf16 *const q[ROWS], const bf16 *k, int count, int width, float *s) {
  for (int n = 0; n < count; n += 64, k += 64 * width) {
    __m512 sum[ROWS][4];
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
    for (int d = 0; d < width / 2; d++) {
      __m512bh key[4];
      for (int j = 0; j < 4; j++) key[j] = bf(_mm512_loadu_si512(k + ((int64_t)j * (width / 2) + d) * 32));
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) {
        int32_t pair;
        memcpy(&pair, q[i] + 2 * d, 4);
        __m512bh query = bf(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], query, key[j]);
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < 4; j++) _mm512_storeu_ps(s + i * KEY_BLOCK + n + 16 * j, sum[i][j]);
  }
}

/* out (rows, width) float32 += weights (ROWS, KEY_BLOCK) x values; columns in groups of at most 64. */
static inline __attribute__((always_inline)) void weigh(
    const bf16 *p, const bf16 *v, int count, int width, float *out, int rows) {
  for (int c = 0; c < width; c += 64) {
    const int groups = (width - c < 64 ? width - c : 64) / 16;
    __m512 sum[ROWS][4];
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < groups; j++) sum[i][j] = i < rows ? _mm512_loadu_ps(out + i * width + c + 16 * j) : _mm512_setzero_ps();
    for (int n = 0; n < count / 2; n++) {
      __m512bh value[4];
      for (int j = 0; j < groups; j++) value[j] = bf(_mm512_loadu_si512(v + (int64_t)n * 2 * width + (c / 16 + j) * 32));
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) {
        int32_t pair;
        memcpy(&pair, p + i * KEY_BLOCK + 2 * n, 4);
        __m512bh weight = bf(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int j = 0; j < groups; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], weight, value[j]);
      }
    }
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < groups; j++) _mm512_storeu_ps(out + i * width + c + 16 * j, sum[i][j]);
  }
}

static inline __attribute__((always_inline)) void soften(
    const float *s, bf16 *p, int count, float scale, float *reference, float *total, float *out, int width) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int n = 0; n < count; n += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + n));
  const float highest = _mm512_reduce_max_ps(top) * scale;
  if (highest > *reference + SLACK) {
    const __m512 fade = exp2_ps(_mm512_set1_ps(*reference - highest));
    for (int c = 0; c < width; c += 16) _mm512_storeu_ps(out + c, _mm512_mul_ps(_mm512_loadu_ps(out + c), fade));
    *total *= _mm512_cvtss_f32(fade);
    *reference = highest;
  }
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-*reference);
  __m512 sum = _mm512_setzero_ps();
  for (int n = 0; n < count; n += 32) {
    __m512 a = exp2_ps(_mm512_fmadd_ps(_mm512_loadu_ps(s + n), factor, shift));
    __m512 b = exp2_ps(_mm512_fmadd_ps(_mm512_loadu_ps(s + n + 16), factor, shift));
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    _mm512_storeu_si512(p + n, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  *total += _mm512_reduce_add_ps(sum);
}

static inline __attribute__((always_inline)) void query_block(
    const Call *c, int64_t item, int64_t head, int64_t first, const int width) {
  const int rows = (int)(c->queries - first < QUERY_BLOCK ? c->queries - first : QUERY_BLOCK);
  const int64_t at = item * c->heads + head, room = padded(c->keys);
  const bf16 *pk = c->packed_k + at * room * width, *pv = c->packed_v + at * room * width;
  const bf16 *q = c->q + item * c->q_item + head * c->q_head + first * c->q_row;
  float out[QUERY_BLOCK * 128], reference[QUERY_BLOCK], total[QUERY_BLOCK], s[ROWS * KEY_BLOCK];
  bf16 p[ROWS * KEY_BLOCK];
  memset(out, 0, sizeof(float) * rows * width);
  for (int r = 0; r < rows; r++) reference[r] = -INFINITY, total[r] = 0;
  for (int64_t key = 0; key < room; key += KEY_BLOCK) {
    const int count = (int)(room - key < KEY_BLOCK ? room - key : KEY_BLOCK);
    const int real = (int)(c->keys - key < count ? c->keys - key : count);
    for (int r = 0; r < rows; r += ROWS) {
      const int mine = rows - r < ROWS ? rows - r : ROWS;
      const bf16 *row[ROWS];
      for (int i = 0; i < ROWS; i++) row[i] = q + (r + (i < mine ? i : 0)) * c->q_row;
      scores(row, pk + key * width, count, width, s);
      for (int i = 0; i < mine; i++) {
        for (int n = real; n < count; n++) s[i * KEY_BLOCK + n] = -INFINITY;
        soften(s + i * KEY_BLOCK, p + i * KEY_BLOCK, count, c->scale, reference + r + i, total + r + i, out + (r + i) * width, width);
      }
      for (int i = mine; i < ROWS; i++) memset(p + i * KEY_BLOCK, 0, sizeof(bf16) * count);
      weigh(p, pv + key * width, count, width, out + r * width, mine);
    }
  }
  for (int r = 0; r < rows; r++) {
    const int64_t target = (item * c->queries + first + r) * c->heads + head;
    const __m512 share = _mm512_set1_ps(1.0f / total[r]);
    for (int d = 0; d < width; d += 16) store_bf16(c->out + target * width + d, _mm512_mul_ps(_mm512_loadu_ps(out + r * width + d), share));
    c->lse[target] = (reference[r] + log2f(total[r])) * 0.6931471805599453f;
  }
}

static void block_of(const Call *c, int64_t item, int64_t head, int64_t first, int width) {
  switch (width) { /* a constant, so that every loop over it unrolls */
    case 32: query_block(c, item, head, first, 32); break;
    case 64: query_block(c, item, head, first, 64); break;
    case 96: query_block(c, item, head, first, 96); break;
    default: query_block(c, item, head, first, 128);
  }
}

/* sizes: batch, heads, queries, keys, width, then the nine strides of Call. `room`: bf16 elements, see attention_room. */
void ispa_attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, bf16 *room, const int64_t *sizes, float scale) {
  const int width = (int)sizes[4];
  Call call = {q, k, v, out, lse, room, room + sizes[0] * sizes[1] * padded(sizes[3]) * width,
               sizes[0], sizes[1], sizes[2], sizes[3], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10],
               sizes[11], sizes[12], sizes[13], scale};
  const Call *c = &call;
  const int64_t lanes = c->batch * c->heads, blocks = (c->queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < lanes; at++) {
      const int64_t item = at / c->heads, head = at % c->heads, size = at * padded(c->keys) * width;
      pack_keys(k + item * c->k_item + head * c->k_head, c->k_row, c->keys, width, c->packed_k + size);
      pack_values(v + item * c->v_item + head * c->v_head, c->v_row, c->keys, width, c->packed_v + size);
    }
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < lanes * blocks; job++) {
      const int64_t at = job / blocks;
      block_of(c, at / c->heads, at % c->heads, job % blocks * QUERY_BLOCK, width);
    }
  }
}

int64_t ispa_attention_room(int64_t batch, int64_t heads, int64_t keys, int64_t width) {
  return 2 * batch * heads * padded(keys) * width;
}
