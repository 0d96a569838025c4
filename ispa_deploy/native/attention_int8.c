/* Attention that reads keys and values as int8 codes with a scale per token and head, with log-sum-exp.
 *
 * Queries get codes of their own, a scale per token and head. Scores are integer products times both scales, the softmax
 * is float32, and weights times the values' scales become integers that meet the values' codes, in units of the largest
 * in their block of keys: 255 of them (VNNI) or 32767 (AVX2). Sums are int32 within a block and float32 across blocks;
 * the softmax's total is that of the weights before they are rounded. The result may go on from attention over other
 * keys (`before`), an exact merge at no cost. Codes are packed once per call, byte for byte, as the products read them:
 *   keys   (head, LANES keys, D / GROUP, LANES, GROUP)      values  (head, SHARE keys, D, SHARE)
 * Then every block of QUERY_BLOCK queries walks the keys KEY_BLOCK at a time, ROWS queries in registers.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

#define ROWS 6
#define QUERY_BLOCK 78
#define WIDEST 128
#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512VNNI__
/* Bytes of keys are unsigned, 128 above their codes: every sum starts with -128 times the query's codes. */
#define GROUP 4
#define SHARE 4
#define WIDE 4 /* registers of keys, or of columns, at a time */
#define OFFSET 128
#define KEY_BLOCK 128 /* few keys share a unit, so few weights are lost beside a large one */
#define TOP 255.0f
typedef int8_t QueryCode;
typedef uint8_t Weight;
INLINE Ints load_codes(const int8_t *x) { return load_bytes(x); }
INLINE Ints multiply(Ints sum, Ints keys, Ints query) { return dot4(sum, keys, query); }
INLINE Ints weighed(Ints sum, Ints weights, Ints values) { return dot4(sum, weights, values); }
INLINE void store_weights(Weight *to, Floats x) { store_uint8(to, x); }
#else
#define GROUP 2
#define SHARE 2
#define WIDE 2
#define OFFSET 0
#define KEY_BLOCK 256 /* 32767 * 127 * 256 fits int32 */
#define TOP 32767.0f
typedef int16_t QueryCode, Weight;
INLINE Ints load_codes(const int8_t *x) { return load_wide(x); }
INLINE Ints multiply(Ints sum, Ints keys, Ints query) { return dot2(sum, keys, query); }
INLINE Ints weighed(Ints sum, Ints weights, Ints values) { return dot2(sum, weights, values); }
INLINE void store_weights(Weight *to, Floats x) { store_int16(to, x); }
#endif

#define TILE (WIDE * LANES)
#define LOG_TOP log2f(TOP)

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
  float *scales_k, *logs_v, *shares_v, *poisons; /* (lane, keys) three times, (lane, 2): NaN or 0 for values, keys */
  int64_t batch, heads, queries, keys, width, wide;
  Strides at_q, at_k, at_k_scale, at_v, at_v_scale;
  float scale; /* of scores, in powers of two */
} Call;

/* What one block of queries of one head holds while it walks the keys. */
typedef struct {
  QueryCode codes[QUERY_BLOCK * WIDEST];
  float factor[QUERY_BLOCK], poison[QUERY_BLOCK], reference[QUERY_BLOCK], total[QUERY_BLOCK * LANES];
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
  for (int64_t n = 0; n < padded(keys); n += SHARE, to += SHARE * width) {
    const int8_t *from[SHARE];
    for (int g = 0; g < SHARE; g++) from[g] = n + g < keys ? v + (n + g) * row : zeros;
    for (int d = 0; d < width; d++)
      for (int g = 0; g < SHARE; g++) to[SHARE * d + g] = from[g][d];
  }
}

/* A float16 scale -> float32, 0 in place of what is not finite, which leaves NaN in `poison`. */
static inline float unpack_scale(uint16_t x, float *poison) {
  const float scale = _cvtsh_ss(x), lost = scale * 0.0f;
  *poison += lost;
  return isnan(lost) ? 0 : scale;
}

