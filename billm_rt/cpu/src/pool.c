/* The threads: started at the first use, woken by a ticket, asleep when there has been nothing to do for a while.
 *
 * A ticket is (epoch << 32 | next task). Whoever moves it forward by one owns that task, so nobody is ever waited for
 * who holds no task: a worker that wakes late finds the ticket closed and goes back to waiting. The fields of a run
 * change only while the ticket is closed, so a worker that read others cannot move it.
 */
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum {
    MAX_THREADS = 256,
    SPIN_NANOSECONDS = 100000,
    STACK_BYTES = 1 << 20 /* an attention task takes a quarter of it; some systems would give a thread less */
};
#define NO_TASK 0xffffffffu

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* who may run tasks and change the workers */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_came = PTHREAD_COND_INITIALIZER, work_done = PTHREAD_COND_INITIALIZER;

/* A cache line for what every task changes, one for what every thread changes once a run, one for what none does. */
static _Alignas(64) _Atomic uint64_t ticket = NO_TASK;
static _Alignas(64) _Atomic size_t tasks_done;
static _Alignas(64) _Atomic size_t task_count;
static void (*_Atomic task)(void *, size_t);
static void *_Atomic context;
static atomic_int sleepers, caller_sleeps, stopping;

static atomic_int wanted_threads = 1;
static int workers; /* running now, besides the caller */
static pthread_t worker_ids[MAX_THREADS];
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* longer than yield, which most cores do not notice */
#endif
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Take tasks of the current run until none is left, then report them: until then the run cannot end. */
static void work(void) {
    uint64_t seen = atomic_load(&ticket);
    size_t done = 0, count;
    for (;;) {
        count = atomic_load(&task_count);
        void (*run)(void *, size_t) = atomic_load(&task);
        void *with = atomic_load(&context);
        size_t index = (size_t)(seen & NO_TASK);
        if (index >= count)
            break;
        if (!atomic_compare_exchange_weak(&ticket, &seen, seen + 1))
            continue;
        run(with, index);
        done++;
        seen = atomic_load(&ticket);
    }
    if (done && atomic_fetch_add(&tasks_done, done) + done == count && atomic_load(&caller_sleeps)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_signal(&work_done);
        pthread_mutex_unlock(&sleep_lock);
    }
}

static int came(uint32_t epoch) {
    return (uint32_t)(atomic_load(&ticket) >> 32) != epoch || atomic_load(&stopping);
}

/* Spin for a while (between two products of a decoder little else happens), then sleep. */
static void wait_for_work(uint32_t epoch) {
    for (int64_t end = now() + SPIN_NANOSECONDS; now() < end;)
        for (int i = 0; i < 64; i++) {
            if (came(epoch))
                return;
            relax();
        }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleepers, 1);
    while (!came(epoch))
        pthread_cond_wait(&work_came, &sleep_lock);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void *worker(void *first_epoch) {
    uint32_t epoch = (uint32_t)(uintptr_t)first_epoch;
    for (;;) {
        wait_for_work(epoch);
        if (atomic_load(&stopping))
            return NULL;
        epoch = (uint32_t)(atomic_load(&ticket) >> 32);
        work();
    }
}

static void wake(pthread_cond_t *condition) {
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(condition);
    pthread_mutex_unlock(&sleep_lock);
}

static void stop_workers(void) {
    atomic_store(&stopping, 1);
    wake(&work_came);
    while (workers > 0)
        pthread_join(worker_ids[--workers], NULL);
    atomic_store(&stopping, 0);
}

/* Only the forking thread lives on in a child. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&turn, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&work_came, NULL);
    pthread_cond_init(&work_done, NULL);
    atomic_store(&sleepers, 0);
    workers = 0;
}

/* Start what is missing. Fewer threads than wanted are no error: the caller takes the tasks that nobody else does. */
static void start_workers(void) {
    sigset_t all, before;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes))
        return;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the program's own threads */
    uint32_t epoch = (uint32_t)(atomic_load(&ticket) >> 32);
    while (workers < atomic_load(&wanted_threads) - 1) {
        if (pthread_create(&worker_ids[workers], &attributes, worker, (void *)(uintptr_t)epoch))
            break;
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void wait_until_done(size_t count) {
    for (int64_t end = now() + SPIN_NANOSECONDS; now() < end;)
        for (int i = 0; i < 64; i++) {
            if (atomic_load(&tasks_done) == count)
                return;
            relax();
        }
    pthread_mutex_lock(&sleep_lock);
    atomic_store(&caller_sleeps, 1);
    while (atomic_load(&tasks_done) != count)
        pthread_cond_wait(&work_done, &sleep_lock);
    atomic_store(&caller_sleeps, 0);
    pthread_mutex_unlock(&sleep_lock);
}

/* A fork waits for its turn, so that a child never inherits a half-done run. */
static void handle_forks(void) {
    pthread_atfork(billm_pool_lock, billm_pool_unlock, after_fork_in_child);
}

void billm_pool_lock(void) {
    pthread_once(&fork_once, handle_forks);
    pthread_mutex_lock(&turn);
}

void billm_pool_unlock(void) {
    pthread_mutex_unlock(&turn);
}

void billm_pool_run(void (*run)(void *, size_t), void *with, size_t count) {
    if (count <= 1 || count >= NO_TASK || atomic_load(&wanted_threads) == 1) {
        for (size_t i = 0; i < count; i++)
            run(with, i);
        return;
    }
    if (workers < atomic_load(&wanted_threads) - 1)
        start_workers();
    atomic_store(&task, run);
    atomic_store(&context, with);
    atomic_store(&task_count, count);
    atomic_store(&tasks_done, 0);
    uint32_t epoch = (uint32_t)(atomic_load(&ticket) >> 32) + 1;
    atomic_store(&ticket, (uint64_t)epoch << 32);
    if (atomic_load(&sleepers) > 0)
        wake(&work_came);
    work();
    wait_until_done(count);
    atomic_store(&ticket, (uint64_t)epoch << 32 | NO_TASK);
}

void billm_pool_set_threads(int threads) {
    billm_pool_lock();
    int count = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    if (count - 1 < workers)
        stop_workers();
    atomic_store(&wanted_threads, count);
    billm_pool_unlock();
}

int billm_pool_threads(void) {
    return atomic_load(&wanted_threads);
}
