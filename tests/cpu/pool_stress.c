/* Several threads run tasks on the pool, one changes the number of threads, and naps let the workers fall asleep.
 * Every task must run exactly once before its run returns, and in a run of several stages before the next stage opens;
 * a thread must have entered a stage before it takes a task of it. Usage: pool_stress RUNS */
#include "kernels.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { CALLERS = 3, MOST_TASKS = 300, MOST_STAGES = 12, MOST_THREADS = 8 };

static long runs;

static void count_task(void *context, size_t index) {
    ((unsigned char *)context)[index]++; /* not atomic: two threads on one task are a race, or a wrong count */
}

/* A run of several stages. Nothing in it is atomic, as above. */
struct chain {
    size_t stages, opened, tasks[MOST_STAGES];
    size_t entered[MOST_THREADS]; /* the last stage that a thread entered, plus 1 */
    unsigned value[MOST_TASKS];
};

static void fail(const char *what, size_t stage) {
    fprintf(stderr, "stage %zu: %s\n", stage, what);
    exit(1);
}

static size_t open_stage(void *context, size_t stage) {
    struct chain *chain = context;
    if (stage != chain->opened++)
        fail("opened out of order", stage);
    for (size_t i = 0; stage && i < MOST_TASKS; i++) /* every task of it has counted itself */
        if (chain->value[i] != (unsigned)(i < chain->tasks[stage - 1]))
            fail("the stage before it was not done", stage);
    memset(chain->value, 0, sizeof chain->value);
    return chain->tasks[stage];
}

static void enter_stage(void *context, size_t stage, size_t thread) {
    struct chain *chain = context;
    if (thread >= MOST_THREADS || chain->entered[thread] > stage)
        fail("entered twice", stage);
    chain->entered[thread] = stage + 1;
}

static void stage_task(void *context, size_t stage, size_t index, size_t thread) {
    struct chain *chain = context;
    if (chain->entered[thread] != stage + 1)
        fail("not entered", stage);
    chain->value[index]++;
}

static void run_chain(unsigned *state) {
    struct chain chain = {.stages = 1 + (*state >> 20) % MOST_STAGES};
    const struct billm_stages stages = {chain.stages, open_stage, enter_stage, stage_task};
    for (size_t i = 0; i < chain.stages; i++) {
        *state = *state * 1664525u + 1013904223u;
        chain.tasks[i] = (*state >> 16) % 4 ? (*state >> 18) % 20 : (*state >> 18) % MOST_TASKS; /* none at all, too */
    }
    billm_pool_lock();
    billm_pool_run_stages(&stages, &chain);
    billm_pool_unlock();
    if (chain.opened != chain.stages)
        fail("never opened", chain.opened);
    for (size_t i = 0; i < MOST_TASKS; i++)
        if (chain.value[i] != (unsigned)(i < chain.tasks[chain.stages - 1]))
            fail("the last stage was not done", chain.stages - 1);
}

static void *caller(void *number) {
    unsigned state = 1 + (unsigned)(uintptr_t)number;
    for (long i = 0; i < runs; i++) {
        unsigned char done[MOST_TASKS] = {0};
        state = state * 1664525u + 1013904223u;
        size_t tasks = (state >> 16) % MOST_TASKS;
        billm_pool_lock();
        billm_pool_run(count_task, done, tasks);
        billm_pool_unlock();
        for (size_t t = 0; t < MOST_TASKS; t++)
            if (done[t] != (t < tasks)) {
                fprintf(stderr, "task %zu of %zu ran %d times\n", t, tasks, done[t]);
                exit(1);
            }
        run_chain(&state);
        if (state % 64 == 0)
            nanosleep(&(struct timespec){0, 300000}, NULL);
        if (state % 32 == 1)
            billm_pool_set_threads(1 + (int)(state >> 8) % 5);
    }
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[CALLERS];
    runs = argc > 1 ? atol(argv[1]) : 100;
    billm_pool_set_threads(4);
    for (size_t i = 0; i < CALLERS; i++)
        if (pthread_create(&threads[i], NULL, caller, (void *)i))
            return 2;
    for (size_t i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    billm_pool_set_threads(1);
    printf("%ld runs of each caller agree\n", runs);
    return 0;
}
