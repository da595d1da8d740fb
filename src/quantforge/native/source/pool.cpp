#include "pool.h"

#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

struct Loop {
    std::atomic<int64_t> next{0};
    int64_t count, grain;
    void (*work)(int64_t, int64_t, void *);
    void *context;

    void run() {
        for (;;) {
            const int64_t begin = next.fetch_add(grain);
            if (begin >= count) return;
            work(begin, begin + grain < count ? begin + grain : count, context);
        }
    }
};

// Threads wait for a loop with a seat for them. The pool is never destroyed: at exit its threads
// may still wait, and a destructor would have to join them while the interpreter goes down.
struct Pool {
    std::mutex mutex;
    std::condition_variable wake, done;
    Loop *loop = nullptr;
    int seats = 0, working = 0, started = 0;
    const pid_t process = getpid();

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [this] { return seats > 0; });
            seats--;
            working++;
            Loop *current = loop;
            lock.unlock();
            current->run();
            lock.lock();
            if (--working == 0) done.notify_one();
        }
    }

    void run(Loop &mine, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            while (started < helpers) {
                try {
                    std::thread([this] { serve(); }).detach();
                } catch (const std::system_error &) {
                    break;  // as many as the system allows
                }
                started++;
            }
            loop = &mine;
            seats = helpers < started ? helpers : started;
        }
        wake.notify_all();
        mine.run();
        std::unique_lock<std::mutex> lock(mutex);
        seats = 0;  // threads that did not wake in time are not needed
        done.wait(lock, [this] { return working == 0; });
        loop = nullptr;
    }
};

std::atomic<bool> busy{false};
Pool *pool = nullptr;

struct Memory {
    void *data = nullptr;
    size_t size = 0;
    ~Memory() { free(data); }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads,
                  void (*work)(int64_t, int64_t, void *), void *context) {
    if (count <= 0) return;
    const int64_t parts = (count + grain - 1) / grain;
    const int helpers = (int)(parts < threads ? parts : threads) - 1;
    if (helpers < 1 || busy.exchange(true)) return work(0, count, context);
    if (!pool || pool->process != getpid()) pool = new Pool;  // threads do not survive a fork
    Loop loop;
    loop.count = count;
    loop.grain = grain;
    loop.work = work;
    loop.context = context;
    pool->run(loop, helpers);
    busy = false;
}

void *thread_scratch(size_t bytes) {
    static thread_local Memory memory;
    if (memory.size < bytes) {
        free(memory.data);
        memory.data = aligned_alloc(64, (bytes + 63) / 64 * 64);
        memory.size = memory.data ? bytes : 0;
    }
    return memory.data;
}
