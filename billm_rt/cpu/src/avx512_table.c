/* AVX-512 with VNNI, decoding: rows of 8 and of 4 bits, that is, heads. */
#include "x86.h"

/* ---- 8 bits ----
 *
 * vpdpbusd wants one side without signs: a value raised by 128 is one, and what that adds, the sum of the activations, is
 * the same for every row. Activations are two digits, 256 high + low. Eight rows, one after the other: the memory sees one
 * stream, which it needs nobody to fetch ahead. */
enum { INT8_ROWS = 8, INT8_BLOCKS = 16 };

/* A prepared token: bytes of all columns and zeros, in whole vectors, of low digits, then of high ones; then an int32 for
 * each block, 128 times the sum of its activations. */
static size_t digit_bytes(const struct billm_weight *w) {
    return billm_round_up(w->cols, 64);
}

static void prepare_int8(const struct billm_weight *w, const int16_t *x, int8_t *low) {
    int8_t *high = low + digit_bytes(w);
    int32_t *raised = (void *)(high + digit_bytes(w));
    memset(low, 0, 2 * digit_bytes(w));
    for (size_t block = 0, col = 0; block < w->blocks; block++) {
        const size_t stop = billm_min(col + w->block, w->cols);
        int32_t sum = 0;
        for (; col < stop; col++) {
            low[col] = (int8_t)(x[col] & 0xff);
            high[col] = (int8_t)((x[col] + 128) >> 8);
            sum += x[col];
        }
        raised[block] = 128 * sum;
    }
}

/* Lane i is the sum of the lanes of r[i]. */
static inline __m256i sum_lanes(const __m512i r[INT8_ROWS]) {
    __m512i pair[4], quad[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        pair[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]),
                                   _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        quad[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]),
                                   _mm512_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]));
    __m512i half = _mm512_add_epi32(_mm512_shuffle_i32x4(quad[0], quad[1], 0x88),
                                    _mm512_shuffle_i32x4(quad[0], quad[1], 0xdd));
    __m256i low = _mm512_castsi512_si256(half), high = _mm512_extracti64x4_epi64(half, 1);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

/* The sums of a row over `blocks` blocks from column `col` on, spread over the lanes: block b's to sums[INT8_ROWS b]. */
BILLM_INLINE void int8_row(const struct billm_weight *w, const int8_t *values, const int8_t *x, size_t col,
                           size_t blocks, const int bits, __m512i *sums) {
    const __m512i raise = _mm512_set1_epi8(-128);
    const size_t width = digit_bytes(w);
    for (size_t b = 0; b < blocks; b++, sums += INT8_ROWS) {
        const size_t stop = billm_min(col + w->block, w->cols);
        __m512i low = _mm512_setzero_si512(), high = low;
        for (; col + 64 <= stop; col += 64) {
            const __m512i value = _mm512_xor_si512(_mm512_loadu_si512(values + col), raise);
            low = _mm512_dpbusd_epi32(low, value, _mm512_loadu_si512(x + col));
            if (bits != 8)
                high = _mm512_dpbusd_epi32(high, value, _mm512_loadu_si512(x + width + col));
        }
        if (col < stop) {
            const __mmask64 rest = ~(__mmask64)0 >> (64 - (stop - col));
            const __m512i value = _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, values + col), raise);
            low = _mm512_dpbusd_epi32(low, value, _mm512_maskz_loadu_epi8(rest, x + col));
            if (bits != 8)
                high = _mm512_dpbusd_epi32(high, value, _mm512_maskz_loadu_epi8(rest, x + width + col));
            col = stop;
        }
        *sums = bits == 8 ? low : _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
    }
}

