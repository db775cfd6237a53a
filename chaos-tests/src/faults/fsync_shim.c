/* Preloaded into a process: counts, slows and fails its fsync and fdatasync, as the mapped control page says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct control {
    _Atomic uint64_t delay_us;
    _Atomic uint64_t fail_errno;
    _Atomic uint64_t calls;
};

static struct control *control;

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("CHAOS_FSYNC_CONTROL");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED)
        control = page;
}

static int sync_as_told(const char *name, int file) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (control) {
        atomic_fetch_add(&control->calls, 1);
        uint64_t delay = atomic_load(&control->delay_us);
        if (delay) {
            struct timespec pause = {(time_t)(delay / 1000000), (long)(delay % 1000000) * 1000};
            nanosleep(&pause, NULL);
        }
        uint64_t error = atomic_load(&control->fail_errno);
        if (error) {
            errno = (int)error;
            return -1;
        }
    }
    return real ? real(file) : 0;
}

int fsync(int file) { return sync_as_told("fsync", file); }
int fdatasync(int file) { return sync_as_told("fdatasync", file); }
