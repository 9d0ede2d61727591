/* What the x86 files share. */
#ifndef BILLM_X86_H
#define BILLM_X86_H

#include "decoder.h"

#if defined(BILLM_SIMDE)
/* AVX-512 emulated, for tests on machines without it. */
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
static inline simde__m512 billm_cvtepi32_ps(simde__m512i value) {
    int32_t from[16];
    float to[16];
    memcpy(from, &value, sizeof from);
    for (int i = 0; i < 16; i++)
        to[i] = (float)from[i];
    return simde_mm512_loadu_ps(to);
}
static inline simde__m512i billm_maskz_loadu_epi8(simde__mmask64 mask, const void *from) {
    int8_t bytes[64] = {0};
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1)
            bytes[i] = ((const int8_t *)from)[i];
    return simde_mm512_loadu_si512(bytes);
}
static inline simde__m512i billm_cvtepi8_epi32(__m128i bytes) {
    int8_t from[16];
    int32_t to[16];
    memcpy(from, &bytes, sizeof from);
    for (int i = 0; i < 16; i++)
        to[i] = from[i];
    return simde_mm512_loadu_si512(to);
}
static inline simde__m512i billm_maskz_loadu_epi16(simde__mmask32 mask, const void *from) {
    int16_t words[32] = {0};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1)
            words[i] = ((const int16_t *)from)[i];
    return simde_mm512_loadu_si512(words);
}
static inline simde__m512i billm_maskz_compress_epi16(simde__mmask32 mask, simde__m512i value) {
    int16_t from[32], to[32] = {0};
    memcpy(from, &value, sizeof from);
    for (int i = 0, count = 0; i < 32; i++)
        if (mask >> i & 1)
            to[count++] = from[i];
    return simde_mm512_loadu_si512(to);
}
static inline int billm_reduce_add_epi32(simde__m512i value) {
    int32_t from[16], sum = 0;
    memcpy(from, &value, sizeof from);
    for (int i = 0; i < 16; i++)
        sum += from[i];
    return sum;
}
/* Missing in SIMDe 0.7. */
#define _mm512_maskz_loadu_epi16 billm_maskz_loadu_epi16
#define _mm512_maskz_compress_epi16 billm_maskz_compress_epi16
#define _mm512_reduce_add_epi32 billm_reduce_add_epi32
#define _mm512_cvtepi8_epi32 billm_cvtepi8_epi32
#define _mm512_cvtepi32_ps billm_cvtepi32_ps
#define _mm512_maskz_loadu_epi8 billm_maskz_loadu_epi8
#if defined(BILLM_AVXVNNI) && !defined(__AVXVNNI__)
static inline __m256i billm_dpwssd(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 billm_dpwssd
#endif
static inline uint64_t billm_pext(uint64_t bits, uint64_t mask) {
    uint64_t value = 0;
    for (int to = 0; mask; mask &= mask - 1)
        value |= (bits >> __builtin_ctzll(mask) & 1) << to++;
    return value;
}
static inline uint64_t billm_pdep(uint64_t bits, uint64_t mask) {
    uint64_t value = 0;
    for (; mask; mask &= mask - 1, bits >>= 1)
        value |= bits & 1 ? mask & -mask : 0;
    return value;
}
#define _pext_u64 billm_pext
#define _pdep_u64 billm_pdep
#else
#include <immintrin.h>
#endif

/* r[i] lane j -> r[j] lane i, 32-bit lanes. */
static inline void billm_transpose8(__m256i r[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

/* acc = acc + scale * sum, two roundings. */
static inline __m256 billm_step(__m256 acc, float scale, __m256i sum) {
    return _mm256_add_ps(acc, _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(sum)));
}

/* Row sums: lane i of the result is the sum of the lanes of r[i]. */
static inline __m256i billm_sum8(const __m256i r[8]) {
    __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(r[0], r[1]), _mm256_hadd_epi32(r[2], r[3]));
    __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(r[4], r[5]), _mm256_hadd_epi32(r[6], r[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

/* The four magnitudes (bytes of each 32-bit lane) from alpha_c, alpha_s, alpha_o, alpha_r. */
static inline __m256i billm_magnitudes(__m256i scales) {
    const __m256i repeat_o =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 2, 4, 5, 6, 6, 8, 9, 10, 10, 12, 13, 14, 14));
    __m256i residual = _mm256_and_si256(scales, _mm256_set1_epi32((int)0xff000000u));
    __m256i sum = _mm256_adds_epu8(_mm256_shuffle_epi8(scales, repeat_o), residual);
    return _mm256_subs_epu8(sum, _mm256_srli_epi32(residual, 8));
}

#if defined(__AVX512BW__) || defined(BILLM_SIMDE)
static inline __m512i billm_magnitudes512(__m512i scales) {
    const __m512i repeat_o =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 2, 4, 5, 6, 6, 8, 9, 10, 10, 12, 13, 14, 14));
    __m512i residual = _mm512_and_si512(scales, _mm512_set1_epi32((int)0xff000000u));
    __m512i sum = _mm512_adds_epu8(_mm512_shuffle_epi8(scales, repeat_o), residual);
    return _mm512_subs_epu8(sum, _mm512_srli_epi32(residual, 8));
}

/* acc = acc + scale * sum, two roundings. */
static inline __m512 billm_step512(__m512 acc, float scale, __m512i sum) {
    return _mm512_add_ps(acc, _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(sum)));
}
#endif

/* The activations of a unit of 4-bit codes: 256 high + low, of the columns in low nibbles, then of those in high ones, in
 * both halves of a vector. */
struct billm_nibble_input {
    int8_t low[2][32], high[2][32];
    int32_t offset; /* 8 times their sum */
    uint8_t unused[28]; /* a whole number of vectors */
};

#define BILLM_INLINE __attribute__((always_inline)) static inline

#endif
