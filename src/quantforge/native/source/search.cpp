// Searches: queries to integers, rows and queries cut into parts, and the parts' best rows merged.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "layout.h"
#include "pool.h"
#include "search_args.h"

#define API extern "C" __attribute__((visibility("default")))

extern "C" {

// A group of codes as numerics/integers.py describes it.
struct IntegerGroup {
    int32_t dim, bits;
    const uint8_t *rows;
    int64_t stride;
    const uint8_t *table;
    int32_t bias, most, room, span;
    float unit;
};

// What is searched. Visits of range r are visits[r] .. visits[r + 1]; a visit is a query and what
// is added to its scores there.
struct SearchCall {
    const IntegerGroup *groups;
    int32_t count, lead;
    const uint16_t *scales, *offsets, *rests;  // rests or null: fp16 of each row
    float unit;
    int32_t threads;
    const float *steps;                        // (dim,) that rests are measured in
    const uint8_t *bitmap;                     // or null
    const float *query;                        // (queries, dim)
    int64_t rows, queries, ranges, k;
    const int64_t *range, *visits, *visitors;  // (ranges, 2), (ranges + 1,), (visits,) or null
    const float *base;                         // (visits,)
    float *scores;                             // (queries, k), falling; -inf where there is no row
    int64_t *found;                            // their rows, or -1
};

}  // extern "C"

namespace {

// Where the channels of a group are: it depends on three numbers, and is made once for them.
struct Shape {
    OwnedLayout layout;
    std::vector<SearchField> fields;
    std::vector<int32_t> place;  // of each channel
    std::vector<int32_t> lane;   // narrow: its 16-bit sum
    int32_t lanes = 0, steps = 0, upper = 0;

