// y = W x for 1 to 8 activation rows, straight from the planes of the file.
//
// What is computed. With sign = +-1 and flag = +-1 of a weight (+1: sparse group; salient: the residual's sign agrees)
//     level = sign * (middle + flag * spread) = middle * sign + spread * (sign * flag)
// where middle and spread are half the sum and half the difference of the two magnitudes that its column's class has in
// this (row, block). sign * flag is one bit as well: sign XNOR second, in a salient column simply second. So a block
// needs four sums of +-x: over sign and over sign * flag, once for plain and once for salient columns, and its scales
// are applied to sums, never to weights. A sum of +-x is twice the sum over the set bits less the sum over all.
//
// How. The sums over set bits are products on the tensor cores, 16 rows of weights (a) by up to 8 columns of activations
// (b). A bit that is alone in a binary16, at place m, is the (subnormal) number 2^(m - 24): `plane & (0x00010001 << m)`
// makes two weights of a in one instruction, and b holds x * 2^(7 - m). The columns of b are the two classes (x where
// the column is of that class, else 0), times the activation rows, times two halves of a float32 x (x as binary16, and
// what that leaves); where this does not fill all 8, blocks lie side by side, each lane of a row taking another one.
//
// What it costs, in a step of one float32 row at block 128 (two words of two rows and two planes: 128 weights a lane):
// 128 AND, 32 MMA, 8 loads of 16 bytes from shared memory for b, 48 for the scales, and for addresses, loads and the
// loop some 100; in all 315 in the machine code for sm_90, 2.5 a weight. An SM issues 128 lanes a clock, so 132 SMs at
// 1.7 GHz reach 1.15e13 weights a second at the most, at 2.25 bits 3.2 TB/s. At 2.2 TB/s, about three quarters of what
// an H100 copies, two thirds of what it can issue is taken; the tensor cores, at 2 MMA for 256 weights, then do 560
// multiply-adds a clock and SM, of 2,048. Eight float32 rows take four times as many, and are bound by them. In flight
// are 1.25 KiB a warp and step, one step ahead of the arithmetic, from 24 warps an SM.
//
// Each thread block reads all activations (in chunks that fit shared memory) and owns 16-row tiles first_cta, first_cta
// + ctas, ...; its warps share a tile as `slices` along the columns. Every sum has one fixed order.
#include "common.cuh"

constexpr int GEMV_THREADS = 256;
constexpr int TILE_ROWS = 16;
constexpr int B_WORDS = 20; // 16 registers of b for 32 columns, and 4 that keep the lanes in different banks
constexpr float LOW_HALF = 1.0f / 2048;  // of the second binary16 of a float32
constexpr float BIT_VALUE = 1.0f / 131072; // 2^(m - 24) * 2^(7 - m)

template <int SPLIT, int ROWS, int BLOCK> struct GemvShape {
    static constexpr int GROUPS = SPLIT * ROWS; // columns of b but for their class
    // So many of those in one tile of b; bounded so that a lane holds one or two words: more do not fit its registers.
    static constexpr int LEAST = BLOCK == 256 ? 4 : BLOCK == 128 ? 2 : 1, MOST = BLOCK >= 128 ? 4 : BLOCK / 32;
    static constexpr int PAIRS = GROUPS < LEAST ? LEAST : GROUPS < MOST ? GROUPS : MOST;
    static constexpr int TILES = (GROUPS + PAIRS - 1) / PAIRS; // tiles of b
    static constexpr int SIDE = 4 / PAIRS;                     // blocks side by side
    static constexpr int WORDS = SIDE * BLOCK / 128;           // of a row and a plane, per lane and step
    static constexpr int STEP = 4 * WORDS;                     // words of a row in a step
    static constexpr int RESIDENT = TILES == 1 ? 3 : TILES == 2 ? 2 : 1; // thread blocks an SM: 80, 128, 255 registers
    static_assert(WORDS == 1 || WORDS == 2, "load_planes reads one or two");
    static_assert(TILES <= 4, "more sums than registers: launch several times");
};

