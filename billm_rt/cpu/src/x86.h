/* What the x86 files share: the decoding product, but for the inner sums of bytes.
 *
 * A level is half the sum of two signs times two scales of its class (plain or salient):
 *
 *   level = (s * (m0 + m1) + q * (m1 - m0)) / 2   plain,   q = s * t        (t: group flag as a sign)
 *   level = (s * (m2 + m3) + q * (m3 - m2)) / 2   salient, q = t            (t: residual sign)
 *
 * with the magnitudes m0..m3 of PackedLinear. With U_s, U_q the sums of the activations where the bit of s, q is 1 and
 * X the sum of all, per class:  sum(level * x) = (m0 + m1) U_s + (m1 - m0) U_q - m1 X   (salient: m2, m3 alike).
 * So a product needs no table of levels: four masked sums of bytes, and a few multiplications per unit.
 *
 * A slab is 256 activations in the order that a plane's 32 bytes ask for: vector k holds those of bit k of each byte.
 * Then (plane >> k) & 1 meets them without moving a bit: expanding a plane costs two instructions per vector, and a
 * 32-bit lane sums one unit of 32 columns. */
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
/* Missing in SIMDe 0.7. */
#define _mm512_cvtepi8_epi32 billm_cvtepi8_epi32
#define _mm512_cvtepi32_ps billm_cvtepi32_ps
#define _mm512_maskz_loadu_epi8 billm_maskz_loadu_epi8
#if defined(BILLM_AVXVNNI) && !defined(__AVXVNNI__)
static inline __m256i billm_dpbusd(__m256i sum, __m256i a, __m256i b) {
    return _mm512_castsi512_si256(
        _mm512_dpbusd_epi32(_mm512_castsi256_si512(sum), _mm512_castsi256_si512(a), _mm512_castsi256_si512(b)));
}
static inline __m256i billm_dpwssd(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
#define _mm256_dpbusd_avx_epi32 billm_dpbusd
#define _mm256_dpwssd_avx_epi32 billm_dpwssd
#endif
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
#endif

/* One lane mask per 32-bit word below `words`, for loads that must not pass the end of a row. */
static inline __m256i billm_word_mask(size_t words) {
    int count = words > 8 ? 8 : (int)words;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct billm_slab {
    int8_t plain[8][32], salient[8][32]; /* 0 where a column is of the other class */
    uint8_t not_salient[32];
    int16_t sums[16]; /* per unit: of plain, of salient */
};

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

static inline size_t billm_slabs(const struct billm_weight *w) {
    return (w->cols + 255) / 256;
}

/* The digits of 16 activations: 256 high + low = x, both signed. */
static inline void billm_split16(const int16_t *x, int8_t *low, int8_t *high) {
    const __m256i values = _mm256_loadu_si256((const __m256i *)x), byte = _mm256_set1_epi16(0xff);
    __m256i upper = _mm256_srli_epi16(_mm256_add_epi16(values, _mm256_set1_epi16(128)), 8);
    __m256i both = _mm256_packus_epi16(_mm256_and_si256(values, byte), upper);
    both = _mm256_permute4x64_epi64(both, 0xd8);
    _mm_storeu_si128((__m128i *)low, _mm256_castsi256_si128(both));
    _mm_storeu_si128((__m128i *)high, _mm256_extracti128_si256(both, 1));
}

/* The slabs of the low digits, then those of the high ones. */
static inline void billm_prepare_binary(const struct billm_weight *w, const int16_t *x, struct billm_slab *slab) {
    const size_t slabs = billm_slabs(w);
    for (size_t col = 0; col < w->cols; col += 256, slab++) {
        int16_t values[256] = {0};
        int8_t digits[2][256];
        uint8_t salient[32] = {0};
        memcpy(values, x + col, billm_min(256, w->cols - col) * sizeof *x);
        memcpy(salient, w->salient + col / 8, billm_min(32, w->stride - col / 8));
        for (size_t j = 0; j < 256; j += 16)
            billm_split16(values + j, digits[0] + j, digits[1] + j);
        if (w->stride - col / 8 <= 16) { /* a short slab lies there twice, so that it serves two rows at once */
            memcpy(digits[0] + 128, digits[0], 128);
            memcpy(digits[1] + 128, digits[1], 128);
            memcpy(salient + 16, salient, 16);
        }
        for (size_t i = 0; i < 2; i++) {
            struct billm_slab *to = slab + i * slabs;
            billm_prepare256(digits[i], salient, to->plain[0], to->salient[0], 32, to->not_salient, to->sums);
        }
    }
}

/* sum(level * x) of each unit of a slab, from 32 bytes of both planes and the magnitudes of each unit's block. */
typedef __m256i billm_unit_sums(__m256i sign, __m256i second, const struct billm_slab *x, __m256i magnitudes);

/* The activations of a unit of 4-bit codes: 256 high + low, of the columns in low nibbles, then of those in high ones, in
 * both halves of a vector. */
struct billm_nibble_input {
    int8_t low[2][32], high[2][32];
    int32_t offset; /* 8 times their sum */
    uint8_t unused[28]; /* a whole number of vectors */
};

#define BILLM_INLINE __attribute__((always_inline)) static inline

/* The slabs of the low and of the high digits, where their columns begin, and the block (from that of the slab's first unit on) of each 32-bit lane. */
struct billm_place {
    const struct billm_slab *low, *high; /* high: NULL for 8 bits */
    size_t unit, units, block, blocks;
    __m256i spread;
};

/* The sums of both digits. */
BILLM_INLINE __m256i billm_digit_sums(__m256i sign, __m256i second, struct billm_place at, __m256i magnitudes,
                                      billm_unit_sums *unit_sums) {
    __m256i low = unit_sums(sign, second, at.low, magnitudes);
    if (!at.high)
        return low;
    return _mm256_add_epi32(low, _mm256_slli_epi32(unit_sums(sign, second, at.high, magnitudes), 8));
}

/* The sums of one row over a slab. */
BILLM_INLINE __m256i billm_row_sums(const struct billm_weight *w, size_t row, struct billm_place at,
                                    billm_unit_sums *unit_sums) {
    const uint8_t *sign = w->sign + row * w->stride + 4 * at.unit, *second = w->second + row * w->stride + 4 * at.unit;
    const void *scales = w->scales + 4 * (row * w->blocks + at.block);
    __m256i packed = _mm256_maskload_epi32(scales, billm_word_mask(at.blocks));
    __m256i magnitudes = billm_magnitudes(_mm256_permutevar8x32_epi32(packed, at.spread));
    __m256i words = billm_word_mask(at.units), s, t;
    if (at.units >= 8) {
        s = _mm256_loadu_si256((const void *)sign);
        t = _mm256_loadu_si256((const void *)second);
    } else {
        s = _mm256_maskload_epi32((const void *)sign, words);
        t = _mm256_maskload_epi32((const void *)second, words);
    }
    return billm_digit_sums(s, t, at, magnitudes, unit_sums);
}

/* `words` (at most 4) 32-bit words of two rows, side by side. */
BILLM_INLINE __m256i billm_load_pair(const uint8_t *first, const uint8_t *second, size_t words) {
    __m128i mask = _mm256_castsi256_si128(billm_word_mask(words));
    __m128i low = _mm_maskload_epi32((const void *)first, mask), high = _mm_maskload_epi32((const void *)second, mask);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* The sums of two rows over a slab of at most four units: in the lower and in the upper half. */
BILLM_INLINE __m256i billm_pair_sums(const struct billm_weight *w, size_t row0, size_t row1, struct billm_place at,
                                     billm_unit_sums *unit_sums) {
    const size_t plane0 = row0 * w->stride + 4 * at.unit, plane1 = row1 * w->stride + 4 * at.unit;
    const uint8_t *scales = w->scales + 4 * at.block;
    __m256i packed = billm_load_pair(scales + 4 * row0 * w->blocks, scales + 4 * row1 * w->blocks, at.blocks);
    __m256i pair_spread = _mm256_add_epi32(_mm256_permute2x128_si256(at.spread, at.spread, 0x00),
                                           _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    return billm_digit_sums(billm_load_pair(w->sign + plane0, w->sign + plane1, at.units),
                            billm_load_pair(w->second + plane0, w->second + plane1, at.units), at,
                            billm_magnitudes(_mm256_permutevar8x32_epi32(packed, pair_spread)), unit_sums);
}

/* The sums of `rows` rows (a short group repeats its last one) over a slab: lane i of sums[j] is row i, unit j. */
BILLM_INLINE void billm_group_sums(const struct billm_weight *w, size_t row, size_t rows, struct billm_place at,
                                   billm_unit_sums *unit_sums, __m256i sums[8]) {
    if (at.units > 4)
        for (size_t r = 0; r < 8; r++)
            sums[r] = billm_row_sums(w, row + billm_min(r, rows - 1), at, unit_sums);
    else
        for (size_t r = 0; r < 8; r += 2) {
            size_t row0 = row + billm_min(r, rows - 1), row1 = row + billm_min(r + 1, rows - 1);
            sums[r] = billm_pair_sums(w, row0, row1, at, unit_sums);
            sums[r + 1] = _mm256_permute2x128_si256(sums[r], sums[r], 0x11);
        }
    billm_transpose8(sums);
}

/* acc[0 .. end - row) from the prepared token; eight rows at a time, so that a lane of the running sums is a row. */
BILLM_INLINE void billm_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale,
                             size_t row, size_t end, float *acc, billm_unit_sums *unit_sums) {
    const size_t units_per_block = w->block / BILLM_UNIT, units = w->stride / 4;
    int32_t block_of_unit[8];
    for (size_t i = 0; i < 8; i++)
        block_of_unit[i] = (int32_t)(i / units_per_block);
    struct billm_place at = {.spread = _mm256_loadu_si256((const __m256i *)block_of_unit)};
    for (; row < end; row += 8) {
        size_t rows = billm_min(8, end - row), block = 0;
        __m256 total = _mm256_setzero_ps();
        const struct billm_slab *low = prepared;
        for (size_t unit = 0; unit < units; low++) {
            at.low = low;
            at.high = bits == 8 ? NULL : low + billm_slabs(w);
            at.unit = unit;
            at.units = billm_min(8, units - unit);
            at.block = block;
            at.blocks = billm_min(256 / w->block, w->blocks - block);
            __m256i sums[8], sum = _mm256_setzero_si256();
            billm_group_sums(w, row, rows, at, unit_sums, sums);
            for (size_t i = 0; i < at.units; i++) {
                sum = _mm256_add_epi32(sum, sums[i]);
                if (++unit % units_per_block == 0 || unit == units) {
                    total = billm_step(total, x_scale[block++], sum);
                    sum = _mm256_setzero_si256();
                }
            }
        }
        float result[8];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

#endif
