/* AVX2, and AVX-512 without VBMI, decoding: products with the planes by looking sums up, four columns at a time.
 *
 * The four bits that a row has in four columns number one of sixteen sums of their activations, and a byte shuffle looks
 * the same four columns up for 32 rows at once. So a plane costs an instruction where multiplying costs several, but it
 * must lie in another order than in the file, which is made once (`arrange`): in tiles of 32 rows, a vector being one byte
 * of each, and within a block its plain columns first, then its salient ones. With s and q as x86.h has them and U_s, U_q
 * the sums of the activations where their bits are 1, X the sum of all, a class of a block comes to
 *
 *     (m0 + m1) U_s + (m1 - m0) U_q - m1 X        (salient: m2, m3)
 *
 * A sum of four activations, raised by RAISE so that it is not negative, has 16 bits: three digits of six, each in a table
 * of bytes. Four digits add up in a byte, then the bytes of even and of odd places do in words. What raising the sums
 * adds is (m0 + m1 + m1 - m0) RAISE = 2 m1 RAISE for four columns, which goes off with m1 X. */
#include "x86.h"

enum {
    TILE = BILLM_LOOKUP_ROWS,
    GROUP = 4, /* columns whose sums share tables */
    DIGITS = 3,
    DIGIT_BITS = 6,
    TABLE = 16,
    RAISE = 1 << 15, /* four activations are more than its negative */
    AHEAD = 2048,    /* bytes: what is fetched that far behind the vector that is read */
    MAX_BYTES = BILLM_MAX_BLOCK / 8 + 1 /* of a row in a block: each class fills up its last group */
};

/* The columns of each class in a block. */
struct columns {
    uint16_t plain, salient;
};

/* An arranged weight: this, in whole lines; for each block the places of its columns, plain ones first [block]; in whole
 * lines again; then the tiles. A tile has for each block the magnitudes m0, m1, m2, m3 [4][TILE], the bits of s and those of
 * q [bytes][TILE]. */
struct arranged {
    size_t tile_bytes;
    struct columns columns[];
};

/* A prepared token: this for each block, in whole lines; then DIGITS tables for each group of each block. */
struct constants {
    int32_t of_class[2]; /* what m1 and m3 are multiplied by: X and what raises the sums */
};

static size_t groups_of(size_t columns) {
    return (columns + GROUP - 1) / GROUP;
}

/* Vectors of one plane in a block. */
static size_t bytes_of(struct columns columns) {
    return (groups_of(columns.plain) + groups_of(columns.salient) + 1) / 2;
}

static uint64_t load_bytes(const uint8_t *from, size_t bytes) {
    uint64_t value = 0;
    memcpy(&value, from, bytes);
    return value;
}

/* Up to 64 columns of a block: where they are in a plane, and which of them are salient. */
struct stretch {
    size_t first, bytes;
    uint64_t columns, salient;
};

static struct stretch stretch_at(const struct billm_weight *w, size_t first, size_t end) {
    const size_t count = billm_min(64, end - first);
    struct stretch at = {first, (count + 7) / 8, ~(uint64_t)0 >> (64 - count), 0};
    at.salient = load_bytes(w->salient + first / 8, at.bytes) & at.columns;
    return at;
}

static struct columns columns_of(const struct billm_weight *w, size_t block) {
    const size_t first = block * w->block, end = billm_min(first + w->block, w->cols);
    size_t salient = 0;
    for (size_t col = first; col < end; col += 64)
        salient += (size_t)__builtin_popcountll(stretch_at(w, col, end).salient);
    return (struct columns){(uint16_t)(end - first - salient), (uint16_t)salient};
}

static size_t header_bytes(const struct billm_weight *w) {
    return billm_round_up(sizeof(struct arranged) + w->blocks * sizeof(struct columns), 64);
}

static uint8_t *order_of(const struct billm_weight *w, void *arranged) {
    return (uint8_t *)arranged + header_bytes(w);
}

static uint8_t *tiles_of(const struct billm_weight *w, void *arranged) {
    return order_of(w, arranged) + billm_round_up(w->blocks * w->block, 64);
}

size_t billm_lookup_step(size_t cols) {
    (void)cols;
    return TILE;
}

