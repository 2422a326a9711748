#include "plan.h"
#include <sched.h>
#include <unistd.h>

namespace transept {

static inline void pause_once() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr int SPINS = 20000; // about half a millisecond: longer than the pause between two steps of a generation

Team::Team(int n) : size(n < 1 ? 1 : n), process(getpid()) {
    for (int id = 1; id < size; id++) threads.emplace_back(&Team::loop, this, id);
}

Team::~Team() {
    if (getpid() != process) { // a forked child holds handles of threads that it does not have
        for (std::thread &t : threads) t.detach();
        return;
    }
    {
        std::lock_guard<std::mutex> lock(mutex);
        stop = true;
    }
    wake.notify_all();
    for (std::thread &t : threads) t.join();
}

void Team::loop(int id) {
    uint32_t seen = 0;
    for (;;) {
        int spins = 0;
        while (round.load(std::memory_order_acquire) == seen && !stop && spins++ < SPINS) pause_once();
        if (round.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [&] { return stop || round.load() != seen; });
        }
        if (stop) return;
        seen = round.load(std::memory_order_acquire);
        work(arg, id);
        done.fetch_add(1, std::memory_order_release);
    }
}

bool Team::run(Work w, void *a) {
    if (getpid() != process && size > 1) return false;
    work = w;
    arg = a;
    done = 0;
    {
        std::lock_guard<std::mutex> lock(mutex);
        round.fetch_add(1, std::memory_order_release);
    }
    if (size > 1) wake.notify_all();
    w(a, 0);
    for (int spins = 0; done.load(std::memory_order_acquire) != static_cast<uint32_t>(size - 1); spins++) {
        if (spins < SPINS) pause_once();
        else sched_yield();
    }
    return true;
}

void Team::barrier(Ahead *ahead) {
    if (size == 1) return;
    uint32_t now = turn.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == static_cast<uint32_t>(size - 1)) {
        arrived.store(0, std::memory_order_relaxed);
        turn.fetch_add(1, std::memory_order_release);
        return;
    }
    for (int spins = 0; turn.load(std::memory_order_acquire) == now; spins++) {
        if (ahead && ahead->from < ahead->to) {
            __builtin_prefetch(ahead->from, 0, 2);
            ahead->from += 64;
        } else if (spins < 2000) pause_once();
        else sched_yield(); // fewer cores than threads: let the others come
    }
}
} // namespace transept
