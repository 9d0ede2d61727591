/* AVX-512 with VNNI: vpdpwssd sums a pair of int16 straight into an int32 lane, vpdpbusd four bytes. Decoding looks sums up,
 * with VBMI in vectors of 512 bits, else as AVX2 does. */
#include "x86.h"

void billm_avx512_quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                           float *scales) {
    billm_quantize_token(x, col_scale, cols, block, bits, values, scales);
}

/* ---- decoding ---- */

static size_t prepared_bytes(const struct billm_weight *w) {
    return w->sign ? billm_lookup_prepared_bytes(w) : billm_avx512_table_bytes(w);
}

static void prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    if (w->sign)
        billm_lookup_prepare(w, x, prepared);
    else
        billm_avx512_prepare_table(w, x, prepared);
}

size_t billm_avx512vbmi_prepared_bytes(const struct billm_weight *w) {
    return w->sign ? billm_avx512_lookup_prepared_bytes(w) : billm_avx512_table_bytes(w);
}

void billm_avx512vbmi_prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    if (w->sign)
        billm_avx512_lookup_prepare(w, x, prepared);
    else
        billm_avx512_prepare_table(w, x, prepared);
}

/* ---- prompts ---- */

/* A tile is two of AVX2's, of sixteen rows each. */
enum { TILE_ROWS = 32, HALF_TILE = 16 * BILLM_TILE_COLS * sizeof(int16_t) };

typedef void make_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile);

static inline void two_tiles(make_tile *make, const struct billm_weight *w, size_t row, size_t rows, size_t col,
                             size_t cols, void *tile) {
    make(w, row, billm_min(rows, 16), col, cols, tile);
    if (rows > 16)
        make(w, row + 16, rows - 16, col, cols, (uint8_t *)tile + HALF_TILE);
    else /* sums that nobody reads must not overflow either */
        memset((uint8_t *)tile + HALF_TILE, 0, HALF_TILE);
}

static void binary_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    two_tiles(billm_avx2_binary_tile, w, row, rows, col, cols, tile);
}

static void int8_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    two_tiles(billm_avx2_int8_tile, w, row, rows, col, cols, tile);
}

static void int4_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    two_tiles(billm_avx2_int4_tile, w, row, rows, col, cols, tile);
}

/* Sums over `pairs` pairs of columns, eight tokens by 32 rows: two loads of the tile and eight of activations feed
 * sixteen multiplications. Names instead of arrays: GCC keeps these in registers. */
static void multiply_block(const uint8_t *level, size_t pairs, const uint8_t *const x[8], __m512i sums[8][2]) {
    const uint8_t *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5], *x6 = x[6], *x7 = x[7];
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
    __m512i b0 = a0, b1 = a0, b2 = a0, b3 = a0, b4 = a0, b5 = a0, b6 = a0, b7 = a0;
#define TOKEN(t)                                                                                                       \
    pair = _mm512_set1_epi32((int)billm_load32(x##t + 4 * i));                                                         \
    a##t = _mm512_dpwssd_epi32(a##t, low, pair);                                                                       \
    b##t = _mm512_dpwssd_epi32(b##t, high, pair)
    for (size_t i = 0; i < pairs; i++) {
        __m512i low = _mm512_load_si512(level + 64 * i), high = _mm512_load_si512(level + 64 * i + HALF_TILE), pair;
        TOKEN(0);
        TOKEN(1);
        TOKEN(2);
        TOKEN(3);
        TOKEN(4);
        TOKEN(5);
        TOKEN(6);
        TOKEN(7);
    }
#undef TOKEN
    const __m512i result[8][2] = {{a0, b0}, {a1, b1}, {a2, b2}, {a3, b3}, {a4, b4}, {a5, b5}, {a6, b6}, {a7, b7}};
    memcpy(sums, result, sizeof result);
}

static void multiply(const struct billm_weight *w, const void *tile, size_t col, size_t cols, const void *panel,
                     size_t stride, int bits, const float *x_scale, size_t scale_stride, size_t tokens, float *acc) {
    const size_t block = w->block;
    const uint8_t *x = (const uint8_t *)panel + col * sizeof(int16_t);
    (void)bits;
    for (size_t t = 0; t < tokens; t += 8) {
        const size_t count = billm_min(8, tokens - t); /* a short step repeats its last token */
        for (size_t b = 0, at = 0; at < cols; b++, at += block) {
            const uint8_t *values[8];
            __m512i sums[8][2];
            for (size_t i = 0; i < 8; i++)
                values[i] = x + (t + billm_min(i, count - 1)) * stride + 2 * at;
            multiply_block((const uint8_t *)tile + 32 * at, (billm_min(block, cols - at) + 1) / 2, values, sums);
            for (size_t i = 0; i < count; i++) {
                float scale = x_scale[(t + i) * scale_stride + b], *to = acc + (t + i) * TILE_ROWS;
                _mm512_storeu_ps(to, billm_step512(_mm512_loadu_ps(to), scale, sums[i][0]));
                _mm512_storeu_ps(to + 16, billm_step512(_mm512_loadu_ps(to + 16), scale, sums[i][1]));
            }
        }
    }
}

const struct billm_isa billm_avx512 = {
    .name = "avx512-vnni",
    .tile_rows = TILE_ROWS,
    .token_step = 4,
    .packed_bytes = sizeof(int16_t),
    .row_step = billm_lookup_step,
    .few_tokens = BILLM_LOOKUP_TOKENS,
    .quantize = billm_avx512_quantize,
    .arranged_bytes = billm_lookup_bytes,
    .arrange_begin = billm_lookup_begin,
    .arrange = billm_lookup_arrange,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .binary_gemv = billm_lookup_gemv,
    .int8_gemv = billm_avx512_int8_gemv,
    .int4_gemv = billm_avx512_int4_gemv,
    .binary_tile = binary_tile,
    .int8_tile = int8_tile,
    .int4_tile = int4_tile,
    .pack = billm_avx2_pack,
    .multiply = multiply,
    .floats = &billm_float_avx512,
};

const struct billm_isa billm_avx512vbmi = {
    .name = "avx512-vbmi",
    .tile_rows = TILE_ROWS,
    .token_step = 4,
    .packed_bytes = sizeof(int16_t),
    .row_step = billm_avx512_lookup_step,
    .few_tokens = BILLM_AVX512_LOOKUP_TOKENS,
    .quantize = billm_avx512_quantize,
    .arranged_bytes = billm_avx512_lookup_bytes,
    .arrange_begin = billm_avx512_lookup_begin,
    .arrange = billm_avx512_lookup_arrange,
    .prepared_bytes = billm_avx512vbmi_prepared_bytes,
    .prepare = billm_avx512vbmi_prepare,
    .binary_gemv = billm_avx512_lookup_gemv,
    .int8_gemv = billm_avx512_int8_gemv,
    .int4_gemv = billm_avx512_int4_gemv,
    .binary_tile = binary_tile,
    .int8_tile = int8_tile,
    .int4_tile = int4_tile,
    .pack = billm_avx2_pack,
    .multiply = multiply,
    .floats = &billm_float_avx512,
};