static size_t tiles_in(const struct billm_weight *w) {
    return (w->rows + TILE - 1) / TILE;
}

static size_t tile_bytes_of(const struct billm_weight *w) {
    size_t bytes = 0;
    for (size_t b = 0; b < w->blocks; b++)
        bytes += (4 + 2 * bytes_of(columns_of(w, b))) * TILE;
    return bytes;
}

size_t billm_lookup_bytes(const struct billm_weight *w) {
    return header_bytes(w) + billm_round_up(w->blocks * w->block, 64) + tiles_in(w) * tile_bytes_of(w);
}

void billm_lookup_begin(const struct billm_weight *w, void *memory) {
    struct arranged *arranged = memory;
    uint8_t *order = order_of(w, memory);
    arranged->tile_bytes = tile_bytes_of(w);
    for (size_t b = 0; b < w->blocks; b++, order += w->block) {
        const size_t first = b * w->block, end = billm_min(first + w->block, w->cols);
        const struct columns columns = arranged->columns[b] = columns_of(w, b);
        size_t place[2] = {0, columns.plain};
        for (size_t col = first; col < end; col++)
            order[place[w->salient[col / 8] >> col % 8 & 1]++] = (uint8_t)(col - first);
    }
}

/* ---- arranging a tile ---- */

/* How to move the bits of a mask to the low end of a word, in six steps of powers of 2 (Hacker's Delight, 7-4). */
struct compression {
    uint64_t mask, moved[6];
    size_t count;
};

static struct compression compress_by(uint64_t mask) {
    struct compression how = {.mask = mask, .count = (size_t)__builtin_popcountll(mask)};
    uint64_t zeros = ~mask << 1;
    for (int i = 0; i < 6; i++) {
        uint64_t parity = zeros ^ zeros << 1;
        for (int shift = 2; shift < 64; shift *= 2)
            parity ^= parity << shift;
        const uint64_t moved = parity & mask;
        mask = (mask ^ moved) | moved >> (1 << i);
        zeros &= ~parity;
        how.moved[i] = moved;
    }
    return how;
}

/* Four rows at once. */
BILLM_INLINE __m256i compressed(__m256i bits, const struct compression *how) {
    bits = _mm256_and_si256(bits, _mm256_set1_epi64x((long long)how->mask));
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
        const __m256i moved = _mm256_and_si256(bits, _mm256_set1_epi64x((long long)how->moved[i]));
        bits = _mm256_or_si256(_mm256_xor_si256(bits, moved), _mm256_srli_epi64(moved, 1 << i));
    }
    return bits;
}

/* A plane's bits of a tile, classes apart: word by word, rows in the order of `slot_of`. */
struct tile_bits {
    _Alignas(32) uint64_t words[(MAX_BYTES + 7) / 8 + 1][TILE];
};

/* Write the bits of four rows at bit `at`, where there are zeros. */
BILLM_INLINE void put_bits(struct tile_bits *to, size_t at, size_t slot, __m256i bits) {
    __m256i *word = (__m256i *)(void *)&to->words[at / 64][slot], *next = word + TILE / 4;
    const __m128i shift = _mm_cvtsi64_si128((long long)(at % 64)), rest = _mm_cvtsi64_si128((long long)(64 - at % 64));
    _mm256_store_si256(word, _mm256_or_si256(_mm256_load_si256(word), _mm256_sll_epi64(bits, shift)));
    _mm256_store_si256(next, _mm256_or_si256(_mm256_load_si256(next), _mm256_srl_epi64(bits, rest)));
}

/* Where row r of a tile stands in a vector: so that words of even and odd bytes, their low and high quarters unpacked, come
 * to eight rows after the other. */
static size_t place_of(size_t row) {
    const size_t vector = row / 8, lane = row % 8;
    return 2 * (lane / 4 * 8 + vector % 2 * 4 + lane % 4) + vector / 2;
}

/* Where a tile row's magnitudes stand: those of even bytes, then those of odd ones. */
static size_t magnitude_place(size_t place) {
    return place % 2 * (TILE / 2) + place / 2;
}