// Shared memory, in 32-bit words. `GemvShape.shared_bytes` in launch.py adds up the same.
template <class Shape> struct GemvShared {
    Linear* linear;  // here, not in registers
    u32* b;          // [GROUPS, 2 classes, class_words]
    u32* zero;       // 16: b of lanes whose block is not that of the column
    u32* salient;    // [chunk_words]
    float4* blocks;  // [blocks of the chunk, GROUPS]: sums of plain and of salient x, what undoes the scaling of b
    float* partial;  // [slices, tiles of this thread block, TILE_ROWS, ROWS]
    int class_words; // 16 modulo 32: the classes then lie in different banks

    __device__ GemvShared(unsigned char* base, int chunk_words, int chunk_blocks) {
        class_words = (chunk_words * B_WORDS + 15) / 32 * 32 + 16;
        linear = reinterpret_cast<Linear*>(base);
        b = reinterpret_cast<u32*>(linear + 1);
        zero = b + Shape::GROUPS * 2 * class_words;
        salient = zero + 16;
        blocks = reinterpret_cast<float4*>(salient + (chunk_words + 3) / 4 * 4);
        partial = reinterpret_cast<float*>(blocks + chunk_blocks * Shape::GROUPS);
    }
};

// Split one block of one activation row into binary16 columns of b; a warp, each lane a column of every word.
template <int SPLIT, int BLOCK, class Shape>
__device__ void prepare_block(
    GemvShared<Shape>& shared, const Linear& linear, const void* x, int dtype, size_t row_start, bool present,
    int first_word, int block, int row
) {
    constexpr int COLUMNS = BLOCK / WARP;
    int lane = threadIdx.x % WARP;
    float value[COLUMNS];
    float largest = 0;
    for (int i = 0; i < COLUMNS; ++i) {
        int column = first_word * WARP + block * BLOCK + i * WARP + lane;
        value[i] = 0;
        if (present && column < linear.cols) {
            value[i] = load_as_float(x, row_start + column, dtype);
            if (linear.col_scale) value[i] *= half_to_float(linear.col_scale[column]);
        }
        largest = fmaxf(largest, fabsf(value[i]));
    }
    largest = warp_max(largest);
    Scaling by = scaling(largest);
    u16* b = reinterpret_cast<u16*>(shared.b);
    float sums[SPLIT][2] = {};
    for (int i = 0; i < COLUMNS; ++i) {
        int word = block * COLUMNS + i;
        bool salient = shared.salient[word] >> lane & 1;
        float left = value[i] * by.scale;
        float place = float(1 << (7 - lane % 8));
        // The binary16 of column `lane` of a word: register 2 (lane % 8) + (lane / 8) % 2, upper half from column 16 on.
        int at = 2 * (word * B_WORDS + 2 * (lane % 8) + lane / 8 % 2) + lane / 16;
        for (int half = 0; half < SPLIT; ++half) {
            float part = half_to_float(float_to_half(left));
            left = (left - part) / LOW_HALF;
            u16 bits = float_to_half(part * place);
            for (int kind = 0; kind < 2; ++kind) {
                int column = (row * SPLIT + half) * 2 + kind;
                b[size_t(2) * column * shared.class_words + at] = salient == bool(kind) ? bits : 0;
                sums[half][kind] += salient == bool(kind) ? part : 0;
            }
        }
    }
    for (int half = 0; half < SPLIT; ++half) {
        float plain = warp_sum(sums[half][0]) * BIT_VALUE, salient = warp_sum(sums[half][1]) * BIT_VALUE;
        if (lane == 0) {
            shared.blocks[block * Shape::GROUPS + row * SPLIT + half] = float4{plain, salient, by.undo / BIT_VALUE, 0};
        }
    }
}

