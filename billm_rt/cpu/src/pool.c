/* The threads: started at the first use, woken by a ticket, asleep when there has been nothing to do for a while.
 *
 * A ticket is (epoch << 32 | next task); every stage of a run has an epoch of its own. Whoever moves the ticket forward by
 * one owns that task, so nobody is ever waited for who holds no task: a worker that wakes late finds the ticket closed and
 * goes back to waiting. Whoever ends the last task of a stage opens the next one. The fields of a run change only while
 * the ticket is closed, so a worker that read others cannot move it.
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
static pthread_cond_t work_came = PTHREAD_COND_INITIALIZER;

/* A cache line for what every task changes, one for what every thread changes once a stage, one for what one does. */
static _Alignas(64) _Atomic uint64_t ticket = NO_TASK;
static _Alignas(64) _Atomic size_t tasks_done;
static _Alignas(64) _Atomic size_t task_count;
static _Atomic size_t stage;
static const struct billm_stages *_Atomic stages;
static void *_Atomic context;
static atomic_int running, sleepers, stopping;

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

static void wake(void) {
    if (atomic_load(&sleepers) == 0)
        return;
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&work_came);
    pthread_mutex_unlock(&sleep_lock);
}

/* Open the next stage that has tasks, or end the run: for the only thread that is at work on it. */
static void open_next(uint32_t epoch) {
    const struct billm_stages *run = atomic_load(&stages);
    size_t next = atomic_load(&stage), count = 0;
    atomic_store(&ticket, (uint64_t)epoch << 32 | NO_TASK);
    while (!count && ++next < run->count)
        count = run->open(atomic_load(&context), next);
    if (count) {
        atomic_store(&stage, next);
        atomic_store(&task_count, count);
        atomic_store(&tasks_done, 0);
        atomic_store(&ticket, (uint64_t)(epoch + 1) << 32);
    } else {
        atomic_store(&running, 0);
    }
    wake();
}

/* Take tasks of the current stage until none is left, then report them: until then the stage cannot end. Returns the
 * stage's epoch. */
static uint32_t work(size_t thread) {
    uint64_t seen = atomic_load(&ticket);
    size_t done = 0, count;
    for (;;) {
        count = atomic_load(&task_count);
        const struct billm_stages *run = atomic_load(&stages);
        void *with = atomic_load(&context);
        const size_t at = atomic_load(&stage), index = (size_t)(seen & NO_TASK);
        if (index >= count)
            break;
        if (!atomic_compare_exchange_weak(&ticket, &seen, seen + 1))
            continue;
        if (!done && run->enter)
            run->enter(with, at, thread);
        run->task(with, at, index, thread);
        done++;
        seen = atomic_load(&ticket);
    }
    const uint32_t epoch = (uint32_t)(seen >> 32);
    if (done && atomic_fetch_add(&tasks_done, done) + done == count)
        open_next(epoch);
    return epoch;
}

/* Whether there is something to do: a stage other than that of `epoch`, or for the caller the end of its run. */
static int came(uint32_t epoch, int caller) {
    return (uint32_t)(atomic_load(&ticket) >> 32) != epoch || (caller ? !atomic_load(&running) : atomic_load(&stopping));
}

/* Spin for a while (between two stages of a decoder little else happens), then sleep. */
static void wait_for_work(uint32_t epoch, int caller) {
    for (int64_t end = now() + SPIN_NANOSECONDS; now() < end;)
        for (int i = 0; i < 64; i++) {
            if (came(epoch, caller))
                return;
            relax();
        }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleepers, 1);
    while (!came(epoch, caller))
        pthread_cond_wait(&work_came, &sleep_lock);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
}

struct start {
    size_t thread;
    uint32_t epoch;
};

static struct start starts[MAX_THREADS];

static void *worker(void *from) {
    const struct start *start = from;
    for (uint32_t epoch = start->epoch;;) {
        wait_for_work(epoch, 0);
        if (atomic_load(&stopping))
            return NULL;
        epoch = work(start->thread);
    }
}

static void stop_workers(void) {
    atomic_store(&stopping, 1);
    wake();
    while (workers > 0)
        pthread_join(worker_ids[--workers], NULL);
    atomic_store(&stopping, 0);
}

/* Only the forking thread lives on in a child. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&turn, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&work_came, NULL);
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
        starts[workers] = (struct start){(size_t)workers + 1, epoch};
        if (pthread_create(&worker_ids[workers], &attributes, worker, &starts[workers]))
            break;
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
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

static void run_alone(const struct billm_stages *run, void *with) {
    for (size_t at = 0; at < run->count; at++) {
        const size_t count = run->open(with, at);
        if (count && run->enter)
            run->enter(with, at, 0);
        for (size_t i = 0; i < count; i++)
            run->task(with, at, i, 0);
    }
}

void billm_pool_run_stages(const struct billm_stages *run, void *with) {
    if (atomic_load(&wanted_threads) == 1) {
        run_alone(run, with);
        return;
    }
    if (workers < atomic_load(&wanted_threads) - 1)
        start_workers();
    uint32_t epoch = (uint32_t)(atomic_load(&ticket) >> 32);
    atomic_store(&stages, run);
    atomic_store(&context, with);
    atomic_store(&stage, (size_t)-1);
    atomic_store(&running, 1);
    open_next(epoch);
    while (atomic_load(&running)) {
        epoch = work(0);
        wait_for_work(epoch, 1);
    }
}

struct single {
    void (*task)(void *context, size_t index);
    void *context;
    size_t count;
};

static size_t open_single(void *with, size_t at) {
    (void)at;
    return ((const struct single *)with)->count;
}

static void run_single(void *with, size_t at, size_t index, size_t thread) {
    const struct single *single = with;
    (void)at, (void)thread;
    single->task(single->context, index);
}

void billm_pool_run(void (*run)(void *, size_t), void *with, size_t count) {
    static const struct billm_stages one = {1, open_single, NULL, run_single};
    struct single single = {run, with, count};
    if (count > 1 && count < NO_TASK)
        billm_pool_run_stages(&one, &single);
    else
        for (size_t i = 0; i < count; i++)
            run(with, i);
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
