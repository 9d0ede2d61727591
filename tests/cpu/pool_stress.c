/* Several threads run tasks on the pool, one changes the number of threads, and naps let the workers fall asleep.
 * Every task must run exactly once before its run returns. Usage: pool_stress RUNS */
#include "kernels.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { CALLERS = 3, MOST_TASKS = 300 };

static long runs;

static void count_task(void *context, size_t index) {
    ((unsigned char *)context)[index]++; /* not atomic: two threads on one task are a race, or a wrong count */
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
