/* AVX-512 with VBMI, decoding: products with the planes by looking sums up, sixteen columns at a time.
 *
 * The four bits that a row has in four columns number one of sixteen sums of their activations. A byte permutation looks up
 * in 64 bytes: the sums of four such groups, of which a vector holds one each for 16 rows, and vpdpbusd adds the four. So
 * rows must lie in another order than in the file, which is made once (`arrange`): in tiles of 32 rows, and within a block
 * its plain columns first, then its salient ones. With s and q as x86.h has them and U_s, U_q the sums of the activations
 * where their bits are 1, X the sum of all, a class of a block comes to
 *
 *     (m0 + m1) U_s + (m1 - m0) U_q - m1 X        (salient: m2, m3)
 *
 * A sum of four activations, raised by RAISE so that it is not negative, has 16 bits: two digits, each in a table of bytes.
 * What raising the sums adds is (m0 + m1 + m1 - m0) RAISE = 2 m1 RAISE for four columns, which goes off with m1 X. */
#include "x86.h"

enum { LOW, HIGH, DIGITS };

enum {
    TILE = BILLM_LOOKUP_ROWS,
    VECTORS = TILE / 16, /* of 16 rows, a lane of 32 bits each */
    UNIT = 16,           /* columns whose sums share tables */
    GROUP = 4,           /* columns that number a sum */
    UNIT_BYTES = 64 * VECTORS,
    TABLES = 128,         /* bytes: of low digits, of high ones; entry e of group g is byte 16 g + e */
    RAISE = 1 << 15,      /* four activations are no more than its negative */
    MAX_TOGETHER = 4,
    TOGETHER_COLS = 1024, /* tables of so many take a third of the nearest cache */
    AHEAD = 4096          /* bytes: what is fetched that far behind the unit that is read */
};

/* An arranged weight: this, in whole lines, then the tiles. A tile has for each block the magnitudes m0, m1, m2, m3 of every
 * row [TILE][4], then for each unit four bytes of every row [TILE][4]: the low half of byte g is s in the columns of group g,
 * the high half q. Tiles of one step lie block by block side by side, and share tables while these are in the nearest
 * cache. */
struct arranged {
    size_t tile_bytes;
    uint16_t salient[]; /* columns of each block */
};

/* A prepared token: this for each block, in whole lines; then the tables of the units with plain columns and of those with
 * salient ones, of each block. A unit with both has tables of either, in which the others' activations are zero. */
struct constants {
    int16_t low[2], high[2]; /* digits of what m1 and m3 are multiplied by: less X and what raises the sums */
};

/* Units of a block that have plain columns, and those that have salient ones. */
struct units {
    size_t plain, first_salient, all;
};

static size_t cols_of(const struct billm_weight *w, size_t block) {
    return billm_min(w->block, w->cols - block * w->block);
}

static struct units units_of(const struct billm_weight *w, size_t block, size_t salient) {
    const size_t cols = cols_of(w, block), plain = cols - salient, all = (cols + UNIT - 1) / UNIT;
    return (struct units){(plain + UNIT - 1) / UNIT, salient ? plain / UNIT : all, all};
}

static uint64_t load_bits(const uint8_t *plane, size_t first, size_t count) {
    uint64_t word = 0;
    if (count == 64)
        return billm_load64(plane + first / 8);
    memcpy(&word, plane + first / 8, (count + 7) / 8);
    return word & ~(uint64_t)0 >> (64 - count);
}

static size_t salient_of(const struct billm_weight *w, size_t block) {
    const size_t first = block * w->block, cols = cols_of(w, block);
    size_t salient = 0;
    for (size_t col = 0; col < cols; col += 64)
        salient += (size_t)__builtin_popcountll(load_bits(w->salient, first + col, billm_min(64, cols - col)));
    return salient;
}

/* Where the tiles are. */
static size_t tiles_at(const struct billm_weight *w) {
    return billm_round_up(sizeof(struct arranged) + w->blocks * sizeof(uint16_t), 64);
}

