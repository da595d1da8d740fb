// What search.cpp prepares for the search kernels, and where they put the best rows.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "best.h"

constexpr int NARROW_BITS = 5;  // codes of more bits take 16-bit integers

// A field of a plane but the first, brought to its place: shift the dword one way, and mask.
struct SearchField {
    int32_t dword, left, right;
    int32_t mask;
    int32_t last;  // 1: no field, those of one word end here
};

struct SearchGroup {
    const uint8_t *rows;
    int64_t stride;              // bytes
    const uint8_t *table;        // narrow: integers + bias; wide: their low bytes, their high bytes
    const SearchField *fields;
    int32_t bits, dwords, steps, span;
    int32_t upper;               // dword of the second of two planes whose fields lie alike, or 0
    int64_t word;                // first of the group among a query's words
};

// Rows [begin, end), met by visits [visit_begin, visit_end).
struct SearchTask {
    int64_t begin, end, visit_begin, visit_end;
};

struct SearchArgs {
    const SearchGroup *groups;
    int32_t count, lead, dwords;  // dwords: most of a row of any group
    int64_t word_count, lead_words;
    const int32_t *words;         // (queries, word_count)
    const float *weights;         // (queries, count)
    const int32_t *corrections;   // (queries, count), to be taken off sums
    const float *query_rests;     // (queries,) or null
    const int64_t *visitors;      // query of each visit, or null: its own number
    const float *base;            // of each visit
    const uint16_t *scales, *offsets, *rests;  // fp16 of each row; rests may be null
    float unit;                   // of offsets
    const uint8_t *bitmap;        // or null
    int64_t rows;                 // of the arrays, those that are not searched too
    int64_t queries, k;
    int64_t *keys;                // (parts, queries, k) heaps
    float *limits;                // (queries,) that all parts share

    Best best_of(int64_t part, int64_t query) const {
        return {keys + (part * queries + query) * k, k, limits + query};
    }
};

// The entry points of a level: a unit of its own, so that levels compile side by side.
struct SearchKernels {
    int tile;  // rows
    size_t (*scratch)(const SearchArgs *);
    void (*search)(const SearchArgs *, const SearchTask *, int64_t part, void *scratch);
};
