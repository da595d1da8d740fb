#include "queries.h"

#include <string.h>

#include <algorithm>
#include <cmath>

#include "row_order.h"

void pack_queries(const float *query, int64_t count, int64_t dim, int64_t most, float *out) {
    for (int64_t q = 0; q < count; q += most) {
        const int64_t part = std::min(most, count - q);
        float *to = out + q * dim;
        for (int64_t i = 0; i < part; i++)
            for (int64_t c = 0; c < dim; c++) to[c * part + i] = query[(q + i) * dim + c];
    }
}

int64_t pack_row_queries(const float *query, int64_t count, const Layout &layout, int64_t most,
                         const Kernels &k, float *out) {
    const int64_t width = row_width(layout, k.lanes), lanes = k.lanes;
    std::fill_n(out, count * width, 0.0f);
    for (int64_t q = 0; q < count; q += most) {
        const int64_t part = std::min(most, count - q);
        for_channels(layout, k.lanes, k.by_bytes, [&](int64_t at, int64_t channel) {
            float *to = out + q * width + at / lanes * part * lanes + at % lanes;
            for (int64_t i = 0; i < part; i++)
                to[i * lanes] = query[(q + i) * layout.dim + channel];
        });
    }
    return count * width;
}

namespace {

// The greatest number, and whether all are finite.
bool peak_of(const float *x, int64_t dim, float &peak) {
    bool finite = true;
    peak = 0;
    for (int64_t c = 0; c < dim; c++) {
        finite = finite && std::isfinite(x[c]);
        peak = std::max(peak, std::fabs(x[c]));
    }
    return finite;
}

float rounded_to_integer(float x) { return (float)__builtin_lrintf(x); }

// Four integers as the words of a level: four int8, or two pairs of int16 `apart` words.
void store_words(const int32_t value[4], int words, int64_t apart, int32_t *out) {
    if (words == 1) {
        const int8_t bytes[4] = {(int8_t)value[0], (int8_t)value[1], (int8_t)value[2],
                                 (int8_t)value[3]};
        memcpy(out, bytes, 4);
        return;
    }
    const int16_t even[2] = {(int16_t)value[0], (int16_t)value[2]};
    const int16_t odd[2] = {(int16_t)value[1], (int16_t)value[3]};
    memcpy(out, even, 4);
    memcpy(out + apart, odd, 4);
}

}  // namespace

ByteQueries pack_bytes(const float *query, int64_t groups, int64_t queries, int terms, bool one,
                       const Layout &layout, const Kernels &k) {
    const Plane &plane = layout.plane[0];
    const int64_t dim = layout.dim, fields = 8 / plane.width, dwords = (plane.stride + 3) / 4;
    const int64_t count = queries * terms, words = k.query_words, lanes = k.lanes;
    const int64_t rounded_dwords = one ? (layout.dwords + lanes - 1) / lanes * lanes : dwords;
    const int64_t group_size = rounded_dwords * fields * count * words;
    ByteQueries out;
    out.words.assign((size_t)(groups * group_size), 0);
    out.unit.resize((size_t)(groups * count));
    out.correction.assign((size_t)(groups * count), 0);
    const int64_t limit = ((int64_t)1 << 31) / ((127 + k.byte_offset) * (dim + 4)) - 1;
    const float most = (float)std::min<int64_t>(k.max_query, limit);
    for (int64_t row = 0; row < groups * count; row++) {
        const float *x = query + row / terms * dim;
        const bool second = terms == 2 && row % 2;
        float peak;
        const bool finite = peak_of(x, dim, peak);
        out.unit[row] = finite ? peak / most / (second ? 2 * most : 1) : NAN;
        if (!finite || peak == 0) continue;
        const int64_t q = row % count, part = q / k.byte_queries * k.byte_queries;
        const int64_t width = std::min<int64_t>(k.byte_queries, count - part);
        int32_t *group = out.words.data() + row / count * group_size;
        int64_t sum = 0;
        for (int64_t m = 0; m < dwords * fields; m++) {
            int32_t value[4] = {};
            for (int b = 0; b < 4; b++) {
                const int64_t byte = m / fields * 4 + b;
                const int64_t channel = byte + m % fields * plane.stride;
                if (byte >= plane.stride || channel >= dim) continue;
                const float exact = x[channel] / peak * most;
                float rounded = rounded_to_integer(exact);
                if (second) rounded = rounded_to_integer((exact - rounded) * 2 * most);
                value[b] = (int32_t)rounded;
                sum += value[b];
            }
            if (one) {  // (block, field, term, word, lane)
                const int64_t dword = m / fields, step = dword / lanes * fields + m % fields;
                const int64_t at = (step * count + q) * words * lanes + dword % lanes;
                store_words(value, (int)words, lanes, group + at);
            } else {  // parts of (step, query, word)
                const int64_t at = (part * dwords * fields + m * width + q - part) * words;
                store_words(value, (int)words, 1, group + at);
            }
        }
        out.correction[row] = (int32_t)(-k.byte_offset * sum);
    }
    return out;
}
