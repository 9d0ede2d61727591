/* Random products, each instruction set against the portable one, bit for bit; every operand ends where an unmapped
 * page begins, and every output starts poisoned. Usage: driver SEED ROUNDS INSTRUCTION_SET...
 * Stands alone, so that it runs under an emulator (NEON), over emulated intrinsics (AVX-512) and with sanitizers. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t state;

static uint32_t draw(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)(state * 0x2545f4914f6cdd1dull >> 32);
}

static size_t below(size_t n) {
    return draw() % n;
}

struct guarded {
    void *data, *map;
    size_t map_size;
};

/* `size` bytes, the last of them just before a page that must not be touched. */
static struct guarded guarded_alloc(size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), used = billm_round_up(size, page);
    struct guarded block = {NULL, NULL, used + page};
    block.map = mmap(NULL, block.map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block.map == MAP_FAILED || mprotect((char *)block.map + used, page, PROT_NONE)) {
        perror("mmap");
        exit(2);
    }
    block.data = (char *)block.map + used - size;
    return block;
}

enum { SIGN, SECOND, SALIENT, SCALES, VALUES, NIBBLES, STEPS, X, X_SCALE, ROW_SCALE, BIAS, OUT, EXPECTED, BLOCKS };

struct problem {
    struct guarded memory[BLOCKS];
    struct billm_weight binary, int8, int4;
    struct billm_arranged arranged[2]; /* of the binary weight and of its part */
    struct billm_tokens x;
    struct billm_epilogue epilogue;
    size_t out_stride, out_floats;
};

static const size_t edges[] = {1,   8,   31,  32,  33,  40,  63,  64,  65,  96,  127,
                               128, 129, 255, 256, 257, 320, 512, 513, 576, 896, 1055};
static const size_t token_counts[] = {1, 1, 1, 2, 3, 4, 5, 8, 9, 33};

static void fill_bytes(struct guarded *block, size_t size, int extreme, uint8_t value) {
    *block = guarded_alloc(size);
    for (size_t i = 0; i < size; i++)
        ((uint8_t *)block->data)[i] = extreme ? value : (uint8_t)draw();
}

/* Salient columns: half of them, few, nearly all, or, at the ends, none or all. */
static void fill_salient(struct guarded *block, size_t size, int extreme) {
    fill_bytes(block, size, extreme, below(2) ? 0xff : 0);
    const size_t kind = extreme ? 0 : below(3);
    for (size_t i = 0; i < size && kind; i++) {
        const uint8_t few = (uint8_t)(draw() & draw() & draw() & draw());
        ((uint8_t *)block->data)[i] = kind == 1 ? few : (uint8_t)~few;
    }
}

static void fill_floats(struct guarded *block, size_t count) {
    *block = guarded_alloc(4 * count);
    for (size_t i = 0; i < count; i++)
        ((float *)block->data)[i] = ((float)below(20001) - 10000.0f) / 4096.0f;
}

/* Activations: all at one end of the range, or at random, many of them where the low byte is -128 or next to it. */
static void fill_values(struct guarded *block, size_t count, int bits, int extreme) {
    *block = guarded_alloc(count * sizeof(int16_t));
    int32_t top = billm_top(bits), same = below(2) ? top : -top;
    for (size_t i = 0; i < count; i++) {
        int32_t value = (int32_t)below((size_t)(2 * top + 1)) - top;
        if (bits == 16 && below(4) == 0)
            value = 256 * ((int32_t)below(62) - 31) + 126 + (int32_t)below(5);
        ((int16_t *)block->data)[i] = (int16_t)(extreme ? same : value > top ? top : value < -top ? -top : value);
    }
}

static void make(struct problem *p) {
    size_t rows = 1 + below(below(8) ? 20 : 90), cols = edges[below(sizeof edges / sizeof *edges)];
    size_t block = (size_t)32 << below(4), tokens = token_counts[below(sizeof token_counts / sizeof *token_counts)];
    size_t blocks = (cols + block - 1) / block, units = (cols + 31) / 32, stride = 4 * units;
    int bits = below(2) ? 8 : 16;
    int extreme = below(4) == 0; /* everything at the end of its range: sums must not overflow or saturate */
    fill_bytes(&p->memory[SIGN], rows * stride, extreme, 0xff);
    fill_bytes(&p->memory[SECOND], rows * stride, extreme, below(2) ? 0xff : 0);
    fill_salient(&p->memory[SALIENT], stride, extreme);
    fill_bytes(&p->memory[SCALES], 4 * rows * blocks, extreme, 0xff);
    fill_bytes(&p->memory[VALUES], rows * cols, extreme, 0x80);
    fill_bytes(&p->memory[NIBBLES], rows * units * 16, extreme, below(2) ? 0xff : 0);
    fill_bytes(&p->memory[STEPS], rows * units, extreme, below(2) ? 0x80 : 0x7f);
    fill_values(&p->memory[X], tokens * cols, bits, extreme);
    fill_floats(&p->memory[X_SCALE], tokens * blocks);
    fill_floats(&p->memory[ROW_SCALE], rows);
    fill_floats(&p->memory[BIAS], rows);
    p->out_stride = 2 * rows + (rows + 1) / 2 + below(3); /* what lies between two tokens' rows stays as it is */
    p->out_floats = (tokens - 1) * p->out_stride + 2 * rows + (rows + 1) / 2;
    p->memory[OUT] = guarded_alloc(4 * p->out_floats);
    p->memory[EXPECTED] = guarded_alloc(4 * p->out_floats);
    p->binary = (struct billm_weight){rows,
                                      cols,
                                      block,
                                      blocks,
                                      stride,
                                      p->memory[SIGN].data,
                                      p->memory[SECOND].data,
                                      p->memory[SALIENT].data,
                                      p->memory[SCALES].data,
                                      NULL};
    p->binary.arranged = &p->arranged[0];
    memset(p->arranged, 0, sizeof p->arranged);
    p->int8 = (struct billm_weight){.rows = rows, .cols = cols, .block = block, .blocks = blocks, .stride = cols};
    p->int8.values = p->memory[VALUES].data;
    p->int4 = (struct billm_weight){.rows = rows, .cols = cols, .block = 32, .blocks = units, .stride = 16 * units};
    p->int4.nibbles = p->memory[NIBBLES].data;
    p->int4.steps = p->memory[STEPS].data;
    p->x = (struct billm_tokens){p->memory[X].data, p->memory[X_SCALE].data, tokens, bits};
    p->epilogue = (struct billm_epilogue){p->memory[ROW_SCALE].data, 0, below(2) ? p->memory[BIAS].data : NULL};
}

