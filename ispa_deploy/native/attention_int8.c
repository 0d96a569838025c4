/* Attention that reads keys and values as int8 codes with a scale per token and head, with log-sum-exp.
 *
 * Queries get codes of their own, a scale per token and head. Scores are integer products times both scales, the softmax
 * is float32, and weights times the values' scales become 16-bit integers that meet the values' codes: sums are int32
 * within a block of keys and float32 across blocks. The result may go on from attention over other keys (`before`),
 * which is an exact merge at no cost. Codes are packed once per call, byte for byte, in the order the products read them:
 *   keys   (head, LANES keys, D / GROUP, LANES, GROUP)      values  (head, 2 keys, D, 2)
 * Then every block of QUERY_BLOCK queries walks the keys KEY_BLOCK at a time, ROWS queries in registers.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

#define ROWS 6
#define QUERY_BLOCK 78
#define KEY_BLOCK 256 /* 32767 * 127 * 256 fits int32 */
#define WIDEST 128
#define TOP 32767.0f
#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512VNNI__
/* Bytes of keys are unsigned, 128 above their codes: every sum starts with -128 times the query's codes. */
#define GROUP 4
#define WIDE 4 /* registers of keys, or of columns, at a time */
#define OFFSET 128
typedef int8_t QueryCode;
INLINE Ints load_keys(const int8_t *k) { return load_bytes(k); }
INLINE Ints multiply(Ints sum, Ints keys, Ints query) { return dot4(sum, keys, query); }
#else
#define GROUP 2
#define WIDE 2
#define OFFSET 0
typedef int16_t QueryCode;
INLINE Ints load_keys(const int8_t *k) { return load_wide(k); }
INLINE Ints multiply(Ints sum, Ints keys, Ints query) { return dot2(sum, keys, query); }
#endif

#define TILE (WIDE * LANES)

/* Without it gcc moves sums to memory and back in the innermost loops. */
INLINE Ints keep_here(Ints x) {
  __asm__ volatile("" : "+v"(x));
  return x;
}

typedef struct {
  int64_t item, row, head; /* in elements */
} Strides;

typedef struct {
  const void *q; /* float32 if `wide`, else bfloat16; so are out and out_before */
  const int8_t *k, *v;
  const uint16_t *k_scale, *v_scale; /* float16 */
  const void *out_before;            /* (batch, queries, heads, width) and (batch, queries, heads), or NULL */
  const float *lse_before;
  void *out;
  float *lse;
  int8_t *packed_k, *packed_v;
  float *scales_k, *scales_v, *peaks; /* (lane, keys) twice, (lane, 2): largest scale of the values, NaN or 0 */
  int64_t batch, heads, queries, keys, width, wide;
  Strides at_q, at_k, at_k_scale, at_v, at_v_scale;
  float scale; /* of scores, in powers of two */
} Call;

/* What one block of queries of one head holds while it walks the keys. */
typedef struct {
  QueryCode codes[QUERY_BLOCK * WIDEST];
  float factor[QUERY_BLOCK], poison[QUERY_BLOCK], reference[QUERY_BLOCK], total[QUERY_BLOCK];
  int32_t start[QUERY_BLOCK];
  float out[QUERY_BLOCK * WIDEST];
} Block;

static inline int64_t padded(int64_t keys) { return (keys + 63) / 64 * 64; }

static inline float of_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return isnan(x) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void pack_keys(const int8_t *k, int64_t row, int64_t keys, int width, int8_t *to) {
  for (int64_t n = 0; n < padded(keys); n += LANES, to += LANES * width)
    for (int i = 0; i < LANES; i++) {
      const int8_t *from = k + (n + i) * row;
      for (int d = 0; d < width / GROUP; d++) {
        int8_t *group = to + (d * LANES + i) * GROUP;
        if (n + i < keys)
          for (int g = 0; g < GROUP; g++) group[g] = (int8_t)(from[d * GROUP + g] ^ OFFSET);
        else
          memset(group, 0, GROUP);
      }
    }
}

static void pack_values(const int8_t *v, int64_t row, int64_t keys, int width, int8_t *to) {
  static const int8_t zeros[WIDEST];
  for (int64_t n = 0; n < padded(keys); n += 2, to += 2 * width) {
    const int8_t *a = n < keys ? v + n * row : zeros, *b = n + 1 < keys ? v + (n + 1) * row : zeros;
    for (int d = 0; d < width; d++) to[2 * d] = a[d], to[2 * d + 1] = b[d];
  }
}

