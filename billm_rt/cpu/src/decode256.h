/* Decoding in vectors of 256 bits, for the file that defines dot(sum, a, b): the sums of pairs of int16 products. */
#include "x86.h"

/* ---- binarized rows, blocks of at least 128 columns: levels of 16 bits ----
 *
 * Two rows at a time, one in each 128-bit lane, in slabs of 128 columns. As in avx512.c, the 16 bytes of a plane meet
 * their activations without moving a bit: vector k is about bit k of every byte. The bits of a column, the sign, q =
 * second ^ (salient & ~sign) and the salient bit, choose one of eight levels by two shuffles, which look up its low and
 * its high byte in tables of the lane; put side by side, these are the levels of eight columns and of eight more. */
enum { WORD_COLS = 128, WORD_BYTES = WORD_COLS / 8 };

struct words {
    int16_t x[8][WORD_BYTES];        /* of bit k of byte i */
    uint8_t salient[8][WORD_BYTES];  /* 4 where that column is salient */
    uint8_t plane[WORD_BYTES];       /* the salient bits as the file has them */
    uint8_t unused[WORD_BYTES];      /* a whole number of vectors */
};

static inline size_t word_slabs(const struct billm_weight *w) {
    return (w->cols + WORD_COLS - 1) / WORD_COLS;
}

static inline void prepare_words(const struct billm_weight *w, const int16_t *x, struct words *slab) {
    memset(slab, 0, word_slabs(w) * sizeof *slab);
    for (size_t byte = 0; byte < w->stride; byte++) {
        struct words *to = slab + byte / WORD_BYTES;
        to->plane[byte % WORD_BYTES] = w->salient[byte];
        for (size_t k = 0; k < 8 && 8 * byte + k < w->cols; k++) {
            to->x[k][byte % WORD_BYTES] = x[8 * byte + k];
            to->salient[k][byte % WORD_BYTES] = (uint8_t)((w->salient[byte] >> k & 1) << 2);
        }
    }
}

static inline __m256i twice(const void *lane) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(lane));
}

/* Add the products of the columns of bit k, whose signs and q are the low two bits of each byte of `codes`. */
BILLM_INLINE void add_bit(const struct words *x, size_t k, __m256i codes, __m256i low, __m256i high, __m256i sums[2]) {
    __m256i index = _mm256_or_si256(_mm256_and_si256(codes, _mm256_set1_epi8(3)), twice(x->salient[k]));
    __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
    sums[0] = dot(sums[0], _mm256_unpacklo_epi8(l, h), twice(x->x[k]));
    sums[1] = dot(sums[1], _mm256_unpackhi_epi8(l, h), twice(x->x[k] + 8));
}

/* The sums of two rows over a slab, spread over the lanes; `scales` are the scale codes of their block. */
BILLM_INLINE __m256i word_sums(const struct words *x, __m256i sign, __m256i second, __m256i scales) {
    const __m256i even = _mm256_set1_epi8(0x55), minus = _mm256_set1_epi16(0x00ff); /* the level of sign bit 0 first */
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, -1, -1, -1, -1, -1, -1, -1, -1));
    __m256i magnitude = _mm256_shuffle_epi8(billm_magnitudes(scales), order);
    __m256i low = _mm256_sub_epi8(_mm256_xor_si256(magnitude, minus), minus);
    __m256i high = _mm256_andnot_si256(_mm256_cmpeq_epi8(magnitude, _mm256_setzero_si256()), minus);
    __m256i q = _mm256_xor_si256(second, _mm256_andnot_si256(sign, twice(x->plane)));
    /* Sign and q of the columns of even bits side by side, and of those of odd bits. */
    __m256i evens = _mm256_or_si256(_mm256_and_si256(sign, even), _mm256_slli_epi16(_mm256_and_si256(q, even), 1));
    __m256i odds = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(sign, 1), even), _mm256_andnot_si256(even, q));
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 4
    for (size_t k = 0; k < 8; k += 2) {
        add_bit(x, k, _mm256_srli_epi16(evens, (int)k), low, high, sums);
        add_bit(x, k + 1, _mm256_srli_epi16(odds, (int)k), low, high, sums);
    }
    return _mm256_add_epi32(sums[0], sums[1]);
}

