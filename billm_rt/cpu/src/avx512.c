/* AVX-512 with VNNI: vpdpbusd sums four bytes straight into an int32 lane, vpdpwssd a pair of int16. */
#include "x86.h"

static void quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                     float *scales) {
    billm_quantize_token(x, col_scale, cols, block, bits, values, scales);
}

/* ---- decoding: a stretch of 64 columns is eight bytes of a plane, and those are a mask ----
 *
 * Magnitudes are unsigned bytes, looked up among the four of the row's block; activations are signed ones, negated where
 * the sign plane says so. Which of two magnitudes a column has is q = second, or for a salient column whether second and
 * sign agree. Blocks of 32 columns leave half of a stretch empty. */

enum { STRETCH = 64, GROUP = 8, CHUNK = 16 }; /* rows at a time; blocks whose magnitudes are made at once */

struct stretch {
    int8_t low[STRETCH], high[STRETCH]; /* of the activations; zeros behind the last column */
    uint8_t index[STRETCH];             /* 4 i + 2 where column i of a 4-byte lane is salient: see magnitudes */
    uint64_t salient;
    uint8_t padding[STRETCH - sizeof(uint64_t)];
};

static size_t stretch_cols(const struct billm_weight *w) {
    return billm_min(STRETCH, w->block);
}

static size_t prepared_bytes(const struct billm_weight *w) {
    return (w->cols + stretch_cols(w) - 1) / stretch_cols(w) * sizeof(struct stretch);
}

static uint64_t load_bits(const uint8_t *from, size_t bytes) {
    uint64_t value = 0;
    memcpy(&value, from, bytes);
    return value;
}

static void prepare(const struct billm_weight *w, const int16_t *x, int bits, void *prepared) {
    struct stretch *to = prepared;
    const size_t most = stretch_cols(w);
    (void)bits;
    for (size_t col = 0; col < w->cols; col += most, to++) {
        const size_t count = billm_min(most, w->cols - col);
        memset(to, 0, sizeof *to);
        billm_split(x + col, count, to->high, to->low);
        to->salient = load_bits(w->salient + col / 8, billm_min(most / 8, w->stride - col / 8));
        _mm512_store_si512(to->index, _mm512_maskz_set1_epi8(to->salient, 2));
    }
}

/* The four magnitudes (bytes of each 32-bit lane) of sixteen blocks, from alpha_c, alpha_s, alpha_o, alpha_r. */
static inline __m512i magnitudes(__m512i scales) {
    const __m512i repeat_o = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 2, 4, 5, 6, 6, 8, 9, 10, 10, 12, 13, 14, 14));
    __m512i residual = _mm512_and_si512(scales, _mm512_set1_epi32((int)0xff000000u));
    __m512i sum = _mm512_adds_epu8(_mm512_shuffle_epi8(scales, repeat_o), residual);
    return _mm512_subs_epu8(sum, _mm512_srli_epi32(residual, 8));
}

/* Lane i is the sum of the lanes of a[i]. */
static inline __m256i sum_lanes(const __m512i a[GROUP]) {
    __m512i pair[4], quad[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        pair[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                                   _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        quad[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]),
                                   _mm512_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]));
    __m512i half = _mm512_add_epi32(_mm512_shuffle_i32x4(quad[0], quad[1], 0x88),
                                    _mm512_shuffle_i32x4(quad[0], quad[1], 0xdd));
    __m256i low = _mm512_castsi512_si256(half), high = _mm512_extracti64x4_epi64(half, 1);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

static inline float *store_rows(float *acc, size_t rows, __m256 total) {
    float result[GROUP];
    _mm256_storeu_ps(result, total);
    memcpy(acc, result, rows * sizeof *acc);
    return acc + rows;
}

/* Where a group of rows begins in the planes; a short group repeats its last row. */
struct group {
    const uint8_t *sign[GROUP], *second[GROUP];
    uint32_t magnitudes[GROUP][CHUNK];
};

/* Add a stretch of eight rows; `bytes` of each plane are there, `wide` says whether there is a high part. */
BILLM_INLINE void add_stretch(const struct group *g, size_t byte, const size_t bytes, size_t block,
                              const struct stretch *x, const int wide, __m512i low[GROUP], __m512i high[GROUP]) {
    /* Blends of two vectors instead of masked sums: those would need a copy each. */
    const __m512i index = _mm512_load_si512(x->index), next = _mm512_add_epi8(index, _mm512_set1_epi8(1));
    const __m512i x_low = _mm512_load_si512(x->low), minus_low = _mm512_sub_epi8(_mm512_setzero_si512(), x_low);
    const __m512i x_high = _mm512_load_si512(x->high), minus_high = _mm512_sub_epi8(_mm512_setzero_si512(), x_high);
    const uint64_t salient = x->salient;
#pragma GCC unroll 8
    for (size_t r = 0; r < GROUP; r++) {
        uint64_t sign = load_bits(g->sign[r] + byte, bytes), second = load_bits(g->second[r] + byte, bytes);
        __mmask64 plus = sign, q = second ^ (salient & ~sign);
        const uint32_t *four = &g->magnitudes[r][block];
        __asm__ volatile("" : "+r"(four)); /* or the compiler keeps eight broadcasts in registers, and spills the sums */
        __m512i magnitude =
            _mm512_shuffle_epi8(_mm512_set1_epi32((int)*four), _mm512_mask_blend_epi8(q, index, next));
        low[r] = _mm512_dpbusd_epi32(low[r], magnitude, _mm512_mask_blend_epi8(plus, minus_low, x_low));
        if (wide)
            high[r] = _mm512_dpbusd_epi32(high[r], magnitude, _mm512_mask_blend_epi8(plus, minus_high, x_high));
    }
}