static void pack(const Call *c, int64_t item, int64_t head) {
  const int64_t lane = item * c->heads + head, room = padded(c->keys), width = c->width;
  pack_keys(c->k + item * c->at_k.item + head * c->at_k.head, c->at_k.row, c->keys, (int)width, c->packed_k + lane * room * width);
  pack_values(c->v + item * c->at_v.item + head * c->at_v.head, c->at_v.row, c->keys, (int)width, c->packed_v + lane * room * width);
  const uint16_t *of_k = c->k_scale + item * c->at_k_scale.item + head * c->at_k_scale.head;
  const uint16_t *of_v = c->v_scale + item * c->at_v_scale.item + head * c->at_v_scale.head;
  float *scale = c->scales_k + lane * room, *log = c->logs_v + lane * room, *share = c->shares_v + lane * room;
  float *poison = c->poisons + 2 * lane;
  poison[0] = poison[1] = 0;
  for (int64_t n = 0; n < room; n++) {
    scale[n] = share[n] = 0, log[n] = -INFINITY; /* behind the end: no weight, and nothing in the total */
    if (n >= c->keys) continue;
    scale[n] = unpack_scale(of_k[n * c->at_k_scale.row], poison + 1);
    const float found = unpack_scale(of_v[n * c->at_v_scale.row], poison), size = found > 0 ? found : 0x1p-60f;
    log[n] = log2f(size), share[n] = 1 / size;
  }
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

/* Scores of ROWS queries with `count` keys into s (ROWS, KEY_BLOCK): logarithms of weights times the values' scales. The
 * largest of each row into `top`. */
INLINE void scores(const QueryCode *const q[ROWS], const int32_t start[ROWS], const float factor[ROWS], const int8_t *k, const float *scales, const float *logs, int count, int width, float *s, float *top) {
  Floats highest[ROWS];
  for (int i = 0; i < ROWS; i++) highest[i] = every(-INFINITY);
  for (int n = 0; n < count; n += TILE, k += TILE * width) {
    Ints sum[ROWS][WIDE];
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < WIDE; j++) sum[i][j] = every_int(start[i]);
    for (int d = 0; d < width / GROUP; d++) {
      Ints key[WIDE];
      for (int j = 0; j < WIDE; j++) key[j] = load_codes(k + ((int64_t)j * (width / GROUP) + d) * LANES * GROUP);
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
      const Floats scale = load(scales + n + j * LANES), log = load(logs + n + j * LANES);
      for (int i = 0; i < ROWS; i++) {
        const Floats x = muladd(mul(as_floats(sum[i][j]), scale), every(factor[i]), log);
        highest[i] = larger(highest[i], x);
        store(s + i * KEY_BLOCK + n + j * LANES, x);
      }
    }
  }
  for (int i = 0; i < ROWS; i++) top[i] = largest(highest[i]);
}

/* out (rows, width) += unit of a row x its weights (ROWS, KEY_BLOCK) x codes of values, in `groups` registers of columns. */
INLINE void weigh_columns(const Weight *p, const float *unit, const int8_t *v, int count, int width, const int groups, float *out, int rows) {
  Ints sum[ROWS][WIDE];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < groups; j++) sum[i][j] = every_int(0);
  for (int n = 0; n < count / SHARE; n++) {
    Ints value[WIDE];
    for (int j = 0; j < groups; j++) value[j] = load_codes(v + ((int64_t)n * width + j * LANES) * SHARE);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
      int32_t few;
      memcpy(&few, p + i * KEY_BLOCK + SHARE * n, 4);
      const Ints weight = every_int(few);
#pragma GCC unroll 4
      for (int j = 0; j < groups; j++) sum[i][j] = keep_here(weighed(sum[i][j], weight, value[j]));
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < groups; j++) {
      float *to = out + i * width + j * LANES;
      store(to, muladd(as_floats(sum[i][j]), every(unit[i]), load(to)));
    }
}

INLINE void weigh(const Weight *p, const float *unit, const int8_t *v, int count, int width, float *out, int rows) {
  int c = 0;
  for (; c + TILE <= width; c += TILE) weigh_columns(p, unit, v + SHARE * c, count, width, WIDE, out + c, rows);
  if (c < width) weigh_columns(p, unit, v + SHARE * c, count, width, width % TILE / LANES, out + c, rows);
}

/* Scores of one query, `top` the largest -> its weights as integers, their unit returned; reference, total and output
 * follow the maximum. */
INLINE float soften(const float *s, const float *shares, float top, Weight *p, int count, Block *b, int r, int width) {
  float *total = b->total + r * LANES;
  if (top > b->reference[r]) {
    const Floats fade = power_of_two(every(b->reference[r] - top));
    float *out = b->out + r * width;
    for (int d = 0; d < width; d += LANES) store(out + d, mul(load(out + d), fade));
    store(total, mul(load(total), fade));
    b->reference[r] = top;
  }
  const Floats shift = every(LOG_TOP - top);
  Floats sum = every(0);
  for (int n = 0; n < count; n += LANES) {
    const Floats weight = power_of_two(add(load(s + n), shift));
    sum = muladd(weight, load(shares + n), sum);
    store_weights(p + n, weight);
  }
  const Floats unit = power_of_two(every(top - b->reference[r] - LOG_TOP));
  store(total, muladd(sum, unit, load(total)));
  return first_of(unit);
}

