/* AVX-VNNI: AVX2 with vpdpwssd, which multiplies pairs of int16 and adds them up in one instruction. */
#include "x86.h"

static inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
    return _mm256_dpwssd_avx_epi32(sum, a, b);
}

#include "decode256.h"

const struct billm_isa billm_avxvnni = {
    .name = "avx-vnni",
    .tile_rows = BILLM_AVX2_TILE_ROWS,
    .token_step = BILLM_AVX2_TOKEN_STEP,
    .packed_bytes = sizeof(int16_t),
    .quantize = billm_avx2_quantize,
    .prepared_bytes = billm_avx2_prepared_bytes,
    .prepare = billm_avx2_prepare,
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