// What a lane reads for one step: its words of both planes in rows g and g + 8, and the scales of its block there.
template <int WORDS> struct Planes {
    u32 sign[2][WORDS], second[2][WORDS], scales[2];
};

// No lane asks whether its words are still inside the row: past the end it reads the last ones again, and b is 0.
template <class Shape>
__device__ __forceinline__ void load_planes(
    Planes<Shape::WORDS>& planes, const Linear& linear, int tile, int word, int block, int row_words, int num_blocks
) {
    constexpr int WORDS = Shape::WORDS;
    int g = threadIdx.x % WARP / 4;
    // 32 bits reach: the planes are bounded when they are loaded. Rows past the end are read again, and not stored.
    u32 row[2] = {u32(min(tile * TILE_ROWS + g, linear.rows - 1)), u32(min(tile * TILE_ROWS + g + 8, linear.rows - 1))};
    if (WORDS == 2 && row_words % 2 == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 at = row[half] * row_words + min(word, row_words - 2);
            uint2 sign = load_once(reinterpret_cast<const uint2*>(linear.sign + at));
            uint2 second = load_once(reinterpret_cast<const uint2*>(linear.second + at));
            planes.sign[half][0] = sign.x, planes.sign[half][WORDS - 1] = sign.y;
            planes.second[half][0] = second.x, planes.second[half][WORDS - 1] = second.y;
        }
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                u32 at = row[half] * row_words + min(word + i, row_words - 1);
                planes.sign[half][i] = load_once(linear.sign + at);
                planes.second[half][i] = load_once(linear.second + at);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        planes.scales[half] = load_once(linear.scales + row[half] * num_blocks + min(block, num_blocks - 1));
    }
}

// Add one step to the sums y [tile of b][row g or g + 8] of this lane's column pair.
template <class Shape>
__device__ __forceinline__ void multiply_step(
    float (&y)[Shape::TILES][2], const Planes<Shape::WORDS>& planes, const u32* const (&b)[Shape::TILES], int b_stride,
    const u32* salient, const float4* blocks
) {
    float s[Shape::TILES][4] = {}, p[Shape::TILES][4] = {};
#pragma unroll
    for (int i = 0; i < Shape::WORDS; ++i) {
        u32 s0 = planes.sign[0][i], s1 = planes.sign[1][i];
        u32 p0 = planes.second[0][i] ^ ~(s0 | salient[i]), p1 = planes.second[1][i] ^ ~(s1 | salient[i]);
        u32 s2 = s0 >> 8, s3 = s1 >> 8, p2 = p0 >> 8, p3 = p1 >> 8;
#pragma unroll
        for (int m = 0; m < 8; m += 2) {
#pragma unroll
            for (int tile = 0; tile < Shape::TILES; ++tile) {
                uint4 x = *reinterpret_cast<const uint4*>(b[tile] + i * b_stride + 2 * m);
                u32 k = 0x00010001u << m;
                mma_16x8x16(s[tile], s0 & k, s1 & k, s2 & k, s3 & k, x.x, x.y);
                mma_16x8x16(p[tile], p0 & k, p1 & k, p2 & k, p3 & k, x.x, x.y);
                k = 0x00020002u << m;
                mma_16x8x16(s[tile], s0 & k, s1 & k, s2 & k, s3 & k, x.z, x.w);
                mma_16x8x16(p[tile], p0 & k, p1 & k, p2 & k, p3 & k, x.z, x.w);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 codes = planes.scales[half];
        float concentrated = float(codes & 255), sparse = float(codes >> 8 & 255);
        float outer = float(codes >> 16 & 255), residual = float(codes >> 24);
        float less = fmaxf(outer - residual, 0.0f), more = fminf(outer + residual, 255.0f);
#pragma unroll
        for (int tile = 0; tile < Shape::TILES; ++tile) {
            float4 block = blocks[tile * Shape::PAIRS];
            float sum = (sparse + concentrated) * s[tile][2 * half] + (sparse - concentrated) * p[tile][2 * half];
            sum += (more + less) * s[tile][2 * half + 1] + (more - less) * p[tile][2 * half + 1];
            y[tile][half] += block.z * (sum - sparse * block.x - more * block.y);
        }
    }
}

// Add up what lanes hold of the same row, and put it where the other slices put theirs: [TILE_ROWS, ROWS].
template <int SPLIT, int ROWS, class Shape>
__device__ __forceinline__ void flush(float (&y)[Shape::TILES][2], float* partial) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    constexpr bool IN_LANES = SPLIT == 2 && Shape::PAIRS >= 2; // the halves of a float32 are neighbouring lanes
    constexpr int EACH = SPLIT == 2 && !IN_LANES ? 2 : 1;      // else they are neighbouring tiles
#pragma unroll
    for (int tile = 0; tile < Shape::TILES; tile += EACH) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = y[tile][half];
            if constexpr (EACH == 2) sum += y[tile + EACH - 1][half] * LOW_HALF;
#pragma unroll
            for (int lane = Shape::PAIRS; lane < 4; lane *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lane);
            if constexpr (IN_LANES) {
                sum *= t % 2 ? LOW_HALF : 1.0f;
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            }
            int group = tile * Shape::PAIRS + t;
            bool used = t < Shape::PAIRS && group < Shape::GROUPS;
            if (used && group % SPLIT == 0) partial[(g + 8 * half) * ROWS + group / SPLIT] += sum;
            y[tile][half] = 0;
            if constexpr (EACH == 2) y[tile + EACH - 1][half] = 0;
        }
    }
}

