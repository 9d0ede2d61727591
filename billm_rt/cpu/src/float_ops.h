/* The float32 operations of a decoder, in the compiler's vectors: as wide as the registers of the file that includes this.
 * Such a file defines BILLM_FLOAT_OPS, the name of the table it makes.
 *
 * A sum has the same order for one token as for many, so that reading a text at once and token by token agree. */
#include "decoder.h"

#include <math.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/* With four rows at once, the sums of an inner loop take half of the registers. */
#if defined(__AVX512F__)
enum { LANES = 16, VECTORS_AT_ONCE = 4 };
#elif defined(__AVX__)
enum { LANES = 8, VECTORS_AT_ONCE = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, VECTORS_AT_ONCE = 4 };
#else
enum { LANES = 4, VECTORS_AT_ONCE = 2 };
#endif
enum { KEYS = 64, ROWS_AT_ONCE = 4 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

#define INLINE __attribute__((always_inline)) static inline

INLINE floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, floats value) {
    memcpy(to, &value, sizeof value);
}

/* The first n elements, zeros behind them. */
INLINE floats load_start(const float *from, size_t n) {
    floats value = {0};
    memcpy(&value, from, n * sizeof(float));
    return value;
}

INLINE floats broadcast(float value) {
    return value - (floats){0};
}

INLINE floats bytes_to_floats(const int8_t *from) {
#if defined(__AVX512F__) /* compilers convert halves and put them together */
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#else
    bytes value;
    memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, floats);
#endif
}

INLINE floats shorts_to_floats(const int16_t *from) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const void *)from)));
#else
    shorts value;
    memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, floats);
#endif
}

INLINE ints bits_of(floats value) {
    return (ints)value;
}

/* a where mask is all ones, b where it is zero. */
INLINE floats choose(ints mask, floats a, floats b) {
    return (floats)((mask & bits_of(a)) | (~mask & bits_of(b)));
}

INLINE floats larger(floats a, floats b) {
    return choose(a > b, a, b);
}

INLINE float sum_of(floats v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] += part[i + width];
    return part[0];
}

INLINE float largest_of(floats v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
}

/* e^x within two units of the last place; 0 below -87, NaN of NaN. Cephes' polynomial on |r| <= ln 2 / 2. */
INLINE floats exponential(floats x) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold */
    ints too_small = x < -87.0f;
    floats bounded = choose(x > 88.0f, broadcast(88.0f), x);
    bounded = choose(too_small, broadcast(0.0f), bounded);
    floats shifted = bounded * 1.44269504088896341f + to_integer;
    floats n = shifted - to_integer;
    floats r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    floats p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    floats power = (floats)((bits_of(shifted) - 0x4b400000 + 127) << 23);
    return choose(too_small, broadcast(0.0f), p * power);
}

/* ---- norms, positions, activations, fixed point ---- */

static float mean_of_squares(const float *x, float centre, size_t n) {
    floats total = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats v = load(x + i) - centre;
        total += v * v;
    }
    float sum = sum_of(total);
    for (; i < n; i++)
        sum += (x[i] - centre) * (x[i] - centre);
    return sum / (float)n;
}

static float mean(const float *x, size_t n) {
    floats total = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        total += load(x + i);
    float sum = sum_of(total);
    for (; i < n; i++)
        sum += x[i];
    return sum / (float)n;
}

static void norm(const float *x, const float *weight, const float *bias, float eps, size_t n, float *out) {
    float centre = bias ? mean(x, n) : 0.0f;
    float scale = 1.0f / sqrtf(mean_of_squares(x, centre, n) + eps);
    for (size_t i = 0; i < n; i++) {
        float value = (x[i] - centre) * scale * weight[i];
        out[i] = bias ? value + bias[i] : value;
    }
}

static void rotate(float *x, const float *cos, const float *sin, size_t half, float factor) {
    for (size_t i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = (first * cos[i] - second * sin[i]) * factor;
        x[half + i] = (second * cos[i] + first * sin[i]) * factor;
    }
}

INLINE floats silu(floats x) {
    return x / (1.0f + exponential(-x));
}