static void read_magnitudes(const struct billm_weight *w, const size_t rows[GROUP], size_t block, struct group *g) {
    const size_t count = billm_min(CHUNK, w->blocks - block);
    const __mmask16 there = (__mmask16)((1u << count) - 1);
    for (size_t r = 0; r < GROUP; r++) {
        __m512i scales = _mm512_maskz_loadu_epi32(there, w->scales + 4 * (rows[r] * w->blocks + block));
        _mm512_storeu_si512(g->magnitudes[r], magnitudes(scales));
    }
}

BILLM_INLINE void gemv(const struct billm_weight *w, const struct stretch *x, const int wide, const float *x_scale,
                       size_t row, size_t end, float *acc) {
    const size_t cols = stretch_cols(w), stretches = (w->cols + cols - 1) / cols, per_block = w->block / cols;
    for (; row < end; row += GROUP) {
        struct group g;
        size_t rows[GROUP], stretch = 0;
        __m256 total = _mm256_setzero_ps();
        for (size_t r = 0; r < GROUP; r++) {
            rows[r] = billm_min(row + r, end - 1);
            g.sign[r] = w->sign + rows[r] * w->stride;
            g.second[r] = w->second + rows[r] * w->stride;
        }
        for (size_t block = 0; block < w->blocks; block++) {
            __m512i low[GROUP], high[GROUP];
            if (block % CHUNK == 0)
                read_magnitudes(w, rows, block, &g);
#pragma GCC unroll 8
            for (size_t r = 0; r < GROUP; r++)
                low[r] = high[r] = _mm512_setzero_si512();
            for (size_t last = billm_min(stretch + per_block, stretches); stretch < last; stretch++) {
                const size_t byte = stretch * cols / 8;
                if (w->stride - byte >= 8 && cols == STRETCH)
                    add_stretch(&g, byte, 8, block % CHUNK, x + stretch, wide, low, high);
                else
                    add_stretch(&g, byte, 4, block % CHUNK, x + stretch, wide, low, high);
            }
            if (wide)
#pragma GCC unroll 8
                for (size_t r = 0; r < GROUP; r++)
                    low[r] = _mm512_add_epi32(low[r], _mm512_sub_epi32(_mm512_slli_epi32(high[r], 8), high[r]));
            total = billm_step(total, x_scale[block], sum_lanes(low));
        }
        acc = store_rows(acc, billm_min(GROUP, end - row), total);
    }
}

static void binary_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                        size_t end, float *acc) {
    if (bits > 8)
        gemv(w, prepared, 1, x_scale, row, end, acc);
    else
        gemv(w, prepared, 0, x_scale, row, end, acc);
}

/* Up to 32 columns of eight rows. */
BILLM_INLINE void add_columns(const int8_t *const from[GROUP], size_t col, const int whole, size_t count,
                              const int16_t *x, __m512i sums[GROUP]) {
    int16_t short_x[32] = {0};
    int8_t short_row[32] = {0};
    if (!whole)
        memcpy(short_x, x + col, count * sizeof *x);
    const __m512i values = _mm512_loadu_si512(whole ? x + col : short_x);
#pragma GCC unroll 8
    for (size_t r = 0; r < GROUP; r++) {
        if (!whole)
            memcpy(short_row, from[r] + col, count);
        const __m256i weight = _mm256_loadu_si256((const void *)(whole ? from[r] + col : short_row));
        sums[r] = _mm512_dpwssd_epi32(sums[r], _mm512_cvtepi8_epi16(weight), values);
    }
}

static void int8_gemv(const struct billm_weight *w, const int16_t *x, const float *x_scale, size_t row, size_t end,
                      float *acc) {
    for (size_t rows; row < end; row += rows) {
        const int8_t *from[GROUP];
        __m256 total = _mm256_setzero_ps();
        rows = billm_min(GROUP, end - row);
        for (size_t r = 0; r < GROUP; r++)
            from[r] = w->values + (row + billm_min(r, rows - 1)) * w->stride;
        for (size_t block = 0, col = 0; block < w->blocks; block++) {
            const size_t stop = billm_min(col + w->block, w->cols);
            __m512i sums[GROUP];
#pragma GCC unroll 8
            for (size_t r = 0; r < GROUP; r++)
                sums[r] = _mm512_setzero_si512();
            for (; col + 32 <= stop; col += 32)
                add_columns(from, col, 1, 32, x, sums);
            if (col < stop)
                add_columns(from, col, 0, stop - col, x, sums);
            col = stop;
            total = billm_step(total, x_scale[block], sum_lanes(sums));
        }
        acc = store_rows(acc, rows, total);
    }
}