BILLM_INLINE void int8_gemv(const struct billm_weight *w, const int8_t *x, const int bits, const float *x_scale,
                            size_t row, size_t end, float *acc) {
    const int32_t *raised = (const void *)(x + 2 * digit_bytes(w));
    for (size_t rows; row < end; row += rows) {
        __m256 total = _mm256_setzero_ps();
        rows = billm_min(INT8_ROWS, end - row);
        for (size_t block = 0; block < w->blocks; block += INT8_BLOCKS) {
            const size_t blocks = billm_min(INT8_BLOCKS, w->blocks - block), col = block * w->block;
            __m512i sums[INT8_BLOCKS][INT8_ROWS];
            for (size_t r = 0; r < INT8_ROWS; r++) {
                const int8_t *values = w->values + (row + billm_min(r, rows - 1)) * w->stride;
                int8_row(w, values, x, col, blocks, bits, &sums[0][r]);
            }
            for (size_t b = 0; b < blocks; b++) {
                const __m256i sum = _mm256_sub_epi32(sum_lanes(sums[b]), _mm256_set1_epi32(raised[block + b]));
                total = billm_step(total, x_scale[block + b], sum);
            }
        }
        float result[INT8_ROWS];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

void billm_avx512_int8_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale,
                            size_t row, size_t end, float *acc) {
    if (bits == 8)
        int8_gemv(w, prepared, 8, x_scale, row, end, acc);
    else
        int8_gemv(w, prepared, 16, x_scale, row, end, acc);
}

/* ---- 4 bits: sixteen rows, in slabs of four units ----
 *
 * The 64 bytes of a row's slab are one vector; its low and its high nibbles meet activations of their own, so that a
 * 128-bit lane sums a unit. vpdpbusd takes the codes as they are; their offset is taken off the sum of a unit. In a last
 * slab of one or two units two rows share a vector, and the activations lie there twice. */
enum { INT4_ROWS = 16, SLAB_UNITS = 4, SLAB_COLS = SLAB_UNITS * BILLM_UNIT, SLAB_BYTES = SLAB_COLS / 2 };

struct slab {
    int8_t low[2][SLAB_BYTES], high[2][SLAB_BYTES]; /* digits: of the columns in low nibbles, of those in high ones */
    int32_t offset[SLAB_UNITS];                     /* of each unit: 8 * sum(x) */
    uint8_t unused[48];                             /* a whole number of cache lines */
};

static void prepare_int4(const struct billm_weight *w, const int16_t *x, struct slab *slab) {
    memset(slab, 0, billm_avx512_table_bytes(w));
    for (size_t j = 0; j < w->cols; j++) {
        struct slab *to = slab + j / SLAB_COLS;
        const size_t unit = j % SLAB_COLS / BILLM_UNIT, half = j % BILLM_UNIT / 16, place = 16 * unit + j % 16;
        to->low[half][place] = (int8_t)(x[j] & 0xff);
        to->high[half][place] = (int8_t)((x[j] + 128) >> 8);
        to->offset[unit] += 8 * x[j];
    }
    const size_t rest = w->blocks % SLAB_UNITS;
    struct slab *last = slab + w->blocks / SLAB_UNITS;
    for (size_t half = 0; half < 2 && (rest == 1 || rest == 2); half++) {
        memcpy(last->low[half] + SLAB_BYTES / 2, last->low[half], SLAB_BYTES / 2);
        memcpy(last->high[half] + SLAB_BYTES / 2, last->high[half], SLAB_BYTES / 2);
    }
}

/* sum(code * x) of each lane's four columns. */
BILLM_INLINE __m512i code_sums(__m512i bytes, const struct slab *x, const int bits) {
    const __m512i low_half = _mm512_set1_epi8(15);
    const __m512i first = _mm512_and_si512(bytes, low_half);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_half);
    __m512i low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_load_si512(x->low[0]));
    low = _mm512_dpbusd_epi32(low, last, _mm512_load_si512(x->low[1]));
    if (bits == 8)
        return low;
    __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_load_si512(x->high[0]));
    high = _mm512_dpbusd_epi32(high, last, _mm512_load_si512(x->high[1]));
    return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
}

/* Lane i of quarter u is the sum of quarter u of r[i]. */
BILLM_INLINE __m512i sum_quarters(const __m512i r[4]) {
    __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
    __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* Quarter j of r[i] -> quarter i of r[j]. */
BILLM_INLINE void transpose_quarters(__m512i r[4]) {
    __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
    __m512i c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
    r[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/* sums[u], lane r: sum(code * x) of unit u of row r, of three or four units; `whole` says which. */
BILLM_INLINE void wide_sums(const uint8_t *from, size_t stride, const int whole, const struct slab *x, const int bits,
                            __m512i sums[SLAB_UNITS]) {
#pragma GCC unroll 4
    for (size_t quad = 0; quad < 4; quad++) {
        __m512i rows[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++, from += stride)
            rows[i] = code_sums(
                whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(~(__mmask64)0 >> 16, from), x, bits);
        sums[quad] = sum_quarters(rows);
    }
    transpose_quarters(sums);
}

/* The same of one or two units: rows i and i + 4 in the halves of a vector. */
BILLM_INLINE void narrow_sums(const uint8_t *from, size_t stride, size_t units, const struct slab *x, const int bits,
                              __m512i sums[SLAB_UNITS]) {
    const __m256i mask = units == 2 ? _mm256_set1_epi64x(-1) : _mm256_setr_epi64x(-1, -1, 0, 0);
    __m512i eight[2];
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; half++, from += 8 * stride) {
        __m512i rows[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++) {
            __m256i low = _mm256_maskload_epi64((const void *)(from + i * stride), mask);
            __m256i high = _mm256_maskload_epi64((const void *)(from + (i + 4) * stride), mask);
            rows[i] = code_sums(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), x, bits);
        }
        eight[half] = sum_quarters(rows);
    }
    sums[0] = _mm512_shuffle_i32x4(eight[0], eight[1], 0x88);
    sums[1] = _mm512_shuffle_i32x4(eight[0], eight[1], 0xdd);
}

/* One block: total + scale * step * (sum - offset), two roundings. */
BILLM_INLINE __m512 step_block(__m512 total, float scale, __m512i sum, int32_t offset, const int8_t *steps) {
    __m512i step = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)steps));
    sum = _mm512_mullo_epi32(_mm512_sub_epi32(sum, _mm512_set1_epi32(offset)), step);
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(sum)));
}

