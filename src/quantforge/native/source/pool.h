// A parallel loop over a persistent pool of threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Call work(begin, end, context) on parts of [0, count), each a multiple of `grain` long, on up to
// `threads` threads, the caller among them. Falls back to the caller alone where the pool is busy
// with another loop or no thread can be started.
void parallel_for(int64_t count, int64_t grain, int threads,
                  void (*work)(int64_t begin, int64_t end, void *context), void *context);

// Scratch memory of the calling thread: 64-byte aligned, valid until its next call;
// null where there is none.
void *thread_scratch(size_t bytes);