/* ---- prompts ---- */

enum { TILE_ROWS = 16 };

/* Sums over `pairs` pairs of columns, four tokens by sixteen rows; `level` is AVX2's tile. Two sums per token, for
 * alternate pairs, hide the latency of the instruction. */
static void multiply_block(const __m512i *level, size_t pairs, const int16_t *const x[BILLM_TOKEN_STEP],
                           __m512i sums[BILLM_TOKEN_STEP]) {
    const int16_t *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    size_t pair = 0;
    for (; pair + 1 < pairs; pair += 2) {
        __m512i even = _mm512_load_si512(level + pair), odd = _mm512_load_si512(level + pair + 1);
        a0 = _mm512_dpwssd_epi32(a0, even, _mm512_set1_epi32((int)billm_load32(x0 + 2 * pair)));
        a1 = _mm512_dpwssd_epi32(a1, even, _mm512_set1_epi32((int)billm_load32(x1 + 2 * pair)));
        a2 = _mm512_dpwssd_epi32(a2, even, _mm512_set1_epi32((int)billm_load32(x2 + 2 * pair)));
        a3 = _mm512_dpwssd_epi32(a3, even, _mm512_set1_epi32((int)billm_load32(x3 + 2 * pair)));
        b0 = _mm512_dpwssd_epi32(b0, odd, _mm512_set1_epi32((int)billm_load32(x0 + 2 * pair + 2)));
        b1 = _mm512_dpwssd_epi32(b1, odd, _mm512_set1_epi32((int)billm_load32(x1 + 2 * pair + 2)));
        b2 = _mm512_dpwssd_epi32(b2, odd, _mm512_set1_epi32((int)billm_load32(x2 + 2 * pair + 2)));
        b3 = _mm512_dpwssd_epi32(b3, odd, _mm512_set1_epi32((int)billm_load32(x3 + 2 * pair + 2)));
    }
    if (pair < pairs) {
        __m512i last = _mm512_load_si512(level + pair);
        a0 = _mm512_dpwssd_epi32(a0, last, _mm512_set1_epi32((int)billm_load32(x0 + 2 * pair)));
        a1 = _mm512_dpwssd_epi32(a1, last, _mm512_set1_epi32((int)billm_load32(x1 + 2 * pair)));
        a2 = _mm512_dpwssd_epi32(a2, last, _mm512_set1_epi32((int)billm_load32(x2 + 2 * pair)));
        a3 = _mm512_dpwssd_epi32(a3, last, _mm512_set1_epi32((int)billm_load32(x3 + 2 * pair)));
    }
    sums[0] = _mm512_add_epi32(a0, b0);
    sums[1] = _mm512_add_epi32(a1, b1);
    sums[2] = _mm512_add_epi32(a2, b2);
    sums[3] = _mm512_add_epi32(a3, b3);
}

static void multiply(const void *tile, size_t cols, size_t block, const void *x, size_t x_stride, int bits,
                     const float *x_scale, size_t scale_stride, size_t tokens, float *acc) {
    (void)bits; /* pairs of int16 serve both */
    for (size_t t = 0; t < tokens; t += BILLM_TOKEN_STEP, acc += BILLM_TOKEN_STEP * TILE_ROWS) {
        for (size_t b = 0, col = 0; col < cols; b++, col += block) {
            const int16_t *values[BILLM_TOKEN_STEP];
            __m512i sums[BILLM_TOKEN_STEP];
            for (size_t i = 0; i < BILLM_TOKEN_STEP; i++)
                values[i] = (const int16_t *)(const void *)((const uint8_t *)x + (t + i) * x_stride) + col;
            multiply_block((const __m512i *)tile + col / 2, (billm_min(block, cols - col) + 1) / 2, values, sums);
            for (size_t i = 0; i < BILLM_TOKEN_STEP; i++) {
                __m512 scale = _mm512_set1_ps(x_scale[(t + i) * scale_stride + b]);
                float *to = acc + i * TILE_ROWS;
                __m512 product = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums[i]));
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), product));
            }
        }
    }
}

const struct billm_isa billm_avx512 = {
    .name = "avx512-vnni",
    .tile_rows = TILE_ROWS,
    .quantize = quantize,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .binary_gemv = binary_gemv,
    .int8_gemv = int8_gemv,
    .binary_tile = billm_avx2_binary_tile,
    .int8_tile = billm_avx2_int8_tile,
    .pack = billm_pack_int16,
    .multiply = multiply,
    .floats = &billm_float_avx512,
};
