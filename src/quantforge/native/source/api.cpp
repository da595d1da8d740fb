// The C interface: chooses the level, lays out what kernels share, and cuts work among threads.
//
// Functions return 0, or 1 where memory ran out; arguments are checked by their Python callers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "kernels.h"
#include "layout.h"
#include "pool.h"
#include "queries.h"
#include "row_order.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

const Kernels *kernels_of(int level) {
#if defined(__x86_64__)
    if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
        && __builtin_cpu_supports("f16c"))
        return &avx2_kernels;
    if (level == 2 && kernels_of(1) && __builtin_cpu_supports("avx512f")
        && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return &avx512_kernels;
#endif
    return level == 0 ? &portable_kernels : nullptr;
}

const Kernels *best() {
    for (int level = 2; level > 0; level--)
        if (const Kernels *found = kernels_of(level)) return found;
    return &portable_kernels;
}

const Kernels *chosen = nullptr;

template <class Args> struct Call {
    void (*kernel)(const Args *, int64_t, int64_t, void *);
    const Args *args;
    size_t scratch;
    std::atomic<bool> failed{false};
};

// Run a kernel on [0, count) in parts worth about `grain` each.
template <class Args>
void run(void (*kernel)(const Args *, int64_t, int64_t, void *), const Args &args, size_t scratch,
         int64_t count, int64_t grain, int threads) {
    Call<Args> call{kernel, &args, scratch};
    const auto work = [](int64_t begin, int64_t end, void *context) {
        auto &c = *(Call<Args> *)context;
        void *memory = thread_scratch(c.scratch);
        if (memory) c.kernel(c.args, begin, end, memory);
        else c.failed = true;  // a thread of the pool must not throw
    };
    parallel_for(count, std::max<int64_t>(grain, 1), threads, work, &call);
    if (call.failed) throw std::bad_alloc();
}

// Tiles worth waking a thread for: about 50 us of work, and at most four parts a thread.
int64_t grain_of(int64_t tiles, int64_t work_per_tile, int threads) {
    const int64_t least = (1 << 18) / std::max<int64_t>(work_per_tile, 1);
    return std::max({(int64_t)1, least, tiles / (4 * std::max(threads, 1))});
}

// Cut n keys of `tasks` tasks so that every thread has one; in whole tiles.
void split(int64_t n, int64_t tile, int64_t tasks, int64_t least, int threads, int64_t &splits,
           int64_t &step) {
    tasks = std::max<int64_t>(tasks, 1);
    const int64_t wanted = (threads + tasks - 1) / tasks;
    const int64_t possible = std::max<int64_t>(1, n / std::max(least, tile));
    const int64_t parts = threads > 1 ? std::min(wanted, possible) : 1;
    step = (n + parts - 1) / parts;
    step = std::max<int64_t>(tile, (step + tile - 1) / tile * tile);
    splits = std::max<int64_t>(1, (n + step - 1) / step);
}

template <class Body> int guarded(const Body &body) {
    try {
        body();
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}

}  // namespace

const Kernels &kernels() {
    if (!chosen) chosen = best();
    return *chosen;
}

API const char *qf_source(void) { return QF_SOURCE; }

// What the int8 centroids of the chosen level are stored with added to them.
API int qf_byte_offset(void) { return kernels().byte_offset; }

// Bit i: level i (portable, avx2, avx512) runs on this processor.
API int qf_levels(void) {
    int result = 1;
    for (int level = 1; level < 3; level++) result |= (kernels_of(level) != nullptr) << level;
    return result;
}

// Use a level (-1: the best) for all later calls; returns 1 where the processor lacks it.
API int qf_set_level(int level) {
    const Kernels *found = level < 0 ? best() : kernels_of(level);
    if (found) chosen = found;
    return found == nullptr;
}

API int qf_quantize(const Code *code, int64_t groups, int64_t n, const Rows *x, int dtype,
                    const float *shift, const int64_t *shift_offsets, const float *inverse,
                    const int64_t *inverse_offsets, const Packed *out, int threads) {
    return guarded([&] {
        const OwnedLayout layout(*code);
        float levels[8 * 128] = {};
        for (int depth = 0; depth < code->bits; depth++) {
            const int candidates = 1 << depth, step = 1 << (code->bits - depth);
            for (int i = 0; i < std::max(candidates, 16); i++)
                levels[128 * depth + i] =
                    code->boundaries[(i % candidates) * step + step / 2 - 1];
        }
        const QuantizeArgs args{code, &layout, n, *x, dtype, shift, shift_offsets, inverse,
                                inverse_offsets, levels, out->rows, out->scales};
        const Kernels &k = kernels();
        const int64_t tiles = groups * ((n + k.lanes - 1) / k.lanes);
        run(k.quantize, args, k.quantize_scratch(&layout), tiles,
            grain_of(tiles, (int64_t)code->dim * k.lanes * 4, threads), threads);
    });
}

