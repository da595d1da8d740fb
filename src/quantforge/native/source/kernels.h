// What the C interface (api.cpp) and the kernels of each level share: arguments and entry points.
//
// A level (portable, avx2, avx512) is one translation unit with its own compiler flags. Kernels
// are templates over a Vector in the namespace of the level, so no code is shared between levels
// by the linker, and they use nothing of the C++ library for the same reason.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

// Rows of several groups (heads, batches): row i of group g is at data + offsets[g] + i * stride.
struct Rows {
    uint8_t *data;
    const int64_t *offsets;  // bytes
    int64_t stride;          // bytes
};

// A spec: what numerics/ defines, handed over by quantforge.native.code.
struct Code {
    int32_t dim;
    int32_t bits;
    int32_t order;        // of the dense Hadamard stage: 1, 12, 20 or 28
    int32_t scale_rule;   // 0 unbiased, 1 norm, 2 mse
    int32_t wide_scales;  // 1: float32, 0: float16
    float dim_factor;
    float inv_sqrt_dim;
    const int16_t *dense;      // the dense Hadamard stage and its transpose, as code.py writes it
    const float *signs;        // (dim,) of +-1
    const float *centroids;    // (2^bits,) repeated to 16 at least
    const float *boundaries;   // (2^bits - 1,)
    const uint8_t *bytes;      // (16,) centroids as int8, for precision "fast"; or null
    float byte_unit;           // centroids ~= byte_unit * bytes
};

// Packed vectors with their scales.
struct Packed {
    const Code *code;
    Rows rows;
    Rows scales;
};

}  // extern "C"

enum Dtype { FLOAT32, FLOAT16, BFLOAT16, FLOAT64 };

struct Plane {
    int width, shift, offset, stride;  // as numerics.packing.Plane
};

// The planes of a row, and for several planes where each channel's fields are.
struct Layout {
    int dim, bits, planes, dwords;
    Plane plane[3];
    const int32_t *dword;     // (planes, dim) index of the dword in the row
    const int32_t *rotation;  // (planes, dim) right rotation that brings a field into its place
};

struct QuantizeArgs {
    const Code *code;
    const Layout *layout;
    int64_t n;
    Rows x;
    int dtype;
    const float *shift;  // or null; row of group g at shift_offsets[g] floats
    const int64_t *shift_offsets;
    const float *inverse_equalizer;
    const int64_t *equalizer_offsets;
    const float *levels;  // (8, 128): boundaries by depth of the binary search
    Rows packed, scales;
};

struct DequantizeArgs {
    const Layout *layout;
    int64_t n;
    Packed packed;
    const float *shift;
    const int64_t *shift_offsets;
    const float *equalizer;
    const int64_t *equalizer_offsets;
    Rows out;
    int dtype;
};

struct RotateArgs {
    const Code *code;
    int64_t n;
    const float *x;
    float *out;
    int inverse;
};

struct ScoresArgs {
    const Layout *layout;
    int64_t n, queries;
    int terms;  // integers for a number of the query: 1, or 2 with what rounding the first lost
    Packed packed;
    const float *query;         // (groups, packed queries); see api.cpp
    const int32_t *byte_query;  // the same for precision "fast", else null
    const float *query_unit;    // (groups, queries * terms) of the byte query
    const int32_t *correction;  // (groups, queries * terms) added to its sums
    const float *offset;        // (groups, queries) or null
    Rows out;                   // row q of group g: n floats
    int accumulate;
    int wide;                   // vectors per tile: 1 or 2
};

struct CombineArgs {
    const Layout *layout;
    int64_t n, queries;
    Packed packed;
    Rows weights;        // float32
    int64_t splits, step;
    float *partial;      // (splits, groups, queries, dim)
    int64_t groups;
};

struct AttentionArgs {
    const Layout *k_layout, *v_layout;
    int64_t groups, kv_heads, q_per_kv, length, n;
    Packed key, value;
    const float *query;  // (groups, packed parts of queries)
    const uint8_t *mask;
    int mask_is_bool;
    int64_t mask_strides[3];  // bytes: batch, head, query
    int is_causal;
    float scale;
    int64_t splits, step;
    float *partial;      // (splits, groups, rows, value dim)
    float *maximum, *mass;  // (splits, groups, rows)
};

struct SearchKernels;  // search_args.h

constexpr int ATTENTION_ROWS = 32;  // query rows that share one pass over the keys
constexpr int COMBINE_ROWS = 32;
constexpr int WIDE = 4;             // vectors of keys per tile of attention and combine

// The entry points of a level. Work is a range of tiles or tasks; scratch is 64-byte aligned.
struct Kernels {
    int lanes;
    int max_accumulators;
    int query_words, byte_offset, max_query, byte_queries, byte_wide;
    size_t (*quantize_scratch)(const Layout *);
    void (*quantize)(const QuantizeArgs *, int64_t begin, int64_t end, void *scratch);
    size_t (*dequantize_scratch)(const Layout *);
    void (*dequantize)(const DequantizeArgs *, int64_t begin, int64_t end, void *scratch);
    size_t (*rotate_scratch)(int dim);
    void (*rotate)(const RotateArgs *, int64_t begin, int64_t end, void *scratch);
    size_t (*scores_scratch)(const Layout *);
    void (*scores)(const ScoresArgs *, int64_t begin, int64_t end, void *scratch);
    size_t (*byte_scratch)(const Layout *);
    void (*byte_scores)(const ScoresArgs *, int64_t begin, int64_t end, void *scratch);
    bool by_bytes;    // order of the channels of a row, see row_order.h
    int row_queries;  // that share a decoded vector of a row
    void (*one_query)(const ScoresArgs *, int64_t begin, int64_t end, void *scratch);
    void (*one_byte_query)(const ScoresArgs *, int64_t begin, int64_t end, void *scratch);
    size_t (*combine_scratch)(const Layout *);
    void (*combine)(const CombineArgs *, int64_t begin, int64_t end, void *scratch);
    size_t (*attention_scratch)(const Layout *, const Layout *);
    void (*attention)(const AttentionArgs *, int64_t begin, int64_t end, void *scratch);
    int few_rows;     // up to here row_attention is faster than attention
    size_t (*row_attention_scratch)(const Layout *, const Layout *);  // 2 or 4 bits
    void (*row_attention)(const AttentionArgs *, int64_t begin, int64_t end, void *scratch);
    const SearchKernels *search;
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

const Kernels &kernels();  // of the level in use