/* 16 bytes of two rows, side by side. */
BILLM_INLINE __m256i load_two(const uint8_t *first, const uint8_t *second, size_t words) {
    if (words < 4)
        return billm_load_pair(first, second, words);
    __m128i low = _mm_loadu_si128((const void *)first), high = _mm_loadu_si128((const void *)second);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* Eight rows (a short group repeats its last one) over a slab: rows 0 to 3, 4 to 7 in the lanes of the result. */
BILLM_INLINE __m256i word_group(const struct billm_weight *w, size_t row, size_t rows, size_t slab, size_t block,
                                const struct words *x) {
    const size_t words = billm_min(4, w->stride / 4 - 4 * slab);
    __m256i sums[4];
    for (size_t r = 0; r < 4; r++) {
        const size_t row0 = row + billm_min(r, rows - 1), row1 = row + billm_min(r + 4, rows - 1);
        const size_t at0 = row0 * w->stride + WORD_BYTES * slab, at1 = row1 * w->stride + WORD_BYTES * slab;
        const __m128i low = _mm_cvtsi32_si128((int)billm_load32(w->scales + 4 * (row0 * w->blocks + block)));
        const __m128i high = _mm_cvtsi32_si128((int)billm_load32(w->scales + 4 * (row1 * w->blocks + block)));
        sums[r] = word_sums(x, load_two(w->sign + at0, w->sign + at1, words),
                            load_two(w->second + at0, w->second + at1, words),
                            _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
    }
    return _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
}

static void word_gemv(const struct billm_weight *w, const struct words *x, const float *x_scale, size_t row, size_t end,
                      float *acc) {
    const size_t slabs = word_slabs(w), slabs_per_block = w->block / WORD_COLS;
    for (size_t rows; row < end; row += rows, acc += rows) {
        __m256 total = _mm256_setzero_ps();
        rows = billm_min(8, end - row);
        for (size_t slab = 0, block = 0; block < w->blocks; block++) {
            __m256i sum = _mm256_setzero_si256();
            for (size_t i = 0; i < slabs_per_block && slab < slabs; i++, slab++)
                sum = _mm256_add_epi32(sum, word_group(w, row, rows, slab, block, x + slab));
            total = billm_step(total, x_scale[block], sum);
        }
        float result[8];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result, rows * sizeof *acc);
    }
}

static void binary_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                        size_t end, float *acc) {
    if (w->block < WORD_COLS)
        billm_avx2_binary_gemv_small(w, prepared, bits, x_scale, row, end, acc);
    else
        word_gemv(w, prepared, x_scale, row, end, acc); /* of 8 bits or 16, an activation is a word */
}

/* ---- decoding, int8 rows: both sides widened to int16, which madd_epi16 multiplies and sums exactly ---- */

static inline __m256i widen(const int8_t *from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}

/* The last columns, fewer than 16. */
static __m256i widen_start(const int8_t *from, size_t count) {
    int8_t values[16] = {0};
    memcpy(values, from, count);
    return widen(values);
}

/* `x` is padded with zeros to a whole vector. */
static void int8_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    const int16_t *x = prepared;
    const size_t whole = w->cols / 16 * 16, rest = w->cols - whole;
    (void)bits;
    for (; row < end; row += 8) {
        size_t rows = billm_min(8, end - row);
        __m256 total = _mm256_setzero_ps();
        for (size_t b = 0, col = 0; col < w->cols; b++, col += w->block) {
            size_t stop = billm_min(col + w->block, whole);
            __m256i sums[8];
            for (size_t r = 0; r < 8; r++) {
                const int8_t *values = w->values + (row + billm_min(r, rows - 1)) * w->stride;
                __m256i sum = _mm256_setzero_si256();
                for (size_t j = col; j < stop; j += 16)
                    sum = dot(sum, widen(values + j), _mm256_load_si256((const void *)(x + j)));
                if (rest && b + 1 == w->blocks)
                    sum = dot(sum, widen_start(values + whole, rest), _mm256_load_si256((const void *)(x + whole)));
                sums[r] = sum;
            }
            total = billm_step(total, x_scale[b], billm_sum8(sums));
        }
        float result[8];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

/* ---- decoding, 4-bit rows: as 8-bit ones; the offset of the codes is taken off the sum of a block ---- */

/* sum(code * x) of a unit, spread over the lanes. */
static inline __m256i nibble_sums(const uint8_t *from, const int16_t *x) {
    const __m128i bytes = _mm_loadu_si128((const void *)from), low_half = _mm_set1_epi8(15);
    __m256i first = _mm256_cvtepu8_epi16(_mm_and_si128(bytes, low_half));
    __m256i last = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(bytes, 4), low_half));
    __m256i sum = dot(_mm256_setzero_si256(), first, _mm256_load_si256((const void *)x));
    return dot(sum, last, _mm256_load_si256((const void *)(x + 16)));
}

/* `prepared` holds the activations, padded with zeros to a whole unit, and for each block eight times their sum. */
static void int4_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    const int16_t *x = prepared;
    const int32_t *offset = (const void *)(x + w->blocks * BILLM_UNIT);
    (void)bits;
    for (size_t rows; row < end; row += rows) {
        __m256 total = _mm256_setzero_ps();
        rows = billm_min(8, end - row);
        for (size_t b = 0; b < w->blocks; b++) {
            __m256i sums[8];
            int8_t steps[8] = {0};
            for (size_t r = 0; r < 8; r++)
                sums[r] = nibble_sums(w->nibbles + (row + billm_min(r, rows - 1)) * w->stride + 16 * b,
                                      x + BILLM_UNIT * b);
            memcpy(steps, w->steps + b * w->rows + row, rows);
            __m256i sum = _mm256_sub_epi32(billm_sum8(sums), _mm256_set1_epi32(offset[b]));
            __m256i step = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)steps));
            total = billm_step(total, x_scale[b], _mm256_mullo_epi32(sum, step));
        }
        float result[8];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}
