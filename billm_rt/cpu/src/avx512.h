/* What decoding with AVX-512 shares: slabs of 128 columns, rows side by side, four in a vector. */
#ifndef BILLM_AVX512_H
#define BILLM_AVX512_H

#include "x86.h"

enum { GROUP_ROWS = 16, SLAB_COLS = 128, SLAB_BYTES = SLAB_COLS / 8, PLANE_BYTES = GROUP_ROWS * SLAB_BYTES };
enum { LOW, HIGH, DIGITS };

/* 128 signed bytes, byte i of every group of 8 to vector i. */
static inline void store_by_bit(__m512i low, __m512i high, int8_t out[8][SLAB_BYTES]) {
    const __m512i pairs =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    const __m512i gather = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4, 27, 19, 11, 3,
                                            26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    low = _mm512_permutexvar_epi16(gather, _mm512_shuffle_epi8(low, pairs));
    high = _mm512_permutexvar_epi16(gather, _mm512_shuffle_epi8(high, pairs));
    _mm512_store_si512(out[0], _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high));
    _mm512_store_si512(out[4], _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), high));
}

static inline __m512i join(__m512i low, __m512i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
}

/* The digits of activations: 256 high + low = x, both signed. */
static inline void store_digits(const __m512i x[4], int8_t low[8][SLAB_BYTES], int8_t high[8][SLAB_BYTES]) {
    __m512i h[4];
    for (int i = 0; i < 4; i++)
        h[i] = _mm512_srai_epi16(_mm512_add_epi16(x[i], _mm512_set1_epi16(128)), 8);
    store_by_bit(join(x[0], x[1]), join(x[2], x[3]), low);
    store_by_bit(join(h[0], h[1]), join(h[2], h[3]), high);
}

static inline size_t slabs_of(const struct billm_weight *w) {
    return (w->cols + SLAB_COLS - 1) / SLAB_COLS;
}

static inline int ends_with_half(const struct billm_weight *w) {
    return w->block >= SLAB_COLS && w->cols % SLAB_COLS && w->cols % SLAB_COLS <= SLAB_COLS / 2;
}

/* Sixteen rows of a matrix of bytes; a short group repeats its last one. */
struct rows {
    const uint8_t *first;
    size_t stride, count;
    size_t safe; /* bytes from which 16 can be read in every row, because other rows follow */
};

static inline struct rows find_rows(const uint8_t *matrix, size_t stride, size_t row, size_t count, size_t all_rows) {
    const size_t last = (all_rows - row - count + 1) * stride; /* bytes from the last row on */
    return (struct rows){matrix + row * stride, stride, count,
                         count < GROUP_ROWS || last < SLAB_BYTES ? 0 : last - SLAB_BYTES + 1};
}

/* As load_rows, where a row is the last one or missing. */
static __attribute__((noinline)) void load_last_rows(const struct rows *rows, size_t at, __m512i out[4]) {
    const size_t bytes = billm_min(SLAB_BYTES, rows->stride - at);
    _Alignas(64) uint8_t copy[4][4][SLAB_BYTES] = {{{0}}};
    for (size_t r = 0; r < GROUP_ROWS; r++)
        memcpy(copy[r % 4][r / 4], rows->first + billm_min(r, rows->count - 1) * rows->stride + at, bytes);
    for (size_t a = 0; a < 4; a++)
        out[a] = _mm512_load_si512(copy[a]);
}

/* 16 bytes from byte `at` on of every row: rows a, 4 + a, 8 + a, 12 + a to the lanes of out[a]. Reading past the end of
 * a row is no harm: the activations there are zero. */
BILLM_INLINE void load_rows(const struct rows *rows, size_t at, __m512i out[4]) {
    if (at >= rows->safe) {
        load_last_rows(rows, at, out);
        return;
    }
    const uint8_t *from = rows->first + at;
    size_t stride = rows->stride;
    __asm__("" : "+r"(stride)); /* or sixteen multiples of it are kept, in vector registers for want of others */
#pragma GCC unroll 4
    for (size_t a = 0; a < 4; a++, from += stride)
        out[a] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)from));
#pragma GCC unroll 4
    for (size_t a = 0; a < 4; a++, from += stride)
        out[a] = _mm512_inserti32x4(out[a], _mm_loadu_si128((const void *)from), 1);
#pragma GCC unroll 4
    for (size_t a = 0; a < 4; a++, from += stride)
        out[a] = _mm512_inserti32x4(out[a], _mm_loadu_si128((const void *)from), 2);
#pragma GCC unroll 4
    for (size_t a = 0; a < 4; a++, from += stride)
        out[a] = _mm512_inserti32x4(out[a], _mm_loadu_si128((const void *)from), 3);
}

static inline __m512i broadcast(const void *lane) {
    return _mm512_broadcast_i32x4(_mm_load_si128(lane));
}

/* acc = acc + scale * sum, two roundings. */
static inline __m512 step(__m512 acc, float scale, __m512i sum) {
    return _mm512_add_ps(acc, _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(sum)));
}

/* Four vectors of sums to one per unit, whose lanes are the rows in order. */
static inline void transpose4(__m512i r[4]) {
    __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm512_unpacklo_epi64(a, c);
    r[1] = _mm512_unpackhi_epi64(a, c);
    r[2] = _mm512_unpacklo_epi64(b, d);
    r[3] = _mm512_unpackhi_epi64(b, d);
}

/* The rows of the next group follow those of this one: fetch what it will need, as many bytes per slab as a slab of
 * sixteen rows takes (four lines), so that the memory never waits for a group to begin. */
BILLM_INLINE void prefetch(const struct rows *rows, size_t from, size_t bytes) {
    const char *next = (const char *)rows->first + GROUP_ROWS * rows->stride;
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch(next + from + i, _MM_HINT_T1);
}

#endif
