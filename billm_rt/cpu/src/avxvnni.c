/* AVX-VNNI: AVX2 with vpdpwssd and vpdpbusd, which multiply pairs of int16 or fours of bytes and add them up at once. */
#include "x86.h"

static inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
    return _mm256_dpwssd_avx_epi32(sum, a, b);
}

/* The low digits of the activations, then the high ones: 256 high + low = x, both signed. */
BILLM_INLINE __m256i narrow_words(__m256i x) {
    const __m256i high = _mm256_srli_epi16(_mm256_add_epi16(x, _mm256_set1_epi16(128)), 8);
    return _mm256_packus_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0xff)), high);
}

BILLM_INLINE __m256i nibble_products(__m256i first, __m256i last, const int8_t x[2][32]) {
    __m256i sum = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), first, _mm256_load_si256((const void *)x[0]));
    return _mm256_dpbusd_avx_epi32(sum, last, _mm256_load_si256((const void *)x[1]));
}

BILLM_INLINE void add_narrow(__m256i sums[2], __m256i levels, const uint8_t x[2][32]) {
    sums[0] = _mm256_dpbusd_avx_epi32(sums[0], levels, _mm256_load_si256((const void *)x[0]));
    sums[1] = _mm256_dpbusd_avx_epi32(sums[1], levels, _mm256_load_si256((const void *)x[1]));
}

BILLM_INLINE __m256i narrow_total(const __m256i sums[2]) {
    return _mm256_add_epi32(sums[0], _mm256_slli_epi32(sums[1], 8));
}

#include "decode256.h"

const struct billm_isa billm_avxvnni = {
    .name = "avx-vnni",
    .tile_rows = BILLM_AVX2_TILE_ROWS,
    .token_step = BILLM_AVX2_TOKEN_STEP,
    .packed_bytes = sizeof(int16_t),
    .quantize = billm_avx2_quantize,
    .prepared_bytes = billm_avx2_prepared_bytes,
    .prepare = prepare,
    .binary_gemv = binary_gemv,
    .int8_gemv = int8_gemv,
    .int4_gemv = int4_gemv,
    .binary_tile = billm_avx2_binary_tile,
    .int8_tile = billm_avx2_int8_tile,
    .int4_tile = billm_avx2_int4_tile,
    .pack = billm_avx2_pack,
    .multiply = billm_avx2_multiply,
    .floats = &billm_float_avx2,
};
