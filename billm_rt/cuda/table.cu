// Embeddings, heads and projections: matrices of signed bytes with a scale per row, of binary16 or of float32.
#include "common.cuh"

struct Half {
    u16 bits;
};
__device__ __forceinline__ float as_float(i8 value) { return float(value); }
__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(Half value) { return half_to_float(value.bits); }

// out[token] = weight[ids[token]] * scale [tokens, width]; scale may be null.
template <class Weight>
__global__ void gather(const int* ids, const Weight* weight, const u16* scale, float* out, int width) {
    int column = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (column >= width) return;
    size_t row = ids[token];
    float value = as_float(weight[row * width + column]) * (scale ? half_to_float(scale[row]) : 1.0f);
    out[size_t(token) * width + column] = value;
}

template <class Weight, int COUNT> struct alignas(COUNT * sizeof(Weight)) Several {
    Weight values[COUNT];
};

// out[token, row] = scale[row] * (weight x)[token, row], x [tokens, width], up to TOKENS of them; weight [rows, width].
// A warp takes ROWS rows at a time, so that an activation is loaded once for all of them; COUNT weights in one load,
// width being a multiple of it. Bound by the memory: some 3 instructions a weight and token, where an H100 has 6.
template <class Weight, int COUNT, int TOKENS>
__global__ void __launch_bounds__(256) multiply(
    const Weight* weight, const u16* scale, const float* x, float* out, int rows, int width, int tokens
) {
    constexpr int ROWS = TOKENS == 1 ? 4 : 2;
    using Vector = Several<Weight, COUNT>;
    int lane = threadIdx.x % WARP;
    int first = (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * ROWS;
    if (first >= rows) return;
    float sum[ROWS][TOKENS] = {};
    for (int column = lane * COUNT; column < width; column += WARP * COUNT) {
        Vector w[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) { // past the last row: the last again, not stored
            w[row] = *reinterpret_cast<const Vector*>(weight + size_t(min(first + row, rows - 1)) * width + column);
        }
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            const float* at = x + size_t(min(token, tokens - 1)) * width + column;
            constexpr int FEW = COUNT < 4 ? COUNT : 4;
#pragma unroll
            for (int start = 0; start < COUNT; start += FEW) {
                Several<float, FEW> few = *reinterpret_cast<const Several<float, FEW>*>(at + start);
#pragma unroll
                for (int i = 0; i < FEW; ++i) {
#pragma unroll
                    for (int row = 0; row < ROWS; ++row) {
                        sum[row][token] += as_float(w[row].values[start + i]) * few.values[i];
                    }
                }
            }
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            float total = warp_sum(sum[row][token]);
            if (lane == 0 && first + row < rows && token < tokens) {
                out[size_t(token) * rows + first + row] = total * (scale ? half_to_float(scale[first + row]) : 1.0f);
            }
        }
    }
}
