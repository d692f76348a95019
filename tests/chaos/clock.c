/* Preloaded into a process: its wall clock is ahead by what the mapped file $LOCKSTEP_CLOCK says, in nanoseconds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static const long long nothing = 0;
static const volatile long long *ahead = &nothing;
static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_sem_timedwait)(sem_t *, const struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("LOCKSTEP_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(long long), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) ahead = page;
}

static void shift(struct timespec *time, long long by) {
    long long nanoseconds = time->tv_nsec + by % 1000000000LL;
    time->tv_sec += by / 1000000000LL;
    if (nanoseconds < 0) { nanoseconds += 1000000000LL; time->tv_sec--; }
    if (nanoseconds >= 1000000000LL) { nanoseconds -= 1000000000LL; time->tv_sec++; }
    time->tv_nsec = nanoseconds;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real_clock_gettime) real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real_clock_gettime(id, now);
    if (!status && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) shift(now, *ahead);
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    int status = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return status;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}

/* Its deadline is on the wall clock, which the kernel does not see shifted. */
int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline) {
    struct timespec real = *deadline;
    if (!real_sem_timedwait) real_sem_timedwait = dlsym(RTLD_NEXT, "sem_timedwait");
    shift(&real, -*ahead);
    return real_sem_timedwait(semaphore, &real);
}