static size_t together_of(size_t cols) {
    return cols <= TOGETHER_COLS ? 1 : cols <= 2 * TOGETHER_COLS ? 2 : MAX_TOGETHER;
}

size_t billm_avx512_lookup_step(size_t cols) {
    return TILE * together_of(cols);
}

/* The tiles of a step: `first`, `count`. */
struct step {
    size_t first, count;
};

static struct step step_of(const struct billm_weight *w, size_t step) {
    const size_t together = together_of(w->cols), all = (w->rows + TILE - 1) / TILE;
    return (struct step){step * together, billm_min(together, all - step * together)};
}

static size_t tile_bytes_of(const struct billm_weight *w) {
    size_t bytes = 0;
    for (size_t b = 0; b < w->blocks; b++)
        bytes += 4 * TILE + units_of(w, b, 0).all * UNIT_BYTES;
    return bytes;
}

size_t billm_avx512_lookup_bytes(const struct billm_weight *w) {
    const size_t tiles = (w->rows + TILE - 1) / TILE;
    return tiles_at(w) + tiles * tile_bytes_of(w);
}

void billm_avx512_lookup_begin(const struct billm_weight *w, void *memory) {
    struct arranged *arranged = memory;
    arranged->tile_bytes = tile_bytes_of(w);
    for (size_t b = 0; b < w->blocks; b++)
        arranged->salient[b] = (uint16_t)salient_of(w, b);
}

/* ---- arranging a tile ---- */

/* A row's bits of a block, plain columns first; behind them two words that take nothing. */
struct row_bits {
    uint64_t words[BILLM_MAX_BLOCK / 64 + 2];
};

static inline void put_bits(struct row_bits *to, size_t at, uint64_t bits) {
    to->words[at / 64] |= bits << at % 64;
    to->words[at / 64 + 1] |= bits >> 1 >> (63 - at % 64);
}

static void arrange_row(const struct billm_weight *w, size_t row, size_t block, size_t salient, uint8_t *to) {
    const size_t first = block * w->block, cols = cols_of(w, block);
    const uint8_t *sign = w->sign + row * w->stride, *second = w->second + row * w->stride;
    const uint8_t *scales = w->scales + 4 * (row * w->blocks + block);
    const int outer = scales[2], residual = scales[3];
    struct row_bits s = {{0}}, q = {{0}};
    size_t plain_at = 0, salient_at = cols - salient;
    for (size_t col = 0; col < cols; col += 64) {
        const size_t count = billm_min(64, cols - col);
        const uint64_t salient_mask = load_bits(w->salient, first + col, count);
        const uint64_t plain_mask = ~salient_mask & ~(uint64_t)0 >> (64 - count);
        const uint64_t s_bits = load_bits(sign, first + col, count), t_bits = load_bits(second, first + col, count);
        const uint64_t q_bits = t_bits ^ (~s_bits & ~salient_mask);
        put_bits(&s, plain_at, _pext_u64(s_bits, plain_mask));
        put_bits(&q, plain_at, _pext_u64(q_bits, plain_mask));
        put_bits(&s, salient_at, _pext_u64(s_bits, salient_mask));
        put_bits(&q, salient_at, _pext_u64(q_bits, salient_mask));
        const size_t many = (size_t)__builtin_popcountll(salient_mask);
        salient_at += many;
        plain_at += count - many;
    }
    const uint8_t magnitudes[4] = {scales[0], scales[1], (uint8_t)(outer > residual ? outer - residual : 0),
                                   (uint8_t)(outer + residual < 255 ? outer + residual : 255)};
    memcpy(to, magnitudes, 4);
    for (size_t unit = 0; unit < (cols + UNIT - 1) / UNIT; unit++) {
        const size_t word = unit / 4, shift = unit % 4 * UNIT;
        const uint32_t codes = (uint32_t)(_pdep_u64(s.words[word] >> shift, 0x0f0f0f0f) |
                                          _pdep_u64(q.words[word] >> shift, 0xf0f0f0f0));
        memcpy(to + 4 * TILE + unit * UNIT_BYTES, &codes, 4);
    }
}