// A chunk of columns of the tiles of this thread block, and how its warps share them.
template <int BLOCK, class Shape> struct Chunk {
    const Linear& linear;
    int first_word, steps, slices, tiles, cta;

    __device__ __forceinline__ void load(Planes<Shape::WORDS>& planes, int tile, int step) const {
        int t = threadIdx.x % 4, row_words = (linear.cols + 31) / 32, num_blocks = (linear.cols + BLOCK - 1) / BLOCK;
        int word = first_word + step * Shape::STEP + t * Shape::WORDS;
        int block = first_word * WARP / BLOCK + step * Shape::SIDE + t / Shape::PAIRS;
        load_planes<Shape>(planes, linear, cta + tile * linear.ctas, word, block, row_words, num_blocks);
    }
};

// Multiply it by the x that shared memory holds; `next`: the planes of the first step of this warp.
template <int SPLIT, int ROWS, int BLOCK, class Shape>
__device__ __forceinline__ void multiply_chunk(
    GemvShared<Shape>& shared, const Chunk<BLOCK, Shape>& chunk, Planes<Shape::WORDS> next
) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int slice = warp % chunk.slices, groups = blockDim.x / WARP / chunk.slices;
    if (slice >= chunk.steps) return;
    int side = t / Shape::PAIRS;
    // Column g of b belongs to the block that this lane reads, or is 0 for it.
    bool mine = g / 2 / Shape::PAIRS == side && g / 2 % Shape::PAIRS < Shape::GROUPS;
    const u32* b[Shape::TILES];
#pragma unroll
    for (int i = 0; i < Shape::TILES; ++i) {
        int column = (i * Shape::PAIRS + g / 2 % Shape::PAIRS) * 2 + g % 2;
        b[i] = mine ? shared.b + size_t(column) * shared.class_words : shared.zero;
    }
    int b_stride = mine ? B_WORDS : 0;
    int group = min(t % Shape::PAIRS, Shape::GROUPS - 1); // a pair of columns that is not used stays 0
    float y[Shape::TILES][2] = {};
    int tile = warp / chunk.slices, step = slice;
    while (tile < chunk.tiles) {
        Planes<Shape::WORDS> planes = next;
        int next_step = step + chunk.slices, next_tile = tile;
        if (next_step >= chunk.steps) next_step = slice, next_tile += groups;
        if (next_tile < chunk.tiles) chunk.load(next, next_tile, next_step); // on its way while this one is computed
        int word = step * Shape::STEP + t * Shape::WORDS;
        const u32* at[Shape::TILES];
#pragma unroll
        for (int i = 0; i < Shape::TILES; ++i) at[i] = b[i] + word * b_stride;
        const float4* blocks = shared.blocks + (step * Shape::SIDE + side) * Shape::GROUPS + group;
        multiply_step<Shape>(y, planes, at, b_stride, shared.salient + word, blocks);
        if (next_tile != tile) {
            flush<SPLIT, ROWS, Shape>(y, shared.partial + (slice * chunk.tiles + tile) * TILE_ROWS * ROWS);
        }
        tile = next_tile, step = next_step;
    }
}

