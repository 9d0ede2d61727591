/* Memory for weights in another order. They lie together in chunks that are made of large pages where the system has them:
 * the processor then looks an address up once in two megabytes instead of once in four kilobytes. Where memory is the limit
 * two threads decoded 5 to 17 % faster (bench/RESULTS.md). */
#include "kernels.h"

#include <pthread.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
enum { PAGE = 64, CHUNK = 0 }; /* every weight's memory of its own, and nothing behind it */
#else
enum { PAGE = 2 << 20, CHUNK = 16 * PAGE };
#endif

struct billm_chunk {
    uint8_t *memory;
    size_t bytes, used, weights;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct billm_chunk *last; /* where the next weight goes if there is room; guarded by the lock */

static struct billm_chunk *make_chunk(size_t bytes) {
    struct billm_chunk *chunk = malloc(sizeof *chunk);
    if (!chunk)
        return NULL;
    *chunk = (struct billm_chunk){.bytes = billm_round_up(bytes > CHUNK ? bytes : CHUNK, PAGE)};
    chunk->memory = aligned_alloc(PAGE, chunk->bytes);
    if (!chunk->memory) {
        free(chunk);
        return NULL;
    }
#if defined(MADV_HUGEPAGE)
    (void)madvise(chunk->memory, chunk->bytes, MADV_HUGEPAGE); /* a wish: small pages do as well */
#endif
    return chunk;
}

static void free_chunk(struct billm_chunk *chunk) {
    if (chunk == last)
        last = NULL;
    free(chunk->memory);
    free(chunk);
}

int billm_take_memory(struct billm_arranged *copy, size_t bytes) {
    bytes = billm_round_up(bytes, 64);
    pthread_mutex_lock(&lock);
    if (!last || last->bytes - last->used < bytes) {
        struct billm_chunk *chunk = make_chunk(bytes);
        if (!chunk) {
            pthread_mutex_unlock(&lock);
            return -1;
        }
        last = chunk;
    }
    *copy = (struct billm_arranged){.memory = last->memory + last->used, .bytes = bytes, .chunk = last};
    last->used += bytes;
    last->weights++;
    pthread_mutex_unlock(&lock);
    return 0;
}

void billm_give_memory_back(struct billm_arranged *copy) {
    if (copy->chunk) {
        pthread_mutex_lock(&lock);
        if (!--copy->chunk->weights)
            free_chunk(copy->chunk);
        pthread_mutex_unlock(&lock);
    }
    *copy = (struct billm_arranged){0};
}