void billm_avx512_lookup_arrange(const struct billm_weight *w, size_t step, void *memory) {
    const struct arranged *arranged = memory;
    const struct step tiles = step_of(w, step);
    uint8_t *to = (uint8_t *)memory + tiles_at(w) + tiles.first * arranged->tile_bytes;
    for (size_t b = 0; b < w->blocks; b++)
        for (size_t tile = tiles.first; tile < tiles.first + tiles.count; tile++) {
            for (size_t r = 0; r < TILE; r++) /* behind the last row it stands again */
                arrange_row(w, billm_min(tile * TILE + r, w->rows - 1), b, arranged->salient[b], to + 4 * r);
            to += 4 * TILE + units_of(w, b, 0).all * UNIT_BYTES;
        }
}

/* ---- preparing a token ---- */

static size_t tables_at(const struct billm_weight *w) {
    return billm_round_up(w->blocks * sizeof(struct constants), 64);
}

size_t billm_avx512_lookup_prepared_bytes(const struct billm_weight *w) {
    return tables_at(w) + w->blocks * (w->block / UNIT + 1) * TABLES; /* one unit of a block may have both classes */
}

/* The tables of sixteen columns. */
BILLM_INLINE void fill_tables(__m256i columns, uint8_t *to) {
    const __m512i x = _mm512_castsi256_si512(columns);
    const __m512i group = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(GROUP), 1); /* of each sum */
    const __mmask32 has[GROUP] = {0xaaaaaaaa, 0xcccccccc, 0xf0f0f0f0, 0xff00ff00};
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    const __m512i lanes = _mm512_set_epi32(0x60606060, 0x60606060, 0x60606060, 0x60606060, 0x40404040, 0x40404040,
                                           0x40404040, 0x40404040, 0x20202020, 0x20202020, 0x20202020, 0x20202020, 0, 0,
                                           0, 0);
    const __m512i low = _mm512_add_epi8(bytes, lanes), high = _mm512_add_epi8(low, _mm512_set1_epi8(1));
    __m512i sums[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int j = 0; j < GROUP; j++) {
            const __m512i column = _mm512_add_epi16(group, _mm512_set1_epi16((short)(2 * GROUP * half + j)));
            sum = _mm512_mask_add_epi16(sum, has[j], sum, _mm512_permutexvar_epi16(column, x));
        }
        sums[half] = _mm512_xor_si512(sum, _mm512_set1_epi16((short)RAISE)); /* added: it is the sign's bit */
    }
    _mm512_store_si512(to, _mm512_permutex2var_epi8(sums[0], low, sums[1]));
    _mm512_store_si512(to + TABLES / 2, _mm512_permutex2var_epi8(sums[0], high, sums[1]));
}

/* The activations of a class of a block, as many columns behind the beginning of a unit as they are in its row. */
struct class_input {
    int16_t values[BILLM_MAX_BLOCK + 3 * UNIT];
    size_t end;  /* of the values, from the beginning of the unit */
    __m512i sum; /* of all, spread over the lanes */
};

BILLM_INLINE void begin_class(struct class_input *to, size_t first) {
    _mm512_storeu_si512(to->values, _mm512_setzero_si512());
    to->end = first % UNIT;
    to->sum = _mm512_setzero_si512();
}

BILLM_INLINE void add_values(struct class_input *to, __m512i x, __mmask32 of_class) {
    x = _mm512_maskz_compress_epi16(of_class, x);
    _mm512_storeu_si512(to->values + to->end, x); /* zeros behind them */
    to->end += (size_t)__builtin_popcount(of_class);
    to->sum = _mm512_dpwssd_epi32(to->sum, x, _mm512_set1_epi16(1));
}

