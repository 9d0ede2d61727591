/* Decoding tables in vectors of 256 bits, for the file that defines dot(sum, a, b): the sums of pairs of int16 products; and
 * nibble_products(first, last, x): the sums of the products of 4-bit codes with two vectors of digits. */
#include "x86.h"

enum { GROUP_ROWS = 8 };

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

/* The sums of a row over `blocks` blocks from column `col` on, spread over the lanes: block b's to sums[8 b]. `x` is padded
 * with zeros to a whole vector. */
BILLM_INLINE void int8_row(const struct billm_weight *w, const int8_t *values, const int16_t *x, size_t col,
                           size_t blocks, __m256i *sums) {
    const size_t whole = w->cols / 16 * 16;
    for (size_t b = 0; b < blocks; b++, sums += 8) {
        const size_t end = billm_min(col + w->block, w->cols), stop = billm_min(end, whole);
        __m256i sum = _mm256_setzero_si256();
        for (; col < stop; col += 16)
            sum = dot(sum, widen(values + col), _mm256_load_si256((const void *)(x + col)));
        if (col < end)
            sum = dot(sum, widen_start(values + col, end - col), _mm256_load_si256((const void *)(x + col)));
        *sums = sum;
        col = end;
    }
}

/* Eight rows, one after the other, so that the memory sees one stream, which is fetched two rows ahead. */
static void int8_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    enum { BLOCKS = 16, AHEAD = 2 };
    (void)bits;
    for (size_t rows; row < end; row += rows) {
        __m256 total = _mm256_setzero_ps();
        rows = billm_min(8, end - row);
        for (size_t block = 0; block < w->blocks; block += BLOCKS) {
            const size_t blocks = billm_min(BLOCKS, w->blocks - block), col = block * w->block;
            __m256i sums[BLOCKS][8];
            for (size_t r = 0; r < 8; r++) {
                const int8_t *values = w->values + (row + billm_min(r, rows - 1)) * w->stride;
                for (size_t j = col; j < billm_min(col + BLOCKS * w->block, w->cols); j += 64)
                    _mm_prefetch((const char *)values + AHEAD * w->stride + j, _MM_HINT_T0);
                int8_row(w, values, prepared, col, blocks, &sums[0][r]);
            }
            for (size_t b = 0; b < blocks; b++)
                total = billm_step(total, x_scale[block + b], billm_sum8(sums[b]));
        }
        float result[8];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

/* ---- decoding, 4-bit rows: codes are unsigned bytes, activations two signed digits ----
 *
 * Eight rows at a time, two in a vector. The offset of the codes is taken off the sum of a block. */

/* 16 bytes of a row and of the row four further, side by side. */
BILLM_INLINE __m256i load_two(const uint8_t *from, size_t stride) {
    __m128i low = _mm_loadu_si128((const void *)from), high = _mm_loadu_si128((const void *)(from + 4 * stride));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* sum(code * x) of a unit of two rows, spread over the lanes of each. */
BILLM_INLINE __m256i nibble_sums(const uint8_t *from, size_t stride, const struct billm_nibble_input *x) {
    const __m256i low_half = _mm256_set1_epi8(15), bytes = load_two(from, stride);
    const __m256i first = _mm256_and_si256(bytes, low_half);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
    return _mm256_add_epi32(nibble_products(first, last, x->low),
                            _mm256_slli_epi32(nibble_products(first, last, x->high), 8));
}

static void int4_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    const struct billm_nibble_input *x = prepared;
    (void)bits;
    for (size_t rows; row < end; row += rows, acc += rows) {
        /* A short group begins earlier; where eight rows are too many, one is taken eight times. */
        const size_t first = end < GROUP_ROWS ? row : billm_min(row, end - GROUP_ROWS);
        const size_t stride = end < GROUP_ROWS ? 0 : w->stride;
        const uint8_t *from = w->nibbles + first * w->stride;
        __m256 total = _mm256_setzero_ps();
        rows = end < GROUP_ROWS ? 1 : billm_min(GROUP_ROWS, end - row);
        for (size_t b = 0; b < w->blocks; b++, from += BILLM_UNIT / 2) {
            const int8_t *steps = w->steps + b * w->rows + first;
            const char *next = (const char *)w->nibbles + (first + 2 * GROUP_ROWS) * w->stride + 128 * b;
            __m256i sums[4], step;
            _mm_prefetch(next, _MM_HINT_T0);
            _mm_prefetch(next + 64, _MM_HINT_T0);
#pragma GCC unroll 4
            for (size_t r = 0; r < 4; r++)
                sums[r] = nibble_sums(from + r * stride, stride, x + b);
            __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
            sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(x[b].offset));
            step = stride ? _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)steps)) : _mm256_set1_epi32(*steps);
            total = billm_step(total, x_scale[b], _mm256_mullo_epi32(sum, step));
        }
        float result[GROUP_ROWS];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result + (row - first), rows * sizeof *acc);
    }
}