/* Where attention over other keys left off; reference and totals in powers of two. */
static void begin(const Call *c, Block *b, int64_t target, int r) {
  const int width = (int)c->width;
  float *out = b->out + r * width;
  b->reference[r] = -INFINITY;
  memset(b->total + r * LANES, 0, sizeof(float) * LANES);
  memset(out, 0, sizeof(float) * width);
  if (c->lse_before == NULL || c->lse_before[target] == -INFINITY) return;
  b->reference[r] = c->lse_before[target] * 1.4426950408889634f, b->total[r * LANES] = 1;
  for (int d = 0; d < width; d++) {
    const int64_t at = target * width + d;
    out[d] = c->wide ? ((const float *)c->out_before)[at] : of_bf16(((const uint16_t *)c->out_before)[at]);
  }
}

static void finish(const Call *c, const Block *b, int64_t target, int r, const float poison[2]) {
  const int width = (int)c->width;
  const float total = sum_of(load(b->total + r * LANES));
  const float share = 1 / total + poison[0] + poison[1] + b->poison[r];
  for (int d = 0; d < width; d++) {
    const float y = b->out[r * width + d] * share;
    const int64_t at = target * width + d;
    if (c->wide)
      ((float *)c->out)[at] = y;
    else
      ((uint16_t *)c->out)[at] = to_bf16(y);
  }
  c->lse[target] = (b->reference[r] + log2f(total)) * 0.6931471805599453f + poison[1] + b->poison[r];
}

INLINE void query_block(const Call *c, int64_t item, int64_t head, int64_t first, const int width) {
  const int rows = (int)(c->queries - first < QUERY_BLOCK ? c->queries - first : QUERY_BLOCK);
  const int64_t lane = item * c->heads + head, room = padded(c->keys);
  const int8_t *k = c->packed_k + lane * room * width, *v = c->packed_v + lane * room * width;
  const float *scales = c->scales_k + lane * room, *logs = c->logs_v + lane * room, *shares = c->shares_v + lane * room;
  Block b;
  float s[ROWS * KEY_BLOCK];
  Weight p[ROWS * KEY_BLOCK];
  for (int r = 0; r < rows; r++) {
    code_query(c, item * c->at_q.item + head * c->at_q.head + (first + r) * c->at_q.row, &b, r);
    begin(c, &b, (item * c->queries + first + r) * c->heads + head, r);
  }
  for (int64_t key = 0; key < room; key += KEY_BLOCK) {
    const int count = (int)(room - key < KEY_BLOCK ? room - key : KEY_BLOCK);
    for (int r = 0; r < rows; r += ROWS) {
      const int mine = rows - r < ROWS ? rows - r : ROWS;
      const QueryCode *row[ROWS];
      int32_t start[ROWS];
      float factor[ROWS], top[ROWS], unit[ROWS];
      for (int i = 0; i < ROWS; i++) {
        const int at = r + (i < mine ? i : 0);
        row[i] = b.codes + at * width, start[i] = b.start[at], factor[i] = b.factor[at];
      }
      scores(row, start, factor, k + key * width, scales + key, logs + key, count, width, s, top);
      for (int i = 0; i < mine; i++) unit[i] = soften(s + i * KEY_BLOCK, shares + key, top[i], p + i * KEY_BLOCK, count, &b, r + i, width);
      for (int i = mine; i < ROWS; i++) memset(p + i * KEY_BLOCK, 0, sizeof(Weight) * count);
      weigh(p, unit, v + key * width, count, width, b.out + r * width, mine);
    }
  }
  for (int r = 0; r < rows; r++) finish(c, &b, (item * c->queries + first + r) * c->heads + head, r, c->poisons + 2 * lane);
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
  return batch * heads * (padded(keys) * (2 * width + 3 * (int64_t)sizeof(float)) + 2 * (int64_t)sizeof(float));
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
  c->scales_k = tensors[7], c->logs_v = c->scales_k + lanes * room, c->shares_v = c->logs_v + lanes * room;
  c->poisons = c->shares_v + lanes * room, c->packed_k = (int8_t *)(c->poisons + 2 * lanes), c->packed_v = c->packed_k + lanes * room * c->width;
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
