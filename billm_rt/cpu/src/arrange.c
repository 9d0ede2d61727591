/* Weights in the order in which decoding reads them, where that is not the file's: when they are put into it, and what they
 * take there. */
#include "decoder.h"

struct arranging {
    const struct billm_isa *isa;
    const struct billm_weight *weight;
    void *memory;
    size_t rows_per_step, steps_per_task;
};

static void arrange_task(void *context, size_t index) {
    const struct arranging *job = context;
    const size_t steps = (job->weight->rows + job->rows_per_step - 1) / job->rows_per_step;
    size_t step = index * job->steps_per_task, end = billm_min(step + job->steps_per_task, steps);
    for (; step < end; step++)
        job->isa->arrange(job->weight, step, job->memory);
}

static int copies_allowed = 1; /* guarded by the pool's turn */

void billm_allow_copies(int allowed) {
    billm_pool_lock();
    copies_allowed = allowed;
    billm_pool_unlock();
}

/* Whether the copy is there and lies as this instruction set reads it. */
static int in_order_of(const struct billm_isa *isa, const struct billm_arranged *copy) {
    return copy->memory && copy->isa->arrange == isa->arrange;
}

int billm_arrange_in_turn(const struct billm_weight *w) {
    struct arranging job = {.isa = billm_isa_in_turn(), .weight = w};
    if (!w->sign || !job.isa->arrange || in_order_of(job.isa, w->arranged))
        return 0;
    if (!copies_allowed)
        return -1;
    billm_give_memory_back(w->arranged);
    if (billm_take_memory(w->arranged, job.isa->arranged_bytes(w)))
        return -1;
    job.memory = w->arranged->memory;
    job.isa->arrange_begin(w, job.memory);
    const size_t rows_per_task = billm_rows_per_task(&w->rows, 1, w->cols);
    job.rows_per_step = job.isa->row_step(w->cols);
    job.steps_per_task = rows_per_task / job.rows_per_step;
    billm_pool_run(arrange_task, &job, (w->rows + rows_per_task - 1) / rows_per_task);
    w->arranged->isa = job.isa;
    return 0;
}

/* ---- all weights of a decoder ---- */

int billm_each_weight(const struct billm_decoder *d, size_t first, size_t count,
                      int (*each)(void *context, const struct billm_weight *weight, size_t group), void *context) {
    for (size_t i = 0; i < count; i++) {
        const struct billm_layer *layer = &d->layers[first + i];
        const struct billm_group *groups[] = {&layer->qkv, &layer->o, &layer->up, &layer->down};
        for (size_t g = 0; g < 4; g++)
            for (size_t j = 0; j < groups[g]->count; j++)
                for (size_t n = 0; n < groups[g]->inputs[j].count; n++)
                    if (each(context, groups[g]->inputs[j].products[n].weight, 4 * i + g))
                        return -1;
    }
    return 0;
}

static int add_copied(void *context, const struct billm_weight *weight, size_t group) {
    (void)group;
    *(size_t *)context += weight->arranged->bytes;
    return 0;
}

size_t billm_copied_bytes(const struct billm_decoder *decoder) {
    size_t bytes = 0;
    billm_pool_lock();
    billm_each_weight(decoder, 0, decoder->layer_count, add_copied, &bytes);
    billm_pool_unlock();
    return bytes;
}