/* float16 scales -> float32, 0 behind the end and in place of what is not finite. Returns 0, or NaN for such a one. */
static float unpack_scales(const uint16_t *x, int64_t row, int64_t keys, float *to) {
  float poison = 0;
  for (int64_t n = 0; n < padded(keys); n++) {
    const float scale = n < keys ? _cvtsh_ss(x[n * row]) : 0;
    const float lost = scale * 0.0f;
    poison += lost;
    to[n] = isnan(lost) ? 0 : scale;
  }
  return poison;
}

static void pack(const Call *c, int64_t item, int64_t head) {
  const int64_t lane = item * c->heads + head, room = padded(c->keys), width = c->width;
  float *scales = c->scales_v + lane * room, top = 0;
  pack_keys(c->k + item * c->at_k.item + head * c->at_k.head, c->at_k.row, c->keys, (int)width, c->packed_k + lane * room * width);
  pack_values(c->v + item * c->at_v.item + head * c->at_v.head, c->at_v.row, c->keys, (int)width, c->packed_v + lane * room * width);
  const Strides k = c->at_k_scale, v = c->at_v_scale;
  c->peaks[2 * lane + 1] = unpack_scales(c->k_scale + item * k.item + head * k.head, k.row, c->keys, c->scales_k + lane * room);
  const float poison = unpack_scales(c->v_scale + item * v.item + head * v.head, v.row, c->keys, scales);
  for (int64_t n = 0; n < room; n++) top = scales[n] > top ? scales[n] : top;
  const float share = top > 0 ? TOP / top : 0;
  for (int64_t n = 0; n < room; n++) scales[n] *= share;
  c->peaks[2 * lane] = top + poison;
}

/* One query (width numbers) -> codes; its factor to scores, and 0, or NaN where it is not finite. */
static void code_query(const Call *c, int64_t from, Block *b, int r) {
  const int width = (int)c->width;
  QueryCode *codes = b->codes + r * width;
  float x[WIDEST], top = 0, poison = 0;
  int32_t sum = 0;
  for (int d = 0; d < width; d++) x[d] = c->wide ? ((const float *)c->q)[from + d] : of_bf16(((const uint16_t *)c->q)[from + d]);
  for (int d = 0; d < width; d++) {
    const float size = fabsf(x[d]);
    top = size > top ? size : top;
    poison += x[d] * 0.0f;
  }
  const float step = top >= 1e-30f && !isnan(poison) ? top / 127.0f : 0;
  for (int d = 0; d < width; d++) {
    const int32_t code = step == 0 ? 0 : (int32_t)rintf(x[d] / step);
    codes[d] = (QueryCode)code;
    sum += code;
  }
  b->factor[r] = (step == 0 ? 1e-30f : step) * c->scale; /* above 0: times -inf it must not be NaN */
  b->poison[r] = poison;
  b->start[r] = -OFFSET * sum;
}

/* Scores of ROWS queries with `count` keys into s (ROWS, KEY_BLOCK), not yet times the queries' factors. */
INLINE void scores(const QueryCode *const q[ROWS], const int32_t start[ROWS], const int8_t *k, const float *scales, int count, int width, float *s) {
  for (int n = 0; n < count; n += TILE, k += TILE * width) {
    Ints sum[ROWS][WIDE];
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < WIDE; j++) sum[i][j] = every_int(start[i]);
    for (int d = 0; d < width / GROUP; d++) {
      Ints key[WIDE];
      for (int j = 0; j < WIDE; j++) key[j] = load_keys(k + ((int64_t)j * (width / GROUP) + d) * LANES * GROUP);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) {
        int32_t group;
        memcpy(&group, q[i] + GROUP * d, 4);
        const Ints query = every_int(group);
#pragma GCC unroll 4
        for (int j = 0; j < WIDE; j++) sum[i][j] = keep_here(multiply(sum[i][j], key[j], query));
      }
    }
    for (int j = 0; j < WIDE; j++) {
      const Floats scale = load(scales + n + j * LANES);
      for (int i = 0; i < ROWS; i++) store(s + i * KEY_BLOCK + n + j * LANES, mul(as_floats(sum[i][j]), scale));
    }
  }
}

