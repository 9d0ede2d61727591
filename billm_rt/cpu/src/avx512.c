/* AVX-512 with VNNI: vpdpbusd sums four bytes straight into an int32 lane, vpdpwssd a pair of int16.
 * Decoding stays at 256 bits, where slabs and tails are those of AVX2: memory is the limit there, not arithmetic. */
#include "x86.h"

static void quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                     float *scales) {
    billm_quantize_token(x, col_scale, cols, block, bits, values, scales);
}

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
    (void)bits;
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
    .packed_bytes = sizeof(int16_t),
    .quantize = quantize,
    .prepared_bytes = billm_portable_prepared_bytes,
    .prepare = billm_portable_prepare,
    .binary_gemv = billm_portable_binary_gemv,
    .int8_gemv = billm_portable_int8_gemv,
    .binary_tile = billm_avx2_binary_tile,
    .int8_tile = billm_avx2_int8_tile,
    .pack = billm_avx2_pack,
    .multiply = multiply,
};
