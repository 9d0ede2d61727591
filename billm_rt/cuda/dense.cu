// Prompts: many activation rows want the tensor cores at their full speed, which cuBLAS has. A bounded number of rows is
// unpacked into a binary16 scratch, as whole levels -255 to 255 (exact); what is not whole, the scales of rows and
// columns, goes into the activations before and into the float32 products after.
#include "common.cuh"

// levels[row, column] of rows first_row .. first_row + rows, [rows, width]; columns from linear.cols on are 0. A thread
// makes 8 columns, so that a warp writes 512 bytes side by side; width is a multiple of 8.
__global__ void unpack(const Linear* linear_at, u16* levels, int first_row, int rows, int width, int block) {
    const Linear& linear = *linear_at;
    int of_row = width / 8, row_words = (linear.cols + 31) / 32;
    size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= size_t(rows) * of_row) return;
    int row = index / of_row, start = index % of_row * 8, word = start / 32;
    size_t at = size_t(first_row + row) * row_words + word;
    u32 sign = linear.sign[at], second = linear.second[at], salient = linear.salient[word];
    u32 codes = linear.scales[size_t(first_row + row) * ((linear.cols + block - 1) / block) + word * 32 / block];
    float outer = float(codes >> 16 & 255), residual = float(codes >> 24);
    u16 concentrated = float_to_half(float(codes & 255)), sparse = float_to_half(float(codes >> 8 & 255));
    u16 less = float_to_half(fmaxf(outer - residual, 0.0f)), more = float_to_half(fminf(outer + residual, 255.0f));
    u32 pair[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int bit = start % 32 + i;
        u32 positive = sign >> bit & 1, other = second >> bit & 1;
        u32 level = salient >> bit & 1 ? (positive == other ? more : less) : (other ? sparse : concentrated);
        level = start + i < linear.cols ? level | (positive ^ 1) << 15 : 0;
        pair[i / 2] |= level << 16 * (i % 2);
    }
    *reinterpret_cast<uint4*>(levels + size_t(row) * width + start) = uint4{pair[0], pair[1], pair[2], pair[3]};
}

// rounded[token] = x[token] * col_scale as binary16 [tokens, width], by a power of two that undo[token] takes back; a
// thread block a token.
__global__ void round_rows(
    const void* x, const u16* col_scale, u16* rounded, float* undo, int cols, int width, int dtype
) {
    DYNAMIC_SHARED(memory);
    float* scratch = reinterpret_cast<float*>(memory);
    size_t row = size_t(blockIdx.x) * cols;
    auto value = [&](int column) {
        if (column >= cols) return 0.0f;
        return load_as_float(x, row + column, dtype) * (col_scale ? half_to_float(col_scale[column]) : 1.0f);
    };
    float largest = 0;
    for (int column = threadIdx.x; column < cols; column += blockDim.x) largest = fmaxf(largest, fabsf(value(column)));
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (int warp = 0; warp < int(blockDim.x / WARP); ++warp) largest = fmaxf(largest, scratch[warp]);
    Scaling by = scaling(largest);
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        rounded[size_t(blockIdx.x) * width + column] = float_to_half(value(column) * by.scale);
    }
    if (threadIdx.x == 0) undo[blockIdx.x] = by.undo;
}

// out[token, linear.first_row + first_row + row] = product[token, row] * row_scale * undo[token] + bias, product
// [tokens, rows].
__global__ void scale_products(
    const Linear* linear_at, const float* product, const float* undo, void* out, int first_row, int rows,
    int out_stride, int dtype
) {
    const Linear& linear = *linear_at;
    int row = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y, of_linear = first_row + row;
    if (row >= rows) return;
    float value = product[size_t(token) * rows + row] * undo[token] * half_to_float(linear.row_scale[of_linear]);
    if (linear.bias) value += linear.bias[of_linear];
    store_float(out, size_t(token) * out_stride + linear.first_row + of_linear, dtype, value);
}
