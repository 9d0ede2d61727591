// Drawing a token, as far as every logit is needed: penalties, the weight of each run of logits, and the few logits that
// may be drawn. The host finishes on those. A group is a run of `size` logits of which a warp takes care.
#include "common.cuh"

// What the host asks for, as `ASK` in logits.py lays it out; the ids of recent tokens lie behind it.
struct Ask {
    float inverse, temperature; // weights are exp((logit - best) * inverse)
    float share, offset;        // wanted are logits from best + max(offset, temperature * log(share * all weights)) on,
    int top_k;                  // or, if not 0, at least so many of the largest
    float penalty;
    int recent; // how many
    int padding;
};

struct Found {
    u32 count; // of the logits from `bound` on
    float best, bound;
    u32 padding;
};

struct Entry {
    int id;
    float logit;
};

// penalised = logits, recent tokens made less likely; maxima [groups], infinity where a logit is not a number.
__global__ void __launch_bounds__(256) survey(
    const float* logits, const Ask* ask, float* penalised, float* maxima, int vocab, int size
) {
    int lane = threadIdx.x % WARP, group = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int begin = group * size, end = min(begin + size, vocab);
    if (begin >= vocab) return;
    const int* recent = reinterpret_cast<const int*>(ask + 1);
    for (int id = begin + lane; id < end; id += WARP) penalised[id] = logits[id];
    __syncwarp();
    for (int i = lane; i < ask->recent; i += WARP) {
        int id = recent[i]; // one that comes twice is set twice to the same value
        if (id < begin || id >= end) continue;
        float logit = logits[id];
        penalised[id] = logit > 0 ? logit / ask->penalty : logit * ask->penalty;
    }
    __syncwarp();
    float largest = -infinity();
    for (int id = begin + lane; id < end; id += WARP) {
        float logit = penalised[id];
        largest = fmaxf(largest, logit == logit ? logit : infinity());
    }
    largest = warp_max(largest);
    if (lane == 0) maxima[group] = largest;
}

// sums [groups] of the weights.
__global__ void __launch_bounds__(256) weigh(
    const float* penalised, const Ask* ask, const float* maxima, float* sums, int vocab, int size, int groups
) {
    int lane = threadIdx.x % WARP, group = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (group >= groups) return;
    float best = -infinity(), sum = 0;
    for (int i = lane; i < groups; i += WARP) best = fmaxf(best, maxima[i]);
    best = warp_max(best);
    int end = min((group + 1) * size, vocab);
    for (int id = group * size + lane; id < end; id += WARP) sum += expf((penalised[id] - best) * ask->inverse);
    sum = warp_sum(sum);
    if (lane == 0) sums[group] = sum;
}

// The bound from which on logits are wanted. One thread block, a thread a group.
__global__ void __launch_bounds__(1024) choose(
    const Ask* ask, const float* maxima, const float* sums, Found* found, int groups
) {
    DYNAMIC_SHARED(memory);
    float* all = reinterpret_cast<float*>(memory); // [groups]
    float* scratch = all + groups;                 // a float per warp, and one
    int group = threadIdx.x;
    float mine = group < groups ? maxima[group] : -infinity();
    if (group < groups) all[group] = mine;
    float total = block_sum(group < groups ? sums[group] : 0.0f, scratch);
    float best = -infinity();
    for (int i = group % WARP; i < groups; i += WARP) best = fmaxf(best, all[i]);
    best = warp_max(best);
    float* chosen = scratch + blockDim.x / WARP;
    if (group == 0) {
        float lowest = ask->share > 0 ? ask->temperature * logf(ask->share * total) : -infinity();
        *chosen = ask->top_k > 0 ? -infinity() : best + fmaxf(ask->offset, lowest);
    }
    __syncthreads();
    if (ask->top_k > 0 && ask->top_k <= groups && group < groups) {
        // So many groups have a logit that is not below the maximum of this rank.
        int rank = 0;
        for (int i = 0; i < groups; ++i) rank += all[i] > mine || (all[i] == mine && i < group);
        if (rank == ask->top_k - 1) *chosen = mine;
    }
    __syncthreads();
    // A little lower than that: rounding must not lose one. The host knows the exact bound.
    if (group == 0) *found = Found{0, best, *chosen - 1e-6f * fabsf(best), 0};
}

// entries: up to `capacity` logits from the bound on, in no order; count says how many there are.
__global__ void __launch_bounds__(256) collect(
    const float* penalised, Found* found, Entry* entries, int vocab, int capacity
) {
    int id = blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= vocab || !(penalised[id] >= found->bound)) return;
    u32 place = atomicAdd(&found->count, 1u);
    if (place < u32(capacity)) entries[place] = Entry{id, penalised[id]};
}