/* Where a place's bits stand before `transpose_bytes`. */
static size_t slot_of(size_t place) {
    const size_t half = place / 16, i = place % 16;
    return 4 * (i % 4 + i / 8 * 4) + 2 * half + i % 8 / 4;
}

/* Eight bytes of 32 rows, [slot], to as many vectors, of which `count` are wanted. */
static void transpose_bytes(const uint64_t *rows, uint8_t *to, size_t count) {
    const __m256i *from = (const void *)rows;
    __m256i a[8], b[8];
    for (size_t i = 0; i < 4; i++) {
        a[i] = _mm256_unpacklo_epi8(_mm256_load_si256(from + i), _mm256_load_si256(from + i + 4));
        a[i + 4] = _mm256_unpackhi_epi8(_mm256_load_si256(from + i), _mm256_load_si256(from + i + 4));
    }
    for (size_t i = 0; i < 4; i++) {
        b[i] = _mm256_unpacklo_epi8(a[i], a[i + 4]);
        b[i + 4] = _mm256_unpackhi_epi8(a[i], a[i + 4]);
    }
    for (size_t half = 0; half < 8; half += 4)
        for (size_t i = half; i < half + 2; i++) {
            a[i] = _mm256_unpacklo_epi8(b[i], b[i + 2]);
            a[i + 2] = _mm256_unpackhi_epi8(b[i], b[i + 2]);
        }
    for (size_t i = 0; i < 4; i++) {
        b[2 * i] = _mm256_unpacklo_epi8(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi8(a[2 * i], a[2 * i + 1]);
    }
    for (size_t i = 0; i < count; i++)
        _mm256_store_si256((__m256i *)(void *)to + i, b[i]);
}

BILLM_INLINE __m256i load_rows(const uint8_t *plane, const size_t row[4], size_t stride, size_t bytes) {
    uint64_t word[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++)
        word[i] = bytes == 8 ? billm_load64(plane + row[i] * stride) : load_bytes(plane + row[i] * stride, bytes);
    return _mm256_setr_epi64x((long long)word[0], (long long)word[1], (long long)word[2], (long long)word[3]);
}

static void arrange_block(const struct billm_weight *w, const size_t row_in[TILE], size_t block, struct columns columns,
                          uint8_t *to) {
    const size_t first = block * w->block, end = billm_min(first + w->block, w->cols), bytes = bytes_of(columns);
    struct tile_bits bits[2];
    size_t at[2] = {0, groups_of(columns.plain) * GROUP};
    memset(bits, 0, sizeof bits);
    for (size_t col = first; col < end; col += 64) {
        const struct stretch in = stretch_at(w, col, end);
        const struct compression by[2] = {compress_by(in.columns & ~in.salient), compress_by(in.salient)};
        const __m256i plain = _mm256_set1_epi64x((long long)~in.salient);
        for (size_t slot = 0; slot < TILE; slot += 4) {
            const __m256i s = load_rows(w->sign + col / 8, row_in + slot, w->stride, in.bytes);
            const __m256i t = load_rows(w->second + col / 8, row_in + slot, w->stride, in.bytes);
            const __m256i q = _mm256_xor_si256(t, _mm256_andnot_si256(s, plain));
#pragma GCC unroll 2
            for (size_t class = 0; class < 2; class++) {
                put_bits(&bits[0], at[class], slot, compressed(s, &by[class]));
                put_bits(&bits[1], at[class], slot, compressed(q, &by[class]));
            }
        }
        at[0] += by[0].count;
        at[1] += by[1].count;
    }
    for (size_t place = 0; place < TILE; place++) {
        const uint8_t *scales = w->scales + 4 * (row_in[slot_of(place)] * w->blocks + block);
        const int outer = scales[2], residual = scales[3];
        uint8_t *magnitudes = to + magnitude_place(place);
        magnitudes[0] = scales[0];
        magnitudes[TILE] = scales[1];
        magnitudes[2 * TILE] = (uint8_t)(outer > residual ? outer - residual : 0);
        magnitudes[3 * TILE] = (uint8_t)(outer + residual < 255 ? outer + residual : 255);
    }
    to += 4 * TILE;
    for (size_t plane = 0; plane < 2; plane++, to += bytes * TILE)
        for (size_t byte = 0; byte < bytes; byte += 8)
            transpose_bytes(bits[plane].words[byte / 8], to + byte * TILE, billm_min(8, bytes - byte));
}

void billm_lookup_arrange(const struct billm_weight *w, size_t tile, void *memory) {
    const struct arranged *arranged = memory;
    uint8_t *to = tiles_of(w, memory) + tile * arranged->tile_bytes;
    size_t row_in[TILE]; /* of each slot; behind the last row it stands again */
    for (size_t r = 0; r < TILE; r++)
        row_in[slot_of(place_of(r))] = billm_min(tile * TILE + r, w->rows - 1);
    for (size_t b = 0; b < w->blocks; b++) {
        const struct columns columns = arranged->columns[b];
        arrange_block(w, row_in, b, columns, to);
        to += (4 + 2 * bytes_of(columns)) * TILE;
    }
}

/* ---- preparing a token ---- */

size_t billm_lookup_prepared_bytes(const struct billm_weight *w) {
    const size_t groups = w->cols / GROUP + 2 * w->blocks;
    return billm_round_up(w->blocks * sizeof(struct constants), 64) + groups * DIGITS * TABLE;
}

static uint8_t *tables_of(const struct billm_weight *w, const void *prepared) {
    return (uint8_t *)(uintptr_t)prepared + billm_round_up(w->blocks * sizeof(struct constants), 64);
}

BILLM_INLINE __m256i digit_of(__m256i sums, int digit) {
    return _mm256_and_si256(_mm256_srli_epi32(sums, digit * DIGIT_BITS), _mm256_set1_epi32((1 << DIGIT_BITS) - 1));
}

/* The tables of a group: entry e is the sum of the activations x [GROUP] whose bits e has. */
BILLM_INLINE void fill_tables(const int16_t *x, uint8_t *to) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i low = _mm256_set1_epi32(RAISE);
    low = _mm256_add_epi32(low, _mm256_and_si256(_mm256_set1_epi32(x[0]), _mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1)));
    low = _mm256_add_epi32(low, _mm256_and_si256(_mm256_set1_epi32(x[1]), _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1)));
    low = _mm256_add_epi32(low, _mm256_and_si256(_mm256_set1_epi32(x[2]), _mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1)));
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(x[3]));
    const __m256i digit0 = _mm256_packus_epi32(digit_of(low, 0), digit_of(high, 0));
    const __m256i digit1 = _mm256_packus_epi32(digit_of(low, 1), digit_of(high, 1));
    const __m256i digit2 = _mm256_packus_epi32(digit_of(low, 2), digit_of(high, 2));
    const __m256i two = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(digit0, digit1), order);
    const __m256i one = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(digit2, digit2), order);
    _mm256_storeu_si256((void *)to, two);
    _mm_store_si128((void *)(to + 2 * TABLE), _mm256_castsi256_si128(one));
}