// out[token, first_row + row] = W x + bias for up to ROWS tokens and all Linears of a group, which read the same x
// [tokens, cols]. SPLIT 2 keeps what one binary16 would lose of a float32. `chunk_words` is a multiple of a step.
template <int SPLIT, int ROWS, int BLOCK>
__global__ void __launch_bounds__(GEMV_THREADS, GemvShape<SPLIT, ROWS, BLOCK>::RESIDENT) gemv(
    const Linear* linears, const void* x, void* out, int tokens, int out_stride, int dtype, int chunk_words, int slices
) {
    using Shape = GemvShape<SPLIT, ROWS, BLOCK>;
    DYNAMIC_SHARED(memory);
    while (int(blockIdx.x) >= linears->first_cta + linears->ctas) ++linears;
    GemvShared<Shape> shared(memory, chunk_words, chunk_words * WARP / BLOCK);
    if (threadIdx.x == 0) *shared.linear = *linears;
    __syncthreads();
    const Linear& linear = *shared.linear;
    int cta = blockIdx.x - linear.first_cta, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int all_tiles = (linear.rows + TILE_ROWS - 1) / TILE_ROWS;
    int tiles = (all_tiles - cta + linear.ctas - 1) / linear.ctas;
    int row_words = (linear.cols + 31) / 32;
    int partials = tiles * TILE_ROWS * ROWS;
    for (int i = threadIdx.x; i < slices * partials; i += blockDim.x) shared.partial[i] = 0;
    if (threadIdx.x < 16) shared.zero[threadIdx.x] = 0;
    for (int first = 0; first < row_words; first += chunk_words) {
        int steps = (min(chunk_words, row_words - first) + Shape::STEP - 1) / Shape::STEP;
        Chunk<BLOCK, Shape> chunk{linear, first, steps, slices, tiles, cta};
        Planes<Shape::WORDS> planes;
        chunk.load(planes, warp / slices, warp % slices); // on its way while x is prepared
        __syncthreads(); // the chunk before has been read
        for (int i = threadIdx.x; i < steps * Shape::STEP; i += blockDim.x) {
            shared.salient[i] = first + i < row_words ? linear.salient[first + i] : 0;
        }
        __syncthreads();
        for (int i = warp; i < steps * Shape::SIDE * ROWS; i += warps) {
            int row = i % ROWS;
            prepare_block<SPLIT, BLOCK>(
                shared, linear, x, dtype, size_t(row) * linear.cols, row < tokens, first, i / ROWS, row
            );
        }
        __syncthreads();
        multiply_chunk<SPLIT, ROWS>(shared, chunk, planes);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < partials; i += blockDim.x) {
        int token = i % ROWS, row = (cta + i / (TILE_ROWS * ROWS) * linear.ctas) * TILE_ROWS + i / ROWS % TILE_ROWS;
        if (token >= tokens || row >= linear.rows) continue;
        float sum = 0;
        for (int slice = 0; slice < slices; ++slice) sum += shared.partial[slice * partials + i];
        sum = sum * half_to_float(linear.row_scale[row]) + (linear.bias ? linear.bias[row] : 0.0f);
        store_float(out, size_t(token) * out_stride + linear.first_row + row, dtype, sum);
    }
}
