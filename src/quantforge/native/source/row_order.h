// The order in which a row read as it lies yields channels (rows.h); queries are packed in it.
#pragma once

#include "kernels.h"

// Vectors of a block of `lanes` dwords at `width` bits per code.
static inline int64_t vectors_of(int width) { return 4 * (8 / width); }

// Numbers of a row in that order, padded to whole blocks.
static inline int64_t row_width(const Layout &layout, int lanes) {
    return (layout.dwords + lanes - 1) / lanes * vectors_of(layout.bits) * lanes;
}

// The channel in lane i of vector v of a block, or -1 where there is only padding:
//
//     in general        byte 4 i + v / fields of the block,             field v % fields
//     nibbles by bytes  byte 16 (i / 4) + 4 (v % 4) + i % 4 of it,      field v / 4
static inline int64_t channel_at(const Layout &layout, int lanes, bool by_bytes, int64_t block,
                                 int v, int i) {
    const Plane &plane = layout.plane[0];
    const bool nibbles = by_bytes && plane.width == 4;
    const int fields = 8 / plane.width, per_byte = v * plane.width >> 3;
    const int field = nibbles ? v >> 2 : v & (fields - 1);
    const int within = nibbles ? 16 * (i >> 2) + 4 * (v & 3) + (i & 3) : 4 * i + per_byte;
    const int64_t byte = 4 * lanes * block + within, channel = byte + field * (int64_t)plane.stride;
    return byte < plane.stride && channel < layout.dim ? channel : -1;
}

// Call body(place, channel) for each channel of a row.
template <class Body>
static inline void for_channels(const Layout &layout, int lanes, bool by_bytes, const Body &body) {
    const int vectors = (int)vectors_of(layout.bits);
    int64_t place = 0;
    for (int64_t block = 0; block * lanes < layout.dwords; block++)
        for (int v = 0; v < vectors; v++)
            for (int i = 0; i < lanes; i++, place++) {
                const int64_t channel = channel_at(layout, lanes, by_bytes, block, v, i);
                if (channel >= 0) body(place, channel);
            }
}