/* Its tables and its constant. */
BILLM_INLINE uint8_t *finish_class(struct class_input *from, size_t first, int32_t *constant, uint8_t *tables) {
    *constant = 0;
    if (from->end == first % UNIT)
        return tables;
    _mm512_storeu_si512(from->values + from->end, _mm512_setzero_si512());
    *constant = _mm512_reduce_add_epi32(from->sum);
    for (size_t at = 0; at < from->end; at += UNIT, tables += TABLES) {
        fill_tables(_mm256_loadu_si256((const void *)(from->values + at)), tables);
        *constant += 2 * (UNIT / GROUP) * RAISE;
    }
    return tables;
}

void billm_avx512_lookup_prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    const struct arranged *arranged = w->arranged->memory;
    struct constants *constants = prepared;
    uint8_t *tables = (uint8_t *)prepared + tables_at(w);
    for (size_t b = 0; b < w->blocks; b++) {
        const size_t first = b * w->block, cols = cols_of(w, b), plain = cols - arranged->salient[b];
        struct class_input inputs[2];
        begin_class(&inputs[0], 0);
        begin_class(&inputs[1], plain);
        for (size_t col = first; col < first + cols; col += BILLM_UNIT) {
            const __mmask32 all = ~(__mmask32)0 >> (BILLM_UNIT - billm_min(BILLM_UNIT, first + cols - col));
            const __mmask32 salient = billm_load32(w->salient + col / 8);
            const __m512i values = _mm512_maskz_loadu_epi16(all, x + col);
            add_values(&inputs[0], values, all & ~salient);
            add_values(&inputs[1], values, all & salient);
        }
        int32_t constant[2]; /* at least 0, and less than 2^23 */
        tables = finish_class(&inputs[0], 0, &constant[0], tables);
        tables = finish_class(&inputs[1], plain, &constant[1], tables);
        for (size_t class = 0; class < 2; class++) {
            constants[b].low[class] = (int16_t)-(constant[class] & 255);
            constants[b].high[class] = (int16_t)-(constant[class] >> 8);
        }
    }
}

/* ---- the product ---- */

/* Sums of digits over a class of a block: of s and of q, a lane for each row. */
struct digit_sums {
    __m512i s[DIGITS][VECTORS], q[DIGITS][VECTORS];
};

BILLM_INLINE void add_unit(struct digit_sums *sums, const uint8_t *codes, const uint8_t *tables) {
    const __m512i half = _mm512_set1_epi8(15), group = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
    __m512i table[DIGITS];
#pragma GCC unroll 2
    for (size_t digit = 0; digit < DIGITS; digit++)
        table[digit] = _mm512_load_si512(tables + digit * TABLES / DIGITS);
#pragma GCC unroll 2
    for (size_t v = 0; v < VECTORS; v++) {
        const __m512i both = _mm512_load_si512(codes + 64 * v);
        const __m512i s = _mm512_ternarylogic_epi32(both, half, group, 0xea); /* (both & half) | group */
        const __m512i q = _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), half, group, 0xea);
#pragma GCC unroll 2
        for (size_t digit = 0; digit < DIGITS; digit++) {
            sums->s[digit][v] = _mm512_dpbusd_epi32(sums->s[digit][v], _mm512_permutexvar_epi8(s, table[digit]), ones);
            sums->q[digit][v] = _mm512_dpbusd_epi32(sums->q[digit][v], _mm512_permutexvar_epi8(q, table[digit]), ones);
        }
    }
}

BILLM_INLINE void fetch(const uint8_t *unit) {
    _mm_prefetch((const char *)unit, _MM_HINT_NTA);
    _mm_prefetch((const char *)unit + 64, _MM_HINT_NTA);
}

BILLM_INLINE void clear(struct digit_sums *sums) {
#pragma GCC unroll 2
    for (size_t digit = 0; digit < DIGITS; digit++)
#pragma GCC unroll 2
        for (size_t v = 0; v < VECTORS; v++)
            sums->s[digit][v] = sums->q[digit][v] = _mm512_setzero_si512();
}