API int qf_dequantize(const Packed *packed, int64_t groups, int64_t n, const float *shift,
                      const int64_t *shift_offsets, const float *equalizer,
                      const int64_t *equalizer_offsets, const Rows *out, int dtype, int threads) {
    return guarded([&] {
        const OwnedLayout layout(*packed->code);
        const DequantizeArgs args{&layout, n, *packed, shift, shift_offsets, equalizer,
                                  equalizer_offsets, *out, dtype};
        const Kernels &k = kernels();
        const int64_t tiles = groups * ((n + k.lanes - 1) / k.lanes);
        run(k.dequantize, args, k.dequantize_scratch(&layout), tiles,
            grain_of(tiles, (int64_t)layout.dim * k.lanes * 2, threads), threads);
    });
}

API int qf_rotate(const Code *code, int64_t n, const float *x, float *out, int inverse,
                  int threads) {
    return guarded([&] {
        const RotateArgs args{code, n, x, out, inverse};
        const Kernels &k = kernels();
        const int64_t tiles = (n + k.lanes - 1) / k.lanes;
        run(k.rotate, args, k.rotate_scratch(code->dim), tiles,
            grain_of(tiles, (int64_t)code->dim * k.lanes * 2, threads), threads);
    });
}

API int qf_scores(const Packed *packed, int64_t groups, int64_t queries, int64_t n,
                  const float *query, const float *offset, const Rows *out, int accumulate,
                  int fast, int threads) {
    return guarded([&] {
        const OwnedLayout layout(*packed->code);
        const Kernels &k = kernels();
        ScoresArgs args{};
        args.layout = &layout;
        args.n = n;
        args.queries = queries;
        args.packed = *packed;
        args.offset = offset;
        args.out = *out;
        args.accumulate = accumulate;
        args.wide = queries > 2 ? 2 : 1;
        const bool one = queries == 1 && layout.planes == 1 && layout.bits <= 4;
        std::vector<float> blocks;
        ByteQueries bytes;
        auto kernel = one ? k.one_query : k.scores;
        size_t scratch = k.scores_scratch(&layout);
        int64_t rows = k.lanes * (one ? 1 : args.wide);
        if (fast) {
            // int8 alone has an error of 7e-3, two terms 3e-3: taken where they fill a pass
            args.terms = k.query_words == 1 && !one && 2 * queries <= k.byte_queries ? 2 : 1;
            bytes = pack_bytes(query, groups, queries, args.terms, one, layout, k);
            args.byte_query = bytes.words.data();
            args.query_unit = bytes.unit.data();
            args.correction = bytes.correction.data();
            kernel = one ? k.one_byte_query : k.byte_scores;
            scratch = k.byte_scratch(&layout);
            rows = k.lanes * (one ? 1 : k.byte_wide);
        } else if (one) {
            const int64_t width = row_width(layout, k.lanes);
            blocks.resize((size_t)(groups * width));
            for (int64_t g = 0; g < groups; g++)
                pack_row_queries(query + g * layout.dim, 1, layout, 1, k,
                                 blocks.data() + g * width);
        } else {
            const int64_t size = queries * layout.dim;
            blocks.resize((size_t)(groups * size));
            for (int64_t g = 0; g < groups; g++)
                pack_queries(query + g * size, queries, layout.dim, k.max_accumulators / args.wide,
                             blocks.data() + g * size);
        }
        args.query = blocks.data();
        const int64_t tiles = groups * ((n + rows - 1) / rows);
        const int64_t work = rows * layout.dim * (queries + 1) / (fast ? 4 : 1);
        run(kernel, args, scratch, tiles, grain_of(tiles, work, threads), threads);
    });
}

