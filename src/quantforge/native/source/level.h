// The entry points of one level.
#pragma once

#include "attention.h"
#include "byte_scores.h"
#include "codec.h"
#include "one_query.h"
#include "products.h"
#include "row_attention.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern const Kernels JOIN(LEVEL, _kernels);
extern const SearchKernels JOIN(LEVEL, _search);
const Kernels JOIN(LEVEL, _kernels) = {
    LEVEL::LANES,
    LEVEL::Vector::MAX_ACCUMULATORS,
    LEVEL::Vector::QUERY_WORDS,
    LEVEL::Vector::OFFSET,
    LEVEL::Vector::MAX_QUERY,
    LEVEL::BYTE_QUERIES,
    LEVEL::BYTE_W,
    LEVEL::quantize_scratch,
    LEVEL::quantize,
    LEVEL::dequantize_scratch,
    LEVEL::dequantize,
    LEVEL::rotate_scratch,
    LEVEL::rotate,
    LEVEL::scores_scratch,
    LEVEL::scores,
    LEVEL::byte_scratch,
    LEVEL::byte_scores,
    LEVEL::Vector::SPLIT_LOOKUP,
    LEVEL::ROW_QUERIES,
    LEVEL::one_query,
    LEVEL::one_byte_query,
    LEVEL::combine_scratch,
    LEVEL::combine,
    LEVEL::attention_scratch<LEVEL::TileProducts>,
    LEVEL::attention<LEVEL::TileProducts>,
    LEVEL::FEW_ROWS,
    LEVEL::attention_scratch<LEVEL::RowProducts>,
    LEVEL::attention<LEVEL::RowProducts>,
    &JOIN(LEVEL, _search),
};