/* Both classes' sums of a digit, which take 15 bits, side by side. */
BILLM_INLINE __m512i pair(__m512i plain, __m512i salient) {
    return _mm512_or_si512(plain, _mm512_slli_epi32(salient, 16));
}

/* What the sums of a block come to. */
BILLM_INLINE __m512i weigh(const struct digit_sums *plain, const struct digit_sums *salient, size_t v,
                           const uint8_t *magnitudes, const struct constants *constants) {
    const __m512i m = _mm512_load_si512(magnitudes + 64 * v);
    const __m512i sum = _mm512_maddubs_epi16(m, _mm512_set1_epi8(1));                /* m0 + m1, m2 + m3 */
    const __m512i difference = _mm512_maddubs_epi16(m, _mm512_set1_epi16(0x01ff)); /* m1 - m0, m3 - m2 */
    const __m512i larger = _mm512_srli_epi16(m, 8);                                  /* m1, m3 */
    const int16_t *const constant[DIGITS] = {constants->low, constants->high};
    __m512i total[DIGITS];
#pragma GCC unroll 2
    for (size_t digit = 0; digit < DIGITS; digit++) {
        const __m512i less = _mm512_set1_epi32((int)billm_load32(constant[digit]));
        total[digit] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), larger, less);
        total[digit] = _mm512_dpwssd_epi32(total[digit], pair(plain->s[digit][v], salient->s[digit][v]), sum);
        total[digit] = _mm512_dpwssd_epi32(total[digit], pair(plain->q[digit][v], salient->q[digit][v]), difference);
    }
    return _mm512_add_epi32(total[LOW], _mm512_slli_epi32(total[HIGH], 8));
}

/* A block of a tile: add what it comes to, times its scale, to the sums of the rows. */
BILLM_INLINE void add_block(float *total, float scale, const uint8_t *at, struct units units, const uint8_t *tables,
                            const struct constants *constants) {
    const uint8_t *codes = at + 4 * TILE;
    struct digit_sums plain, salient;
    clear(&plain);
    for (size_t unit = 0; unit < units.plain; unit++, tables += TABLES) {
        fetch(codes + unit * UNIT_BYTES + AHEAD);
        add_unit(&plain, codes + unit * UNIT_BYTES, tables);
    }
    clear(&salient);
    for (size_t unit = units.first_salient; unit < units.all; unit++, tables += TABLES) {
        fetch(codes + unit * UNIT_BYTES + AHEAD);
        add_unit(&salient, codes + unit * UNIT_BYTES, tables);
    }
#pragma GCC unroll 2
    for (size_t v = 0; v < VECTORS; v++) {
        __m512 sum = _mm512_load_ps(total + 16 * v);
        sum = billm_step512(sum, scale, weigh(&plain, &salient, v, at, constants));
        _mm512_store_ps(total + 16 * v, sum);
    }
}

void billm_avx512_lookup_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale,
                              size_t row, size_t end, float *acc) {
    const struct arranged *arranged = w->arranged->memory;
    const struct constants *constants = prepared;
    const size_t rows = billm_avx512_lookup_step(w->cols);
    (void)bits;
    for (; row < end; row += rows, acc += rows) {
        const struct step tiles = step_of(w, row / rows);
        const uint8_t *at = (const uint8_t *)arranged + tiles_at(w) + tiles.first * arranged->tile_bytes;
        const uint8_t *tables = (const uint8_t *)prepared + tables_at(w);
        _Alignas(64) float total[MAX_TOGETHER * TILE] = {0};
        for (size_t b = 0; b < w->blocks; b++) {
            const struct units units = units_of(w, b, arranged->salient[b]);
            for (size_t tile = 0; tile < tiles.count; tile++, at += 4 * TILE + units.all * UNIT_BYTES)
                add_block(total + tile * TILE, x_scale[b], at, units, tables, constants + b);
            tables += (units.plain + units.all - units.first_salient) * TABLES;
        }
        memcpy(acc, total, billm_min(rows, end - row) * sizeof *acc);
    }
}