/* The tables of a class and its constant; `x` is padded with zeros to a whole group. */
BILLM_INLINE uint8_t *prepare_class(const int16_t *x, size_t columns, int32_t *constant, uint8_t *tables) {
    const size_t groups = groups_of(columns);
    int32_t sum = 0;
    for (size_t j = 0; j < columns; j++)
        sum += x[j];
    *constant = sum + 2 * (int32_t)groups * RAISE;
    for (size_t i = 0; i < groups; i++, tables += DIGITS * TABLE)
        fill_tables(x + GROUP * i, tables);
    return tables;
}

void billm_lookup_prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    const struct arranged *arranged = w->arranged->memory;
    const uint8_t *order = order_of(w, w->arranged->memory);
    struct constants *constants = prepared;
    uint8_t *tables = tables_of(w, prepared);
    for (size_t b = 0; b < w->blocks; b++, x += w->block, order += w->block) {
        const size_t plain = arranged->columns[b].plain, salient = arranged->columns[b].salient;
        int16_t values[2][BILLM_MAX_BLOCK + GROUP];
        for (size_t j = 0; j < plain; j++)
            values[0][j] = x[order[j]];
        for (size_t j = 0; j < salient; j++)
            values[1][j] = x[order[plain + j]];
        memset(values[0] + plain, 0, GROUP * sizeof *x);
        memset(values[1] + salient, 0, GROUP * sizeof *x);
        tables = prepare_class(values[0], plain, &constants[b].of_class[0], tables);
        tables = prepare_class(values[1], salient, &constants[b].of_class[1], tables);
    }
}

