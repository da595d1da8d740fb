// Queries in the order in which kernels read them.
#pragma once

#include <vector>

#include "kernels.h"

// Bring queries (count, dim) into parts of `most`, each (dim, queries of the part), for tiles.
void pack_queries(const float *query, int64_t count, int64_t dim, int64_t most, float *out);

// Bring queries (count, dim) into parts of `most`, each (block, vector, query, lane), for rows.h;
// returns how many numbers were written: row_width(layout, lanes) a query.
int64_t pack_row_queries(const float *query, int64_t count, const Layout &layout, int64_t most,
                         const Kernels &k, float *out);

struct ByteQueries {
    std::vector<int32_t> words;
    std::vector<float> unit;
    std::vector<int32_t> correction;
};

// Round queries to integers and pack them as byte_scores.h reads them, or one_query.h. With two
// terms the second holds what rounding the first has lost, in units 2 * most times smaller.
ByteQueries pack_bytes(const float *query, int64_t groups, int64_t queries, int terms, bool one,
                       const Layout &layout, const Kernels &k);
