/* AVX-VNNI: AVX2 with vpdpwssd and vpdpbusd, which multiply pairs of int16 or fours of bytes and add them up at once. */
#include "x86.h"

static inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
    return _mm256_dpwssd_avx_epi32(sum, a, b);
}

BILLM_INLINE __m256i nibble_products(__m256i first, __m256i last, const int8_t x[2][32]) {
    __m256i sum = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), first, _mm256_load_si256((const void *)x[0]));
    return _mm256_dpbusd_avx_epi32(sum, last, _mm256_load_si256((const void *)x[1]));
}

#include "decode256.h"

const struct billm_isa billm_avxvnni = {
    .name = "avx-vnni",
    .tile_rows = BILLM_AVX2_TILE_ROWS,
    .token_step = BILLM_AVX2_TOKEN_STEP,
    .packed_bytes = sizeof(int16_t),
    .row_step = billm_lookup_step,
    .few_tokens = BILLM_LOOKUP_TOKENS,
    .quantize = billm_avx2_quantize,
    .arranged_bytes = billm_lookup_bytes,
    .arrange_begin = billm_lookup_begin,
    .arrange = billm_lookup_arrange,
    .prepared_bytes = billm_avx2_prepared_bytes,
    .prepare = billm_avx2_prepare,
    .binary_gemv = billm_lookup_gemv,
    .int8_gemv = int8_gemv,
    .int4_gemv = int4_gemv,
    .binary_tile = billm_avx2_binary_tile,
    .int8_tile = billm_avx2_int8_tile,
    .int4_tile = billm_avx2_int4_tile,
    .pack = billm_avx2_pack,
    .multiply = billm_avx2_multiply,
    .floats = &billm_float_avx2,
};