/* ---- the product ---- */

/* Digits' sums over a class of a block, of 32 rows: words of both bytes, of which the low one counts, and of odd bytes. */
struct digit_sums {
    __m256i both[DIGITS], odd[DIGITS];
};

BILLM_INLINE __m256i looked_up(__m256i codes, const uint8_t *tables, size_t digit) {
    const __m128i table = _mm_load_si128((const void *)(tables + digit * TABLE));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

BILLM_INLINE void first_group(__m256i digits[DIGITS], __m256i codes, const uint8_t *tables) {
#pragma GCC unroll 3
    for (size_t k = 0; k < DIGITS; k++)
        digits[k] = looked_up(codes, tables, k);
}

BILLM_INLINE void next_group(__m256i digits[DIGITS], __m256i codes, const uint8_t *tables) {
#pragma GCC unroll 3
    for (size_t k = 0; k < DIGITS; k++)
        digits[k] = _mm256_add_epi8(digits[k], looked_up(codes, tables, k));
}

/* Take in bytes that are the sums of at most four digits. */
BILLM_INLINE void take_in(struct digit_sums *sums, const __m256i digits[DIGITS]) {
#pragma GCC unroll 3
    for (size_t k = 0; k < DIGITS; k++) {
        sums->both[k] = _mm256_add_epi16(sums->both[k], digits[k]);
        sums->odd[k] = _mm256_add_epi16(sums->odd[k], _mm256_srli_epi16(digits[k], 8));
    }
}

BILLM_INLINE __m256i low_codes(const uint8_t *bytes) {
    return _mm256_and_si256(_mm256_load_si256((const void *)bytes), _mm256_set1_epi8(15));
}

BILLM_INLINE __m256i high_codes(const uint8_t *bytes) {
    return _mm256_and_si256(_mm256_srli_epi16(_mm256_load_si256((const void *)bytes), 4), _mm256_set1_epi8(15));
}

/* Add what `count` groups have, from the low half of a byte on. */
BILLM_INLINE void add_groups(struct digit_sums *sums, const uint8_t *bytes, const uint8_t *tables, size_t count) {
    enum { ONE = DIGITS * TABLE };
    __m256i digits[DIGITS];
    for (; count >= 4; count -= 4, bytes += 2 * TILE, tables += 4 * ONE) {
        _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T0);
        first_group(digits, low_codes(bytes), tables);
        next_group(digits, high_codes(bytes), tables + ONE);
        next_group(digits, low_codes(bytes + TILE), tables + 2 * ONE);
        next_group(digits, high_codes(bytes + TILE), tables + 3 * ONE);
        take_in(sums, digits);
    }
    if (!count)
        return;
    first_group(digits, low_codes(bytes), tables);
    if (count > 1)
        next_group(digits, high_codes(bytes), tables + ONE);
    if (count > 2)
        next_group(digits, low_codes(bytes + TILE), tables + 2 * ONE);
    take_in(sums, digits);
}

/* The sums of both classes over a block's bits of one kind. */
BILLM_INLINE void add_plane(struct digit_sums sums[2], const uint8_t *bytes, const uint8_t *tables, size_t plain,
                            size_t salient) {
    struct digit_sums zero;
#pragma GCC unroll 3
    for (size_t k = 0; k < DIGITS; k++)
        zero.both[k] = zero.odd[k] = _mm256_setzero_si256();
    sums[0] = sums[1] = zero;
    add_groups(&sums[0], bytes, tables, plain);
    bytes += plain / 2 * TILE;
    tables += plain * DIGITS * TABLE;
    if (plain % 2 && salient) { /* the byte in which the classes meet */
        __m256i digits[DIGITS];
        first_group(digits, high_codes(bytes), tables);
        take_in(&sums[1], digits);
        bytes += TILE;
        tables += DIGITS * TABLE;
        salient--;
    }
    add_groups(&sums[1], bytes, tables, salient);
}

