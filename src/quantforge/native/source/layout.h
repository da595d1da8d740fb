// The planes of a row of codes, as numerics/packing.py lays them out.
#pragma once

#include <vector>

#include "kernels.h"

// A Layout that owns the arrays it points to.
struct OwnedLayout : Layout {
    std::vector<int32_t> fields;

    OwnedLayout(int codes, int code_bits) {
        static const int WIDTHS[9][3] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};
        dim = codes;
        bits = code_bits;
        planes = 0;
        int shift = 0, offset = 0;
        for (const int width : WIDTHS[bits]) {
            if (!width) break;
            const int stride = (int)(((int64_t)dim * width + 7) / 8);
            plane[planes++] = {width, shift, offset, stride};
            shift += width;
            offset += (stride + 3) / 4 * 4;
        }
        dwords = offset / 4;
        dword = rotation = nullptr;
    }
    explicit OwnedLayout(const Code &code) : OwnedLayout(code.dim, code.bits) {
        if (planes == 1) return;
        fields.resize(2 * (size_t)planes * dim);
        for (int p = 0; p < planes; p++) {
            for (int c = 0; c < dim; c++) {
                const int byte = plane[p].offset + c % plane[p].stride;
                const int bit = 8 * (byte % 4) + plane[p].width * (c / plane[p].stride);
                fields[p * dim + c] = byte / 4;
                fields[(planes + p) * dim + c] = (bit - plane[p].shift) & 31;
            }
        }
        dword = fields.data();
        rotation = fields.data() + planes * dim;
    }
    OwnedLayout(const OwnedLayout &) = delete;
};
