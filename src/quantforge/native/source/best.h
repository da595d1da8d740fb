// The best k rows of a query, as keys in a heap: its root is the worst of them.
//
//     key = ordered(score) << 32 | 0xFFFFFFFF - row        as ops/search/eager.py
#pragma once

#include <stdint.h>
#include <string.h>

static inline int64_t key_of(float score, int64_t row) {
    score += 0.0f;  // -0 is 0
    int32_t bits;
    memcpy(&bits, &score, 4);
    const int32_t ordered = bits ^ (bits >> 31 & 0x7FFFFFFF);
    return (int64_t)((uint64_t)(uint32_t)ordered << 32 | (uint64_t)(0xFFFFFFFF - row));
}
static inline float score_of(int64_t key) {
    const int32_t ordered = (int32_t)(key >> 32), bits = ordered ^ (ordered >> 31 & 0x7FFFFFFF);
    float score;
    memcpy(&score, &bits, 4);
    return score;
}
// Of no row: score -inf.
static inline int64_t absent_key() { return key_of(-__builtin_inff(), 0xFFFFFFFF); }

struct Best {
    int64_t *keys;
    int64_t k;
    float *shared;  // the best of the worst scores of all heaps of this query

    // A row of a lower score is not among the best k; one of the same score may be.
    float limit() const {
        const float mine = score_of(keys[0]);
        int32_t bits;
        __atomic_load((const int32_t *)shared, &bits, __ATOMIC_RELAXED);
        float theirs;
        memcpy(&theirs, &bits, 4);
        return mine > theirs ? mine : theirs;
    }

    void offer(float score, int64_t row) {
        const int64_t key = key_of(score, row);
        if (key <= keys[0]) return;
        int64_t at = 0;
        for (;;) {  // sift down
            int64_t child = 2 * at + 1;
            if (child >= k) break;
            if (child + 1 < k && keys[child + 1] < keys[child]) child++;
            if (keys[child] >= key) break;
            keys[at] = keys[child];
            at = child;
        }
        keys[at] = key;
        const float worst = score_of(keys[0]);
        if (worst > limit_shared()) {  // a race loses a rise, not a row
            int32_t bits;
            memcpy(&bits, &worst, 4);
            __atomic_store((int32_t *)shared, &bits, __ATOMIC_RELAXED);
        }
    }

private:
    float limit_shared() const {
        int32_t bits;
        __atomic_load((const int32_t *)shared, &bits, __ATOMIC_RELAXED);
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
};