static float gelu(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

static float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

static void activate(float *gate, const float *up, size_t n, enum billm_activation function) {
    if (function == BILLM_SILU) {
        size_t i = 0;
        for (; i + LANES <= n; i += LANES)
            store(gate + i, silu(load(gate + i)));
        if (i < n) {
            floats last = silu(load_start(gate + i, n - i));
            memcpy(gate + i, &last, (n - i) * sizeof *gate);
        }
    } else {
        for (size_t i = 0; i < n; i++)
            gate[i] = function == BILLM_RELU   ? (gate[i] < 0.0f ? 0.0f : gate[i])
                      : function == BILLM_GELU ? gelu(gate[i])
                                               : gelu_tanh(gate[i]);
    }
    if (up)
        for (size_t i = 0; i < n; i++)
            gate[i] *= up[i];
}

INLINE void set_element(void *to, size_t place, int bits, int32_t value) {
    if (bits == 8)
        ((int8_t *)to)[place] = (int8_t)value;
    else
        ((int16_t *)to)[place] = (int16_t)value;
}

/* As the quantization in kernels.h: what holds a NaN or an infinity gets the scale NaN, which its readers inherit. */
static float to_fixed_point(const float *x, size_t n, int bits, void *to, size_t stride) {
    const float to_integer = 12582912.0f;
    const int32_t top = bits == 8 ? 127 : 32767;
    union {
        uint32_t bits;
        float number;
    } absmax = {0}, value;
    for (size_t i = 0; i < n; i++) {
        value.number = x[i];
        uint32_t magnitude = value.bits & 0x7fffffffu;
        absmax.bits = magnitude > absmax.bits ? magnitude : absmax.bits;
    }
    float scale = absmax.bits < 0x7f800000u ? absmax.number * (1.0f / (float)top) : NAN;
    if (!(scale > 0.0f)) {
        for (size_t i = 0; i < n; i++)
            set_element(to, i * stride, bits, 0);
        return scale;
    }
    for (size_t i = 0; i < n; i++) {
        value.number = x[i] / scale + to_integer;
        int32_t rounded = (int32_t)value.bits - 0x4b400000; /* the bits of to_integer */
        rounded = rounded > top ? top : rounded;            /* a subnormal scale is too coarse for so many steps */
        set_element(to, i * stride, bits, rounded < -top ? -top : rounded);
    }
    return scale;
}

/* ---- attention: softmax by blocks of keys, the running maximum and sum corrected from block to block ----
 *
 * Keys and values take part as the whole numbers that the cache holds; their scales go to the scores and to the weights.
 * Many rows share one conversion to float32 in scratch memory, in the cache's own order; few rows convert as they read. */

struct rows {
    size_t count, width, stride; /* stride: width in whole vectors */
    const float *query[BILLM_QUERY_ROWS];
    size_t first[BILLM_QUERY_ROWS], end[BILLM_QUERY_ROWS]; /* the keys that a row sees */
    float maximum[BILLM_QUERY_ROWS];
    _Alignas(64) float sum[BILLM_QUERY_ROWS][LANES];
    _Alignas(64) float score[BILLM_QUERY_ROWS][KEYS];
    _Alignas(64) float mixed[BILLM_QUERY_ROWS][BILLM_MAX_WIDTH];
};

/* In which type a block's keys and values are read: the cache's own, or float32 copies. A constant wherever it is asked. */
enum kind { BYTES, SHORTS, FLOATS };

struct block {
    size_t start, count;
    const void *keys, *values;
    _Alignas(64) float key_scale[KEYS], value_scale[KEYS]; /* zeros behind count */
};

INLINE floats element_at(const void *from, const enum kind kind, size_t place) {
    return kind == BYTES    ? bytes_to_floats((const int8_t *)from + place)
           : kind == SHORTS ? shorts_to_floats((const int16_t *)from + place)
                            : load((const float *)from + place);
}

INLINE void score_rows(struct rows *r, size_t row, const struct block *b, const enum kind kind, const size_t count) {
    for (size_t at = 0; at < b->count; at += VECTORS_AT_ONCE * LANES) {
        floats total[ROWS_AT_ONCE][VECTORS_AT_ONCE] = {0};
        size_t place[VECTORS_AT_ONCE];
#pragma GCC unroll 4
        for (size_t j = 0; j < VECTORS_AT_ONCE; j++) {
            size_t key = at + j * LANES; /* groups that begin behind count are not there: read the first one instead */
            key = key / BILLM_KEY_GROUP * BILLM_KEY_GROUP < b->count ? key : 0;
            place[j] = key / BILLM_KEY_GROUP * BILLM_KEY_GROUP * r->width + key % BILLM_KEY_GROUP;
        }
        for (size_t i = 0; i < r->width; i++)
#pragma GCC unroll 4
            for (size_t j = 0; j < VECTORS_AT_ONCE; j++) {
                floats key = element_at(b->keys, kind, place[j] + i * BILLM_KEY_GROUP);
#pragma GCC unroll 4
                for (size_t n = 0; n < count; n++)
                    total[n][j] += r->query[row + n][i] * key;
            }
#pragma GCC unroll 4
        for (size_t n = 0; n < count; n++)
#pragma GCC unroll 4
            for (size_t j = 0; j < VECTORS_AT_ONCE; j++)
                store(r->score[row + n] + at + j * LANES, total[n][j]);
    }
}

INLINE void mix_rows(struct rows *r, size_t row, const struct block *b, const enum kind kind, size_t at,
                     const size_t vectors, const size_t count) {
    const size_t stride = kind == FLOATS ? r->stride : r->width;
    floats total[ROWS_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 4
    for (size_t n = 0; n < count; n++)
#pragma GCC unroll 4
        for (size_t j = 0; j < vectors; j++)
            total[n][j] = load(r->mixed[row + n] + at + j * LANES);
    for (size_t key = 0; key < b->count; key++)
#pragma GCC unroll 4
        for (size_t j = 0; j < vectors; j++) {
            floats value = element_at(b->values, kind, key * stride + at + j * LANES);
#pragma GCC unroll 4
            for (size_t n = 0; n < count; n++)
                total[n][j] += r->score[row + n][key] * value;
        }
#pragma GCC unroll 4
    for (size_t n = 0; n < count; n++)
#pragma GCC unroll 4
        for (size_t j = 0; j < vectors; j++)
            store(r->mixed[row + n] + at + j * LANES, total[n][j]);
}

INLINE void mix_width(struct rows *r, size_t row, const struct block *b, const enum kind kind, const size_t count) {
    size_t at = 0;
    for (; at + VECTORS_AT_ONCE * LANES <= r->stride; at += VECTORS_AT_ONCE * LANES)
        mix_rows(r, row, b, kind, at, VECTORS_AT_ONCE, count);
    for (; at < r->stride; at += LANES)
        mix_rows(r, row, b, kind, at, 1, count);
}

/* Scale the scores, hide what a row must not see, and turn the rest into weights relative to the largest so far. */
static void weigh(struct rows *r, size_t row, const struct block *b) {
    float *score = r->score[row];
    floats part[KEYS / LANES], largest = broadcast(-INFINITY), sum = load(r->sum[row]);
    for (size_t at = 0; at < KEYS; at += LANES)
        store(score + at, load(score + at) * load(b->key_scale + at));
    if (b->start < r->first[row] || b->start + KEYS > r->end[row])
        for (size_t key = 0; key < KEYS; key++)
            if (b->start + key < r->first[row] || b->start + key >= r->end[row])
                score[key] = -INFINITY;
    for (size_t j = 0; j < KEYS / LANES; j++) {
        part[j] = load(score + j * LANES);
        largest = larger(part[j], largest);
    }
    float maximum = largest_of(largest);
    maximum = maximum > r->maximum[row] ? maximum : r->maximum[row];
    if (maximum == -INFINITY) { /* nothing to see yet */
        memset(score, 0, sizeof r->score[row]);
        return;
    }
    if (maximum > r->maximum[row]) {
        floats correction = exponential(broadcast(r->maximum[row] - maximum));
        for (size_t i = 0; i < r->stride; i += LANES)
            store(r->mixed[row] + i, load(r->mixed[row] + i) * correction);
        sum = sum * correction;
        r->maximum[row] = maximum;
    }
    for (size_t j = 0; j < KEYS / LANES; j++) {
        part[j] = exponential(part[j] - maximum);
        sum = sum + part[j];
        store(score + j * LANES, part[j] * load(b->value_scale + j * LANES));
    }
    store(r->sum[row], sum);
}

INLINE void attend_block(struct rows *r, const struct block *b, const enum kind kind) {
    for (size_t row = 0; row < r->count; row += ROWS_AT_ONCE)
        switch (r->count - row) {
        case 1: score_rows(r, row, b, kind, 1); break;
        case 2: score_rows(r, row, b, kind, 2); break;
        case 3: score_rows(r, row, b, kind, 3); break;
        default: score_rows(r, row, b, kind, 4);
        }
    for (size_t row = 0; row < r->count; row++)
        weigh(r, row, b);
    for (size_t row = 0; row < r->count; row += ROWS_AT_ONCE)
        switch (r->count - row) {
        case 1: mix_width(r, row, b, kind, 1); break;
        case 2: mix_width(r, row, b, kind, 2); break;
        case 3: mix_width(r, row, b, kind, 3); break;
        default: mix_width(r, row, b, kind, 4);
        }
}

/* Convert the block into scratch memory: keys in the cache's groups of sixteen, values [count, stride]. */
INLINE void convert(struct block *b, const struct rows *r, const enum kind kind, float *keys, float *values) {
    const size_t elements = billm_round_up(b->count, BILLM_KEY_GROUP) * r->width, whole = r->width / LANES * LANES;
    for (size_t i = 0; i < elements; i += LANES)
        store(keys + i, element_at(b->keys, kind, i));
    for (size_t key = 0; key < b->count; key++) {
        const size_t from = key * r->width;
        float *to = values + key * r->stride;
        for (size_t i = 0; i < whole; i += LANES)
            store(to + i, element_at(b->values, kind, from + i));
        for (size_t i = whole; i < r->stride; i++)
            to[i] = i >= r->width   ? 0.0f
                    : kind == BYTES ? (float)((const int8_t *)b->values)[from + i]
                                    : (float)((const int16_t *)b->values)[from + i];
    }
    b->keys = keys;
    b->values = values;
}

static void open_block(const struct billm_attention *a, size_t head, size_t start, size_t count, struct block *b) {
    const struct billm_cache *cache = a->cache;
    const size_t first = head * cache->capacity + start;
    b->start = start;
    b->count = count;
    b->keys = billm_cache_element(cache, cache->keys, first * a->width);
    b->values = billm_cache_element(cache, cache->values, first * a->width);
    memset(b->key_scale + count, 0, (KEYS - count) * sizeof(float));
    memset(b->value_scale + count, 0, (KEYS - count) * sizeof(float));
    memcpy(b->key_scale, cache->key_scale + first, count * sizeof(float));
    memcpy(b->value_scale, cache->value_scale + first, count * sizeof(float));
}

static void attend(const struct billm_attention *a, size_t kv_head, size_t row, size_t rows) {
    _Alignas(64) float keys[BILLM_MAX_WIDTH * KEYS], values[KEYS * BILLM_MAX_WIDTH];
    struct rows r;
    const size_t group = a->heads / a->kv_heads;
    size_t start = (size_t)-1, end = 0;
    r.count = rows;
    r.width = a->width;
    r.stride = billm_round_up(a->width, LANES);
    for (size_t i = 0; i < rows; i++) {
        size_t token = (row + i) / group, head = kv_head * group + (row + i) % group, position = a->past + token;
        r.query[i] = a->query + (token * a->heads + head) * a->width;
        r.end[i] = position + 1;
        r.first[i] = a->window && a->window <= position ? position + 1 - a->window : 0;
        start = billm_min(start, r.first[i]);
        end = r.end[i] > end ? r.end[i] : end;
        r.maximum[i] = -INFINITY;
        memset(r.sum[i], 0, sizeof r.sum[i]);
        memset(r.mixed[i], 0, r.stride * sizeof(float));
    }
    const int few = rows <= 2 * ROWS_AT_ONCE && a->width % LANES == 0, bytes = a->cache->bits == 8;
    for (start = start / KEYS * KEYS; start < end; start += KEYS) {
        struct block b;
        open_block(a, kv_head, start, billm_min(KEYS, end - start), &b);
        if (few && bytes) {
            attend_block(&r, &b, BYTES);
        } else if (few) {
            attend_block(&r, &b, SHORTS);
        } else {
            bytes ? convert(&b, &r, BYTES, keys, values) : convert(&b, &r, SHORTS, keys, values);
            attend_block(&r, &b, FLOATS);
        }
    }
    for (size_t i = 0; i < rows; i++) {
        size_t token = (row + i) / group, head = kv_head * group + (row + i) % group;
        float *out = a->out + (token * a->heads + head) * a->width, total = sum_of(load(r.sum[i]));
        for (size_t j = 0; j < a->width; j++)
            out[j] = r.mixed[i][j] / total;
    }
}

const struct billm_float_ops BILLM_FLOAT_OPS = {
    .norm = norm,
    .rotate = rotate,
    .activate = activate,
    .store = to_fixed_point,
    .attend = attend,
};