/* out (rows, width) += weights (ROWS, KEY_BLOCK) x codes of values, in `groups` registers of columns. */
INLINE void weigh_columns(const int16_t *p, const int8_t *v, int count, int width, const int groups, float *out, int rows) {
  Ints sum[ROWS][WIDE];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < groups; j++) sum[i][j] = every_int(0);
  for (int n = 0; n < count / 2; n++) {
    Ints value[WIDE];
    for (int j = 0; j < groups; j++) value[j] = load_wide(v + (int64_t)n * 2 * width + 2 * j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
      int32_t pair;
      memcpy(&pair, p + i * KEY_BLOCK + 2 * n, 4);
      const Ints weight = every_int(pair);
#pragma GCC unroll 4
      for (int j = 0; j < groups; j++) sum[i][j] = keep_here(dot2(sum[i][j], weight, value[j]));
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < groups; j++) {
      float *to = out + i * width + j * LANES;
      store(to, add(load(to), as_floats(sum[i][j])));
    }
}

INLINE void weigh(const int16_t *p, const int8_t *v, int count, int width, float *out, int rows) {
  int c = 0;
  for (; c + TILE <= width; c += TILE) weigh_columns(p, v + 2 * c, count, width, WIDE, out + c, rows);
  if (c < width) weigh_columns(p, v + 2 * c, count, width, width % TILE / LANES, out + c, rows);
}

/* Scores of one query -> weights times the values' scales, as integers; reference, total and output follow the maximum. */
INLINE void soften(const float *s, const float *scales, int16_t *p, int count, Block *b, int r, int width) {
  const Floats factor = every(b->factor[r]);
  Floats top = every(-INFINITY);
  for (int n = 0; n < count; n += LANES) top = larger(top, load(s + n));
  const float highest = largest(top) * b->factor[r];
  if (highest > b->reference[r]) {
    const Floats fade = power_of_two(every(b->reference[r] - highest));
    float *out = b->out + r * width;
    for (int d = 0; d < width; d += LANES) store(out + d, mul(load(out + d), fade));
    b->total[r] *= largest(fade);
    b->reference[r] = highest;
  }
  const Floats shift = every(-b->reference[r]);
  Floats sum = every(0);
  for (int n = 0; n < count; n += LANES) {
    const Floats weight = power_of_two(muladd(load(s + n), factor, shift));
    sum = add(sum, weight);
    store_int16(p + n, mul(weight, load(scales + n)));
  }
  b->total[r] += sum_of(sum);
}

/* Where attention over other keys left off; reference and totals in powers of two, outputs in units of `unit`. */
static void begin(const Call *c, Block *b, int64_t target, int r, float unit) {
  const int width = (int)c->width;
  float *out = b->out + r * width;
  b->reference[r] = -INFINITY, b->total[r] = 0;
  memset(out, 0, sizeof(float) * width);
  if (c->lse_before == NULL || c->lse_before[target] == -INFINITY) return;
  b->reference[r] = c->lse_before[target] * 1.4426950408889634f, b->total[r] = 1;
  const float share = unit > 0 ? 1 / unit : 0;
  for (int d = 0; d < width; d++) {
    const int64_t at = target * width + d;
    out[d] = share * (c->wide ? ((const float *)c->out_before)[at] : of_bf16(((const uint16_t *)c->out_before)[at]));
  }
}

static void finish(const Call *c, const Block *b, int64_t target, int r, float unit, float poison) {
  const int width = (int)c->width;
  const float share = unit / b->total[r] + poison + b->poison[r];
  for (int d = 0; d < width; d++) {
    const float y = b->out[r * width + d] * share;
    const int64_t at = target * width + d;
    if (c->wide)
      ((float *)c->out)[at] = y;
    else
      ((uint16_t *)c->out)[at] = to_bf16(y);
  }
  c->lse[target] = (b->reference[r] + log2f(b->total[r])) * 0.6931471805599453f + poison + b->poison[r];
}