/* Sixteen rows, whose steps of one block lie step_stride bytes before those of the next. On the way the sixteen rows after
 * the next ones are fetched, which is quickest to the second cache. */
BILLM_INLINE void sixteen_rows(const uint8_t *from, size_t stride, const int8_t *steps, size_t step_stride,
                               size_t blocks, const struct slab *x, const int bits, const float *x_scale, float *acc) {
    const uint8_t *ahead = from + 2 * INT4_ROWS * stride, *const ahead_end = ahead + INT4_ROWS * stride;
    __m512 total = _mm512_setzero_ps();
    __m512i sums[SLAB_UNITS];
    size_t block = 0;
    for (; block + SLAB_UNITS <= blocks; block += SLAB_UNITS, from += SLAB_BYTES, x++) {
        wide_sums(from, stride, 1, x, bits, sums);
#pragma GCC unroll 16
        for (size_t line = 0; line < INT4_ROWS; line++, ahead += 64)
            _mm_prefetch((const char *)ahead, _MM_HINT_T1);
#pragma GCC unroll 4
        for (size_t u = 0; u < SLAB_UNITS; u++, steps += step_stride)
            total = step_block(total, x_scale[block + u], sums[u], x->offset[u], steps);
    }
    for (; ahead < ahead_end; ahead += 64)
        _mm_prefetch((const char *)ahead, _MM_HINT_T1);
    if (blocks - block == 3)
        wide_sums(from, stride, 0, x, bits, sums);
    else if (block < blocks)
        narrow_sums(from, stride, blocks - block, x, bits, sums);
    for (size_t u = 0; block + u < blocks; u++, steps += step_stride)
        total = step_block(total, x_scale[block + u], sums[u], x->offset[u], steps);
    _mm512_storeu_ps(acc, total);
}

/* Fewer rows: sixteen copies of a row are as good as any others. */
static __attribute__((noinline)) void last_rows(const struct billm_weight *w, const struct slab *x, int bits,
                                                const float *x_scale, size_t row, size_t count, float *acc) {
    for (size_t r = 0; r < count; r++) {
        float result[INT4_ROWS];
        const uint8_t *from = w->nibbles + (row + r) * w->stride;
        int8_t steps[INT4_ROWS];
        __m512 total = _mm512_setzero_ps();
        for (size_t block = 0; block < w->blocks; block++) {
            const struct slab *slab = x + block / SLAB_UNITS;
            __m512i sums[SLAB_UNITS];
            const size_t first = block / SLAB_UNITS * SLAB_UNITS, units = billm_min(SLAB_UNITS, w->blocks - first);
            if (units < 3)
                narrow_sums(from + 16 * first, 0, units, slab, bits, sums);
            else
                wide_sums(from + 16 * first, 0, units == SLAB_UNITS, slab, bits, sums);
            memset(steps, w->steps[block * w->rows + row + r], sizeof steps);
            total = step_block(total, x_scale[block], sums[block - first], slab->offset[block - first], steps);
        }
        _mm512_storeu_ps(result, total);
        acc[r] = result[0];
    }
}

BILLM_INLINE void int4_gemv(const struct billm_weight *w, const struct slab *x, const int bits, const float *x_scale,
                            size_t row, size_t end, float *acc) {
    for (; row + INT4_ROWS <= end; row += INT4_ROWS, acc += INT4_ROWS)
        sixteen_rows(w->nibbles + row * w->stride, w->stride, w->steps + row, w->rows, w->blocks, x, bits, x_scale,
                     acc);
    if (row < end)
        last_rows(w, x, bits, x_scale, row, end - row, acc);
}

void billm_avx512_int4_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale,
                            size_t row, size_t end, float *acc) {
    if (bits == 8)
        int4_gemv(w, prepared, 8, x_scale, row, end, acc);
    else
        int4_gemv(w, prepared, 16, x_scale, row, end, acc);
}

/* ---- activations ---- */

size_t billm_avx512_table_bytes(const struct billm_weight *w) {
    if (w->nibbles)
        return (w->blocks + SLAB_UNITS - 1) / SLAB_UNITS * sizeof(struct slab);
    return 2 * digit_bytes(w) + w->blocks * sizeof(int32_t);
}

void billm_avx512_prepare_table(const struct billm_weight *w, const int16_t *x, void *prepared) {
    if (w->nibbles)
        prepare_int4(w, x, prepared);
    else
        prepare_int8(w, x, prepared);
}