    Shape(int32_t dim, int32_t bits) : layout(dim, bits) {}
};

// The fields of the planes but the first that complete the codes of each dword, in its order.
void add_fields(const Layout &l, int64_t steps, std::vector<SearchField> &out) {
    const Plane &first = l.plane[0];
    const int64_t dwords = steps / (8 / first.width);
    for (int64_t m = 0; m < steps; m++) {
        const size_t begin = out.size();
        for (int p = 1; p < l.planes; p++) {
            const Plane &plane = l.plane[p];
            for (int b = 0; b < 4; b++) {
                const int64_t at = m % dwords * 4 + b;
                const int64_t channel = m / dwords * first.stride + at;
                if (at >= first.stride || channel >= l.dim) continue;
                const int byte = plane.offset + (int)(channel % plane.stride);
                const int bit = 8 * (byte % 4) + plane.width * (int)(channel / plane.stride);
                const int to = 8 * b + plane.shift;
                const int32_t left = std::max(to - bit, 0), right = std::max(bit - to, 0);
                const int32_t mask = (int32_t)(((1u << plane.width) - 1) << to);
                auto same = std::find_if(out.begin() + begin, out.end(), [&](const SearchField &f) {
                    return f.dword == byte / 4 && f.left == left && f.right == right;
                });
                if (same == out.end()) out.push_back({byte / 4, left, right, mask, 0});
                else same->mask |= mask;
            }
        }
        out.push_back({0, 0, 0, 0, 1});
    }
}

Shape *new_shape(int32_t dim, int32_t bits, int32_t span) {
    auto out = std::make_unique<Shape>(dim, bits);
    const Layout &l = out->layout;
    const Plane &first = l.plane[0];
    const int32_t padded = (first.stride + 3) / 4 * 4;
    out->steps = padded / 4 * (8 / first.width);
    if (l.planes > 1) add_fields(l, out->steps, out->fields);
    if (l.planes == 2 && l.plane[1].offset % 4 == 0 && dim % (32 / l.plane[1].width) == 0)
        out->upper = l.plane[1].offset / 4;
    for (int32_t c = 0; c < dim; c++) {
        const int32_t place = c / first.stride * padded + c % first.stride;
        out->place.push_back(place);
        if (bits > NARROW_BITS) continue;
        out->lane.push_back(place / (4 * span) * 2 + place / 2 % 2);
        out->lanes = std::max(out->lanes, out->lane.back() + 1);
    }
    return out.release();
}

// Shapes are never freed: there are as many as indexes have kinds of groups.
const Shape &shape_of(const IntegerGroup &g) {
    static std::mutex mutex;
    static auto &known = *new std::map<std::array<int32_t, 3>, const Shape *>;
    const std::lock_guard<std::mutex> lock(mutex);
    const Shape *&shape = known[{g.dim, g.bits, g.span}];
    if (!shape) shape = new_shape(g.dim, g.bits, g.span);
    return *shape;
}

SearchGroup view_of(const IntegerGroup &g, const Shape &shape, int64_t word) {
    const Layout &l = shape.layout;
    return {g.rows, g.stride, g.table, shape.fields.data(), g.bits,
            l.dwords, shape.steps, g.span, shape.upper, word};
}

float rounded(float x) { return (float)__builtin_lrintf(x); }

// Round a query as numerics/integers.py does; returns the unit.
float round_query(const float *x, const IntegerGroup &g, const Shape &shape, int32_t *z,
                  std::vector<int64_t> &sums) {
    float peak = 0;
    bool finite = true;
    for (int32_t c = 0; c < g.dim; c++) {
        peak = std::max(peak, std::fabs(x[c]));
        finite = finite && std::isfinite(x[c]);
    }
    int64_t most = g.most;
    const auto round = [&] {
        for (int32_t c = 0; c < g.dim; c++)
            z[c] = peak > 0 && finite ? (int32_t)rounded(x[c] / peak * (float)most) : 0;
    };
    round();
    if (g.room) {
        sums.assign((size_t)shape.lanes * 2, 0);
        for (int32_t c = 0; c < g.dim; c++)
            sums[(size_t)shape.lane[c] * 2 + (z[c] < 0)] += std::abs(z[c]);
        const int64_t worst = *std::max_element(sums.begin(), sums.end());
        if (worst > g.room) {
            most = g.room * most / worst;
            round();
        }
    }
    return finite ? peak / (float)most : NAN;
}

struct Queries {
    std::vector<int32_t> words, corrections;
    std::vector<float> weights, rests;
};

Queries queries_of(const SearchCall &call, const std::vector<const Shape *> &shapes,
                   const std::vector<SearchGroup> &views, int64_t word_count) {
    Queries out;
    const int64_t count = call.count;
    int64_t dim = 0;
    for (int64_t g = 0; g < count; g++) dim += call.groups[g].dim;
    out.words.assign((size_t)(call.queries * word_count), 0);
    out.corrections.assign((size_t)(call.queries * count), 0);
    out.weights.resize((size_t)(call.queries * count));
    if (call.rests) out.rests.resize((size_t)call.queries);
    std::vector<int32_t> z((size_t)dim);
    std::vector<int64_t> sums;
    for (int64_t q = 0; q < call.queries; q++) {
        double rest = 0;
        int64_t channel = 0;
        for (int64_t g = 0; g < count; g++) {
            const IntegerGroup &from = call.groups[g];
            const Shape &shape = *shapes[g];
            const float unit = round_query(call.query + q * dim + channel, from, shape, z.data(),
                                           sums);
            out.weights[q * count + g] = unit * from.unit;
            int32_t *words = out.words.data() + q * word_count + views[g].word;
            int32_t sum = 0;
            for (int32_t c = 0; c < from.dim; c++) {
                const int32_t place = shape.place[c];
                if (from.bits > NARROW_BITS) {
                    ((int16_t *)words)[place / 4 * 4 + place % 2 * 2 + place % 4 / 2] =
                        (int16_t)z[c];
                } else {
                    ((int8_t *)words)[place] = (int8_t)z[c];
                    sum += z[c];
                }
                if (call.rests && g >= call.lead) {
                    const double part = (double)z[c] * unit / call.steps[channel + c];
                    rest += part * part;
                }
            }
            out.corrections[q * count + g] = from.bias * sum;
            channel += from.dim;
        }
        if (call.rests) out.rests[q] = (float)(std::sqrt(rest) * 1.0001);
    }
    return out;
}

// Tasks of each part: ranges, cut where a part has its share of rows times visits.
std::vector<std::vector<SearchTask>> parts_of(const SearchCall &call, int64_t tile, int64_t parts) {
    const auto visits = [&](int64_t r) { return call.visits[r + 1] - call.visits[r]; };
    double all = 0;
    for (int64_t r = 0; r < call.ranges; r++)
        all += (double)(call.range[2 * r + 1] - call.range[2 * r]) * visits(r);
    std::vector<std::vector<SearchTask>> out(1);
    double left = all / parts;
    for (int64_t r = 0; r < call.ranges; r++) {
        int64_t begin = call.range[2 * r];
        const int64_t end = call.range[2 * r + 1];
        while (begin < end && visits(r)) {
            int64_t stop = end;
            if ((int64_t)out.size() < parts) {
                const double rows = left / visits(r);
                if (rows < (double)(end - begin))
                    stop = std::min(end, begin + std::max<int64_t>(1, (int64_t)rows / tile) * tile);
            }
            out.back().push_back({begin, stop, call.visits[r], call.visits[r + 1]});
            left -= (double)(stop - begin) * visits(r);
            begin = stop;
            if (left <= 0 && (int64_t)out.size() < parts) {
                out.emplace_back();
                left += all / parts;
            }
        }
    }
    return out;
}

struct Work {
    const SearchArgs *args;
    const std::vector<std::vector<SearchTask>> *parts;
    size_t scratch;
    std::atomic<bool> failed{false};
};

void run_parts(int64_t begin, int64_t end, void *context) {
    Work &work = *(Work *)context;
    void *memory = thread_scratch(work.scratch);
    if (!memory) {
        work.failed = true;  // a thread of the pool must not throw
        return;
    }
    for (int64_t part = begin; part < end; part++)
        for (const SearchTask &task : (*work.parts)[part])
            kernels().search->search(work.args, &task, part, memory);
}

void search(const SearchCall &call) {
    std::vector<const Shape *> shapes;
    std::vector<SearchGroup> views;
    SearchArgs args{};
    args.lead = call.rests ? call.lead : call.count;
    for (int32_t g = 0; g < call.count; g++) {
        shapes.push_back(&shape_of(call.groups[g]));
        views.push_back(view_of(call.groups[g], *shapes.back(), args.word_count));
        const SearchGroup &view = views.back();
        args.word_count += view.steps * (view.bits > NARROW_BITS ? 2 : 1);
        if (g < args.lead) args.lead_words = args.word_count;
        args.dwords = std::max(args.dwords, view.dwords);
    }
    const Queries queries = queries_of(call, shapes, views, args.word_count);
    const int64_t wanted = call.threads > 1 ? 2 * call.threads : 1;
    const auto parts = parts_of(call, kernels().search->tile, wanted);
    const int64_t kept = call.queries * call.k;
    std::vector<int64_t> keys(parts.size() * (size_t)kept, absent_key());
    std::vector<float> limits((size_t)call.queries, -INFINITY);
    args.groups = views.data();
    args.count = call.count;
    args.words = queries.words.data();
    args.weights = queries.weights.data();
    args.corrections = queries.corrections.data();
    args.query_rests = queries.rests.data();
    args.visitors = call.visitors;
    args.base = call.base;
    args.scales = call.scales;
    args.offsets = call.offsets;
    args.rests = call.rests;
    args.unit = call.unit;
    args.bitmap = call.bitmap;
    args.rows = call.rows;
    args.queries = call.queries;
    args.k = call.k;
    args.keys = keys.data();
    args.limits = limits.data();
    Work work{&args, &parts, kernels().search->scratch(&args)};
    parallel_for((int64_t)parts.size(), 1, call.threads, run_parts, &work);
    if (work.failed) throw std::bad_alloc();
    std::vector<int64_t> all;
    for (int64_t q = 0; q < call.queries; q++) {
        all.clear();
        for (size_t p = 0; p < parts.size(); p++) {
            const int64_t *from = keys.data() + p * kept + q * call.k;
            all.insert(all.end(), from, from + call.k);
        }
        std::partial_sort(all.begin(), all.begin() + call.k, all.end(), std::greater<int64_t>());
        for (int64_t i = 0; i < call.k; i++) {
            const float score = score_of(all[i]);
            call.scores[q * call.k + i] = score;
            call.found[q * call.k + i] =
                score == -INFINITY ? -1 : 0xFFFFFFFF - (all[i] & 0xFFFFFFFF);
        }
    }
}

}  // namespace

API int qf_search(const SearchCall *call) {
    try {
        search(*call);
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}