API int qf_combine(const Packed *packed, int64_t groups, int64_t queries, int64_t n,
                   const Rows *weights, float *out, int threads) {
    return guarded([&] {
        const OwnedLayout layout(*packed->code);
        const Kernels &k = kernels();
        const int64_t parts = (queries + COMBINE_ROWS - 1) / COMBINE_ROWS;
        const int64_t size = groups * queries * layout.dim;
        CombineArgs args{&layout, n, queries, *packed, *weights, 1, 1, out, groups};
        split(n, WIDE * k.lanes, groups * parts, 2048, threads, args.splits, args.step);
        std::vector<float> partial;
        if (args.splits > 1) {
            partial.resize((size_t)(args.splits * size));
            args.partial = partial.data();
        }
        const int64_t tasks = args.splits * groups * parts;
        const int64_t work = std::min(n, args.step) * layout.dim * (queries + 1);
        run(k.combine, args, k.combine_scratch(&layout), tasks, grain_of(tasks, work, threads),
            threads);
        if (args.splits == 1) return;
        std::copy_n(args.partial, size, out);
        for (int64_t s = 1; s < args.splits; s++)
            for (int64_t i = 0; i < size; i++) out[i] += args.partial[s * size + i];
    });
}

API int qf_attention(const Packed *key, const Packed *value, const int64_t *sizes,
                     const float *query, const void *mask, int mask_is_bool,
                     const int64_t *mask_strides, int is_causal, float scale, float *out,
                     float *lse, int threads) {
    return guarded([&] {
        const OwnedLayout k_layout(*key->code), v_layout(*value->code);
        const Kernels &k = kernels();
        AttentionArgs args{};
        args.k_layout = &k_layout;
        args.v_layout = &v_layout;
        args.groups = sizes[0] * sizes[1];
        args.kv_heads = sizes[1];
        args.q_per_kv = sizes[2];
        args.length = sizes[3];
        args.n = sizes[4];
        args.key = *key;
        args.value = *value;
        args.mask = (const uint8_t *)mask;
        args.mask_is_bool = mask_is_bool;
        if (mask) std::copy_n(mask_strides, 3, args.mask_strides);
        args.is_causal = is_causal;
        args.scale = scale;

        const int64_t rows = args.q_per_kv * args.length, all = args.groups * rows;
        const int64_t dim = k_layout.dim, value_dim = v_layout.dim;
        const int64_t parts = (rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
        const auto by_rows = [](const Layout &l) { return l.bits == 2 || l.bits == 4; };
        const bool few = rows <= k.few_rows && by_rows(k_layout) && by_rows(v_layout);
        const int64_t width = few ? row_width(k_layout, k.lanes) : dim;
        std::vector<float> blocks((size_t)(all * width));
        for (int64_t g = 0; g < args.groups; g++) {
            for (int64_t r = 0; r < rows; r += ATTENTION_ROWS) {
                const int64_t row = g * rows + r;
                const int64_t count = std::min<int64_t>(ATTENTION_ROWS, rows - r);
                const float *from = query + row * dim;
                float *to = blocks.data() + row * width;
                if (few) pack_row_queries(from, count, k_layout, k.row_queries, k, to);
                else pack_queries(from, count, dim, k.max_accumulators / WIDE, to);
            }
        }
        args.query = blocks.data();
        split(args.n, WIDE * k.lanes, args.groups * parts, 512, threads, args.splits, args.step);
        std::vector<float> partial((size_t)(args.splits * all * (value_dim + 2)));
        args.partial = partial.data();
        args.maximum = args.partial + args.splits * all * value_dim;
        args.mass = args.maximum + args.splits * all;
        const int64_t tasks = args.splits * args.groups * parts;
        const int64_t work = std::min(args.n, args.step) * (dim + value_dim)
                           * (std::min<int64_t>(rows, ATTENTION_ROWS) + 1);
        const auto scratch = few ? k.row_attention_scratch : k.attention_scratch;
        run(few ? k.row_attention : k.attention, args, scratch(&k_layout, &v_layout), tasks,
            grain_of(tasks, work, threads), threads);

        for (int64_t r = 0; r < all; r++) {  // merge the splits (arXiv 2205.14135, section 3.1)
            float peak = -INFINITY, mass = 0;
            for (int64_t s = 0; s < args.splits; s++)
                peak = std::max(peak, args.maximum[s * all + r]);
            const float reference = peak == -INFINITY ? 0 : peak;
            float *row = out + r * value_dim;
            std::fill_n(row, value_dim, 0.0f);
            for (int64_t s = 0; s < args.splits; s++) {
                const float weight = std::exp(args.maximum[s * all + r] - reference);
                mass += args.mass[s * all + r] * weight;
                const float *from = args.partial + (s * all + r) * value_dim;
                for (int64_t c = 0; c < value_dim; c++) row[c] += from[c] * weight;
            }
            const float inverse = mass > 0 ? 1 / mass : 0;
            for (int64_t c = 0; c < value_dim; c++) row[c] *= inverse;
            lse[r] = std::log(mass) + (mass > 0 ? reference : 0);
        }
    });
}