/* The weights of the problem's blocks, and the first rows of the binary one added to what is there, side by side in one
 * output. One of 4 bits has blocks of its own: it joins where they agree. */
static size_t products_of(struct problem *p, struct billm_weight *part, float *out, struct billm_product list[3]) {
    size_t rows = p->binary.rows, stride = p->out_stride;
    *part = p->binary;
    part->rows = (rows + 1) / 2;
    part->arranged = &p->arranged[1];
    list[0] = (struct billm_product){&p->binary, p->epilogue, out, stride, 0};
    list[1] = (struct billm_product){p->binary.block == 32 && rows % 2 ? &p->int4 : &p->int8, p->epilogue, out + rows, stride, 0};
    list[2] = (struct billm_product){part, p->epilogue, out + 2 * rows, stride, 1};
    return 3;
}

static void run(const char *isa, struct problem *p, int into) {
    float *out = p->memory[into].data;
    size_t count = p->out_floats;
    memset(out, 0xff, 4 * count); /* NaN */
    for (size_t t = 0; t < p->x.count; t++)
        for (size_t r = 0; r < (p->binary.rows + 1) / 2; r++)
            out[t * p->out_stride + 2 * p->binary.rows + r] = (float)(r + t);
    struct billm_weight part;
    struct billm_product list[3];
    size_t products = products_of(p, &part, out, list);
    if (billm_select(isa) || billm_products(list, products, &p->x)) {
        fprintf(stderr, "%s does not run here\n", isa);
        exit(2);
    }
}

static int differs(const char *isa, struct problem *p) {
    run("portable", p, EXPECTED);
    run(isa, p, OUT);
    const float *out = p->memory[OUT].data, *expected = p->memory[EXPECTED].data;
    for (size_t i = 0; i < p->out_floats; i++) {
        size_t column = i % p->out_stride, written = 2 * p->binary.rows + (p->binary.rows + 1) / 2;
        if (column < written ? !(out[i] == expected[i]) : out[i] == out[i]) {
            fprintf(stderr, "%s: rows %zu, cols %zu, block %zu, tokens %zu, bits %d: out[%zu, %zu] = %.9g, not %.9g\n",
                    isa, p->binary.rows, p->binary.cols, p->binary.block, p->x.count, p->x.bits, i / p->out_stride,
                    column, (double)out[i], (double)expected[i]);
            return 1;
        }
    }
    return 0;
}

static int quantize_differs(const char *isa, const struct problem *p) {
    size_t cols = p->binary.cols, block = p->binary.block, blocks = p->binary.blocks, tokens = p->x.count;
    struct guarded x, col_scale, values[2], scales[2];
    int scaled = (int)below(2);
    fill_floats(&x, tokens * cols);
    fill_floats(&col_scale, cols);
    for (int i = 0; i < 2; i++) {
        values[i] = guarded_alloc(2 * tokens * cols);
        scales[i] = guarded_alloc(4 * tokens * blocks);
        memset(values[i].data, 0x80, 2 * tokens * cols);
        billm_select(i ? isa : "portable");
        billm_quantize(x.data, scaled ? col_scale.data : NULL, tokens, cols, block, p->x.bits, values[i].data,
                       scales[i].data);
    }
    int bad = memcmp(values[0].data, values[1].data, 2 * tokens * cols) ||
              memcmp(scales[0].data, scales[1].data, 4 * tokens * blocks);
    if (bad)
        fprintf(stderr, "%s, quantize: cols %zu, block %zu, tokens %zu differ\n", isa, cols, block, tokens);
    struct guarded *all[] = {&x, &col_scale, &values[0], &values[1], &scales[0], &scales[1]};
    for (size_t i = 0; i < 6; i++)
        munmap(all[i]->map, all[i]->map_size);
    return bad;
}

int main(int argc, char **argv) {
    if (argc < 4)
        return 2;
    state = strtoull(argv[1], NULL, 10) * 2 + 1;
    long rounds = atol(argv[2]);
    int bad = 0;
    for (long round = 0; round < rounds && !bad; round++) {
        struct problem p;
        make(&p);
        billm_pool_set_threads(1 + (int)below(3));
        for (int i = 3; i < argc && !bad; i++)
            bad = differs(argv[i], &p) || quantize_differs(argv[i], &p);
        billm_give_memory_back(&p.arranged[0]);
        billm_give_memory_back(&p.arranged[1]);
        for (int i = 0; i < BLOCKS; i++)
            munmap(p.memory[i].map, p.memory[i].map_size);
    }
    billm_pool_set_threads(1);
    if (!bad)
        printf("%ld rounds agree\n", rounds);
    return bad;
}