BILLM_INLINE __m256i words_of(const struct digit_sums *sums, size_t digit, int odd) {
    return odd ? sums->odd[digit] : _mm256_sub_epi16(sums->both[digit], _mm256_slli_epi16(sums->odd[digit], 8));
}

/* Half of two vectors' words as pairs. */
BILLM_INLINE __m256i pairs_of(__m256i a, __m256i b, int high) {
    return high ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
}

BILLM_INLINE __m256i magnitude_words(const uint8_t *magnitudes, size_t which, int odd) {
    return _mm256_cvtepu8_epi16(_mm_load_si128((const void *)(magnitudes + which * TILE + (size_t)odd * TILE / 2)));
}

/* What a block's sums s, q of both classes come to: eight rows in each of four vectors. */
BILLM_INLINE void weigh(const struct digit_sums s[2], const struct digit_sums q[2], const uint8_t *magnitudes,
                        const struct constants *constants, __m256i out[4]) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        const __m256i m0 = magnitude_words(magnitudes, 0, odd), m1 = magnitude_words(magnitudes, 1, odd);
        const __m256i m2 = magnitude_words(magnitudes, 2, odd), m3 = magnitude_words(magnitudes, 3, odd);
#pragma GCC unroll 2
        for (int high = 0; high < 2; high++) {
            const __m256i plain = pairs_of(_mm256_add_epi16(m0, m1), _mm256_sub_epi16(m1, m0), high);
            const __m256i salient = pairs_of(_mm256_add_epi16(m2, m3), _mm256_sub_epi16(m3, m2), high);
            const __m256i ones = _mm256_set1_epi16(1); /* a pair's sum is twice the larger magnitude */
            const __m256i larger[2] = {_mm256_srli_epi32(_mm256_madd_epi16(plain, ones), 1),
                                       _mm256_srli_epi32(_mm256_madd_epi16(salient, ones), 1)};
            __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 3
            for (size_t digit = DIGITS; digit-- > 0;) {
                const __m256i a = pairs_of(words_of(&s[0], digit, odd), words_of(&q[0], digit, odd), high);
                const __m256i b = pairs_of(words_of(&s[1], digit, odd), words_of(&q[1], digit, odd), high);
                sum = _mm256_add_epi32(_mm256_slli_epi32(sum, DIGIT_BITS), _mm256_madd_epi16(a, plain));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(b, salient));
            }
#pragma GCC unroll 2
            for (size_t class = 0; class < 2; class++)
                sum = _mm256_sub_epi32(
                    sum, _mm256_mullo_epi32(larger[class], _mm256_set1_epi32(constants->of_class[class])));
            out[2 * odd + high] = sum;
        }
    }
}

void billm_lookup_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                       size_t end, float *acc) {
    const struct arranged *arranged = w->arranged->memory;
    const struct constants *constants = prepared;
    const uint8_t *at = tiles_of(w, w->arranged->memory) + row / TILE * arranged->tile_bytes;
    (void)bits;
    for (; row < end; row += TILE, acc += TILE) {
        const uint8_t *tables = tables_of(w, prepared);
        __m256 total[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (size_t b = 0; b < w->blocks; b++) {
            const size_t plain = groups_of(arranged->columns[b].plain), salient = groups_of(arranged->columns[b].salient);
            const size_t plane = (plain + salient + 1) / 2 * TILE;
            struct digit_sums s[2], q[2];
            __m256i sums[4];
            add_plane(s, at + 4 * TILE, tables, plain, salient);
            add_plane(q, at + 4 * TILE + plane, tables, plain, salient);
            weigh(s, q, at, constants + b, sums);
#pragma GCC unroll 4
            for (size_t i = 0; i < 4; i++)
                total[i] = billm_step(total[i], x_scale[b], sums[i]);
            at += 4 * TILE + 2 * plane;
            tables += (plain + salient) * DIGITS * TABLE;
        }
        float result[TILE];
        for (size_t i = 0; i < 4; i++)
            _mm256_storeu_ps(result + 8 * i, total[i]);
        memcpy(acc, result, billm_min(TILE, end - row) * sizeof *acc);
    }
}
