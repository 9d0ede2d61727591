/* What the x86 files share. A slab is a stretch of columns in the order that a bit plane's bytes ask for: vector k of a
 * slab holds the activations of bit k of each byte. Then (plane >> k) & 1 meets them without moving a single bit:
 * expanding a plane costs two instructions per vector, and a 32-bit lane sums one unit of 32 columns. */
#ifndef BILLM_X86_H
#define BILLM_X86_H

#include "kernels.h"

#if defined(BILLM_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
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
    const __m256i repeat_o = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 2, 4, 5, 6, 6, 8, 9, 10, 10, 12, 13, 14, 14));
    __m256i residual = _mm256_and_si256(scales, _mm256_set1_epi32((int)0xff000000u));
    __m256i sum = _mm256_adds_epu8(_mm256_shuffle_epi8(scales, repeat_o), residual);
    return _mm256_subs_epu8(sum, _mm256_srli_epi32(residual, 8));
}

/* One lane mask per 32-bit word below `words`, for loads that must not pass the end of a row. */
static inline __m256i billm_word_mask(size_t words) {
    int count = words > 8 ? 8 : (int)words;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Put 256 activations into slab order: vector k gets x[8 i + k] as byte i, split into the columns that are salient and
 * those that are not; `sums` gets, per unit, the sum of the ones and of the others as a pair of int16. */
static inline void billm_prepare256(const int8_t *x, const uint8_t *salient_plane, int8_t *plain, int8_t *salient,
                                    size_t vector_stride, uint8_t *not_salient, int16_t *sums) {
    const __m256i ones = _mm256_set1_epi8(1), low_half = _mm256_set1_epi32(0xffff);
    const __m256i interleave =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++) {
        __m128i low = _mm_loadu_si128((const __m128i *)(x + 16 * i));
        __m128i high = _mm_loadu_si128((const __m128i *)(x + 128 + 16 * i));
        a[i] = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), interleave);
    }
    /* An 8 x 8 transposition of 16-bit lanes within each half. */
    for (int i = 0; i < 4; i++) {
        b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            a[4 * i + 2 * j] = _mm256_unpacklo_epi32(b[4 * i + j], b[4 * i + j + 2]);
            a[4 * i + 2 * j + 1] = _mm256_unpackhi_epi32(b[4 * i + j], b[4 * i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        b[2 * i] = _mm256_unpacklo_epi64(a[i], a[i + 4]);
        b[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 4]);
    }
    __m256i plane = _mm256_loadu_si256((const __m256i *)salient_plane);
    __m256i plain_sum = _mm256_setzero_si256(), salient_sum = _mm256_setzero_si256();
    _mm256_storeu_si256((__m256i *)not_salient, _mm256_xor_si256(plane, _mm256_set1_epi8(-1)));
    for (int k = 0; k < 8; k++) {
        __m256i mask = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_srli_epi16(plane, k), ones), ones);
        __m256i outside = _mm256_andnot_si256(mask, b[k]), inside = _mm256_and_si256(mask, b[k]);
        _mm256_storeu_si256((__m256i *)(plain + (size_t)k * vector_stride), outside);
        _mm256_storeu_si256((__m256i *)(salient + (size_t)k * vector_stride), inside);
        plain_sum = _mm256_add_epi16(plain_sum, _mm256_maddubs_epi16(ones, outside));
        salient_sum = _mm256_add_epi16(salient_sum, _mm256_maddubs_epi16(ones, inside));
    }
    plain_sum = _mm256_and_si256(_mm256_madd_epi16(plain_sum, _mm256_set1_epi16(1)), low_half);
    salient_sum = _mm256_slli_epi32(_mm256_madd_epi16(salient_sum, _mm256_set1_epi16(1)), 16);
    _mm256_storeu_si256((__m256i *)sums, _mm256_or_si256(plain_sum, salient_sum));
}

#endif