INLINE void query_block(const Call *c, int64_t item, int64_t head, int64_t first, const int width) {
  const int rows = (int)(c->queries - first < QUERY_BLOCK ? c->queries - first : QUERY_BLOCK);
  const int64_t lane = item * c->heads + head, room = padded(c->keys);
  const int8_t *k = c->packed_k + lane * room * width, *v = c->packed_v + lane * room * width;
  const float *scales_k = c->scales_k + lane * room, *scales_v = c->scales_v + lane * room;
  const float unit = c->peaks[2 * lane] / TOP, poison = c->peaks[2 * lane + 1];
  Block b;
  float s[ROWS * KEY_BLOCK];
  int16_t p[ROWS * KEY_BLOCK];
  for (int r = 0; r < rows; r++) {
    code_query(c, item * c->at_q.item + head * c->at_q.head + (first + r) * c->at_q.row, &b, r);
    begin(c, &b, (item * c->queries + first + r) * c->heads + head, r, unit);
  }
  for (int64_t key = 0; key < room; key += KEY_BLOCK) {
    const int count = (int)(room - key < KEY_BLOCK ? room - key : KEY_BLOCK);
    const int real = (int)(c->keys - key < count ? c->keys - key : count);
    for (int r = 0; r < rows; r += ROWS) {
      const int mine = rows - r < ROWS ? rows - r : ROWS;
      const QueryCode *row[ROWS];
      int32_t start[ROWS];
      for (int i = 0; i < ROWS; i++) {
        const int at = r + (i < mine ? i : 0);
        row[i] = b.codes + at * width, start[i] = b.start[at];
      }
      scores(row, start, k + key * width, scales_k + key, count, width, s);
      for (int i = 0; i < mine; i++) {
        for (int n = real; n < count; n++) s[i * KEY_BLOCK + n] = -INFINITY;
        soften(s + i * KEY_BLOCK, scales_v + key, p + i * KEY_BLOCK, count, &b, r + i, width);
      }
      for (int i = mine; i < ROWS; i++) memset(p + i * KEY_BLOCK, 0, sizeof(int16_t) * count);
      weigh(p, v + key * width, count, width, b.out + r * width, mine);
    }
  }
  for (int r = 0; r < rows; r++) finish(c, &b, (item * c->queries + first + r) * c->heads + head, r, unit, poison);
}

static void block_of(const Call *c, int64_t item, int64_t head, int64_t first) {
  switch (c->width) { /* a constant, so that every loop over it unrolls */
    case 32: query_block(c, item, head, first, 32); break;
    case 64: query_block(c, item, head, first, 64); break;
    case 96: query_block(c, item, head, first, 96); break;
    default: query_block(c, item, head, first, 128);
  }
}

/* Bytes of scratch that a call needs. */
int64_t ispa_attention_int8_room(int64_t batch, int64_t heads, int64_t keys, int64_t width) {
  return batch * heads * (padded(keys) * (2 * width + 2 * (int64_t)sizeof(float)) + 2 * (int64_t)sizeof(float));
}

/* tensors: q, k, k_scale, v, v_scale, out, lse, room, out_before, lse_before; the last two NULL without other keys.
 * sizes: batch, heads, queries, keys, width, wide, then item, row and head strides of the first five tensors. */
void ispa_attention_int8(void *const *tensors, const int64_t *sizes, float scale) {
  Call call = {0}, *c = &call;
  c->q = tensors[0], c->k = tensors[1], c->k_scale = tensors[2], c->v = tensors[3], c->v_scale = tensors[4];
  c->out = tensors[5], c->lse = tensors[6], c->out_before = tensors[8], c->lse_before = tensors[9];
  c->batch = sizes[0], c->heads = sizes[1], c->queries = sizes[2], c->keys = sizes[3], c->width = sizes[4], c->wide = sizes[5];
  Strides *const strides[] = {&c->at_q, &c->at_k, &c->at_k_scale, &c->at_v, &c->at_v_scale};
  for (int i = 0; i < 5; i++) memcpy(strides[i], sizes + 6 + 3 * i, sizeof(Strides));
  c->scale = scale;
  const int64_t lanes = c->batch * c->heads, room = padded(c->keys), blocks = (c->queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
  c->scales_k = tensors[7], c->scales_v = c->scales_k + lanes * room, c->peaks = c->scales_v + lanes * room;
  c->packed_k = (int8_t *)(c->peaks + 2 * lanes), c->packed_v = c->packed_k + lanes * room * c->width;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t lane = 0; lane < lanes; lane++) pack(c, lane / c->heads, lane % c->heads);
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < lanes * blocks; job++) {
      const int64_t lane = job / blocks;
      block_of(c, lane / c->heads, lane % c->heads, job % blocks * QUERY_BLOCK);
    }
  }
}
