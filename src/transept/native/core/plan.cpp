// Checks a plan once, then runs its steps. A step is one pass over the records by all threads with a barrier behind each; work is
// handed out in items of output columns, rows or key chunks, never by splitting a reduction (see kernels.inl on determinism).
#include "plan.h"
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace transept {

namespace {

constexpr float EMPTY = -INFINITY;

QRow qrow(uint8_t *base, int64_t i, int k) {
    int64_t p = round_up(k, KB);
    uint8_t *at = base + i * qrow_bytes(k);
    return {reinterpret_cast<int8_t *>(at + 2 * p + p / 2), reinterpret_cast<int16_t *>(at + p / 2), reinterpret_cast<float *>(at),
            reinterpret_cast<int32_t *>(at + p / 8), reinterpret_cast<float *>(at + p / 8 + p / 4)};
}

struct Product { // a panel product over at most ROWS rows whose pointers stand in Own
    const Weight *w;
    int t, gated, act;
    bool ints, residual;
    float alpha;
    const float *bias;
    bool alone = false; // one row of floats
};

struct Group { int32_t row, n; };

} // namespace

struct Run {
    Plan &plan;
    const Batch &batch;
    double *seconds;
    std::vector<Own> &own;
    std::vector<int32_t> slots, starts, active; // experts: rows of each, sorted

    int rows(const Record &r) const { return batch.rows[r.rows].n; }
    float *at(View v, int64_t row) const {
        int64_t stride;
        float *p = plan.buffer(v.buffer, &stride);
        return p + row * stride + v.at;
    }
    bool has(View v) const { return v.buffer >= 0; }
    const Weight &weight(int i) const { return plan.weights[static_cast<size_t>(i)]; }
    const float *vector(int i) const { return i < 0 ? nullptr : reinterpret_cast<const float *>(weight(i).data); }
    int take(size_t record, int phase, int grain = 1) { return plan.next[record * COUNTERS + static_cast<size_t>(phase)].fetch_add(grain); }

    // `panels` panels (with their gates: twice as many) beside each other, from the column `column`.
    void product(Own &o, const Product &p, int panel, int column, int panels, int columns) {
        int64_t bytes = panel_bytes(p.w->kind, p.w->k);
        int count = panels * (1 + p.gated);
        const uint8_t *data = p.w->data + panel * bytes;
        float *sums = o.sums.data();
        for (size_t j = 0; j < static_cast<size_t>(p.t); j++) { // rows lie far apart, and another thread may have written them last
            __builtin_prefetch(o.y[j] + column, 1);
            if (p.residual) __builtin_prefetch(o.residual[j] + column);
        }
        if (p.alone) plan.kernels->panels_one(p.w->kind, data, bytes, count, p.w->k, o.x[0], sums);
        for (int i = 0; i < count && !p.alone; i++) {
            if (p.ints) plan.kernels->panel_int(p.w->kind, data + i * bytes, p.w->k, o.q.data(), p.t, sums + i * p.t * NR);
            else plan.kernels->panel_float(p.w->kind, data + i * bytes, p.w->k, o.x.data(), p.t, sums + i * p.t * NR);
        }
        for (int i = 0; i < panels; i++, column += NR) {
            const float *bias = p.bias ? p.bias + (p.gated ? 2 : 1) * column : nullptr;
            int width = std::min(NR, columns - column);
            Finish f = {o.y.data(), p.residual ? o.residual.data() : nullptr, bias, p.gated && bias ? bias + NR : nullptr, p.act, p.gated, column, width, p.alpha};
            plan.kernels->finish(sums + i * (1 + p.gated) * p.t * NR, p.t, f);
        }
    }

    // Panels [from, to) of a matrix of `columns` columns whose first panel is `before`.
    void products(Own &o, Product &p, int before, int from, int to, int columns) {
        p.alone = p.t == 1 && !quantised(*p.w);
        int most = p.alone ? BESIDE / (1 + p.gated) : 1;
        for (int q = from; q < to; q += most) product(o, p, (before + q) * (1 + p.gated), q * NR, std::min(most, to - q), columns);
    }

    // Row i of the input is quantised once: by each thread for itself where rows are few, else shared out and followed by a barrier.
    template <class Input> uint8_t *quantise(size_t index, int phase, int id, int n, int k, bool wide, uint8_t *shared, Input input) {
        Own &o = own[static_cast<size_t>(id)];
        if (n <= 2) {
            for (int i = 0; i < n; i++) plan.kernels->quantise(input(i), k, wide, qrow(o.quants.data(), i, k));
            return o.quants.data();
        }
        for (int i; (i = take(index, phase)) < n;) plan.kernels->quantise(input(i), k, wide, qrow(shared, i, k));
        plan.team->barrier();
        return shared;
    }

    // Each thread begins with `lead` panels of its own, one stream of memory; the others are handed out by `grain` as threads come free.
    struct Items {
        int chunk, panels, lead, grain, grains, count, size;
        int from(int j) const { return j < size ? j * lead : size * lead + (j - size) * grain; }
        int to(int j) const { return std::min(from(j) + (j < size ? lead : grain), panels); }
    };
    Items items(const Record &r) const { // what a linear hands out: some panels for some rows
        const Weight &w = weight(r.w[0]);
        int n = rows(r), groups = r.i[3], columns = w.n / groups / (1 + r.i[2]);
        bool ints = r.i[1] && quantised(w);
        int chunk = static_cast<int>(std::clamp<int64_t>(65536 / w.k * (ints ? 2 : 1) / 12 * 12, 24, 120)), chunks = (n + chunk - 1) / chunk;
        int panels = panels_of(columns), size = plan.team->size, wanted = size * (n > 32 ? 16 : 6); // so many, that no thread waits long
        int grain = std::clamp(panels * chunks * groups / wanted, 1, panels), lead = grain;
        if (n <= 24 && groups == 1) { // few rows wait for the memory: seven eighths lie together
            lead = panels * 7 / 8 / size;
            grain = std::max(1, (panels - size * lead) / (size * 3));
        }
        int grains = lead == grain ? (panels + grain - 1) / grain : size + (panels - size * lead + grain - 1) / grain;
        return {chunk, panels, lead, grain, grains, chunks * groups * grains, size};
    }

    // The weights that this thread will meet first in the next linear, as far as they fit beside what it holds.
    void look_ahead(size_t index, int id) {
        Ahead &ahead = own[static_cast<size_t>(id)].ahead;
        ahead = {};
        if (plan.following[index] == plan.records.size()) return;
        const Record &r = plan.records[plan.following[index]];
        Items s = items(r);
        if (rows(r) > 4 || r.i[3] > 1 || id >= s.count) return;
        int64_t bytes = panel_bytes(weight(r.w[0]).kind, weight(r.w[0]).k) * (1 + r.i[2]);
        ahead.from = weight(r.w[0]).data + s.from(id) * bytes;
        ahead.to = ahead.from + std::min<int64_t>((s.to(id) - s.from(id)) * bytes, 96 << 10);
    }

    void linear(size_t index, const Record &r, int id, const Record *norm) {
        const Weight &w = weight(r.w[0]);
        Own &o = own[static_cast<size_t>(id)];
        int n = rows(r), gated = r.i[2], groups = r.i[3], in = r.i[5], out = r.i[4], columns = w.n / groups / (1 + gated);
        bool ints = r.i[1] && quantised(w);
        for (int row = 0; norm && row < n; row++) {
            float *y = o.normed.data() + row * round_up(w.k, NR);
            plan.kernels->norm(at(norm->a, row), vector(norm->w[0]), vector(norm->w[1]), y, w.k, norm->f[0], norm->i[0] != 0);
            if (id == 0) std::memcpy(at(norm->y, row), y, sizeof(float) * static_cast<size_t>(w.k));
        }
        auto input = [&](int i) -> const float * { return norm ? o.normed.data() + i * round_up(w.k, NR) : at(r.a, i); };
        uint8_t *quants = nullptr;
        if (ints)
            quants = quantise(index, 0, id, n * groups, w.k, layout(w.kind).bits == 8, plan.shared.data(),
                              [&](int i) { return input(i / groups) + (i % groups) * in; });
        Items s = items(r);
        for (int item = id; item < s.count; item = s.size + take(index, 1)) {
            int c = item / (groups * s.grains), g = item / s.grains % groups, p0 = s.from(item % s.grains), p1 = s.to(item % s.grains);
            int first = c * s.chunk, t = std::min(s.chunk, n - first);
            Product p = {&w, t, gated, r.i[0], ints, has(r.b), r.f[0], vector(r.w[1])};
            if (p.bias) p.bias += g * w.n / groups;
            for (int j = 0; j < t; j++) {
                size_t at_j = static_cast<size_t>(j);
                if (ints) o.q[at_j] = qrow(quants, static_cast<int64_t>(first + j) * groups + g, w.k);
                else o.x[at_j] = input(first + j) + g * in;
                o.y[at_j] = at(r.y, first + j) + g * out;
                if (has(r.b)) o.residual[at_j] = at(r.b, first + j) + g * out;
            }
            products(o, p, g * s.panels, p0, p1, columns);
        }
        look_ahead(index, id);
    }

    // ---- experts -----------------------------------------------------------------------------------------------------------------

    void sort_slots(const Record &r) {
        int n = rows(r), experts = r.i[0], top = r.i[1];
        starts.assign(static_cast<size_t>(experts) + 1, 0);
        for (int s = 0; s < n * top; s++) starts[static_cast<size_t>(chosen(r, s)) + 1]++;
        active.clear();
        for (int e = 0; e < experts; e++) {
            if (starts[static_cast<size_t>(e) + 1]) active.push_back(e);
            starts[static_cast<size_t>(e) + 1] += starts[static_cast<size_t>(e)];
        }
        std::vector<int32_t> fill(starts.begin(), starts.end());
        for (int s = 0; s < n * top; s++) slots[static_cast<size_t>(fill[static_cast<size_t>(chosen(r, s))]++)] = s;
    }
    int chosen(const Record &r, int slot) const {
        float e = at(r.b, slot / r.i[1])[slot % r.i[1]];
        return e >= 0 && e < static_cast<float>(r.i[0]) ? static_cast<int>(e) : 0; // NaN scores: any expert, the weight is NaN
    }

    // One side of the experts: `input` and `output` give a slot's rows.
    template <class Input, class Output>
    void expert_side(size_t index, int phase, int id, const Record &r, const Weight &w, int gated, int act, bool ints, uint8_t *quants,
                     const float *bias, Input input, Output output) {
        Own &o = own[static_cast<size_t>(id)];
        int per = w.n / r.i[0], columns = per / (1 + gated), panels = panels_of(columns), grain = std::max(1, panels / (plan.team->size * 2));
        int grains = (panels + grain - 1) / grain, items = static_cast<int>(active.size()) * grains;
        for (int item; (item = take(index, phase)) < items;) {
            int e = active[static_cast<size_t>(item / grains)], p0 = item % grains * grain;
            for (int first = starts[static_cast<size_t>(e)]; first < starts[static_cast<size_t>(e) + 1]; first += ROWS) {
                int t = std::min(ROWS, starts[static_cast<size_t>(e) + 1] - first);
                Product p = {&w, t, gated, act, ints, false, 1.f, bias ? bias + static_cast<int64_t>(e) * per : nullptr};
                for (int j = 0; j < t; j++) {
                    int slot = slots[static_cast<size_t>(first + j)];
                    size_t s = static_cast<size_t>(j);
                    if (ints) o.q[s] = qrow(quants, input(slot).first, w.k);
                    else o.x[s] = input(slot).second;
                    o.y[s] = output(slot);
                }
                products(o, p, e * panels, p0, std::min(p0 + grain, panels), columns);
            }
        }
        plan.team->barrier();
    }

    void experts(size_t index, const Record &r, int id) {
        const Weight &up = weight(r.w[0]), &down = weight(r.w[1]);
        int n = rows(r), top = r.i[1], slot_count = n * top, hidden = down.k, width = down.n / r.i[0];
        bool ints_up = r.i[3] && quantised(up), ints_down = r.i[3] && quantised(down);
        int64_t hidden_stride = round_up(hidden, NR), out_stride = round_up(width, NR);
        float *h = reinterpret_cast<float *>(plan.shared.data()), *out = h + slot_count * hidden_stride;
        uint8_t *quants = reinterpret_cast<uint8_t *>(out + slot_count * out_stride), *quants2 = quants + n * qrow_bytes(up.k);
        if (id == 0) sort_slots(r);
        if (ints_up)
            quants = quantise(index, 0, id, n, up.k, layout(up.kind).bits == 8, quants, [&](int i) { return at(r.a, i); });
        plan.team->barrier();
        expert_side(index, 1, id, r, up, r.i[4], r.i[2], ints_up, quants, vector(r.w[2]),
                    [&](int s) { return std::pair<int64_t, const float *>(s / top, at(r.a, s / top)); },
                    [&](int s) { return h + s * hidden_stride; });
        if (ints_down)
            quants2 = quantise(index, 2, id, slot_count, hidden, layout(down.kind).bits == 8, quants2, [&](int s) { return h + s * hidden_stride; });
        expert_side(index, 3, id, r, down, 0, NONE, ints_down, quants2, vector(r.w[3]),
                    [&](int s) { return std::pair<int64_t, const float *>(s, h + s * hidden_stride); },
                    [&](int s) { return out + s * out_stride; });
        for (int i; (i = take(index, 4)) < n;) {
            float *y = at(r.y, i);
            const float *weights = at(r.b, i) + top, *residual = has(r.c) ? at(r.c, i) : nullptr;
            for (int j = 0; j < width; j++) {
                float s = 0;
                for (int e = 0; e < top; e++) s += weights[e] * out[(i * top + e) * out_stride + j];
                y[j] = residual ? residual[j] + s : s;
            }
        }
    }

    void route(const Record &r, int row) const {
        int n = r.i[0], top = r.i[1], groups = r.i[3], keep = r.i[4];
        const float *x = at(r.a, row), *correction = vector(r.w[0]);
        std::vector<float> score(x, x + n), choice;
        if (r.i[2] == 0) soften(score);
        if (r.i[2] == 1) for (float &s : score) s = 1.f / (1.f + std::exp(-s));
        choice = score;
        for (int e = 0; correction && e < n; e++) choice[static_cast<size_t>(e)] += correction[e];
        if (groups > 1) limit_groups(choice, groups, keep, r.i[6]);
        float *y = at(r.y, row), total = 0;
        std::vector<float> kept;
        for (int t = 0; t < top; t++) {
            size_t best = static_cast<size_t>(std::max_element(choice.begin(), choice.end()) - choice.begin());
            choice[best] = EMPTY;
            y[t] = static_cast<float>(best);
            kept.push_back(score[best]);
        }
        if (r.i[2] == 2) soften(kept);
        for (float s : kept) total += s;
        for (int t = 0; t < top; t++) y[top + t] = kept[static_cast<size_t>(t)] / (r.i[5] ? total + r.f[1] : 1.f) * r.f[0];
    }
    static void soften(std::vector<float> &s) {
        float top = *std::max_element(s.begin(), s.end()), sum = 0;
        for (float &v : s) sum += v = std::exp(v - top);
        for (float &v : s) v /= sum;
    }
    // Only the best `keep` groups stay eligible; a group counts by its best score, or by the sum of its best two.
    static void limit_groups(std::vector<float> &choice, int groups, int keep, int best_two) {
        size_t per = choice.size() / static_cast<size_t>(groups);
        std::vector<std::pair<float, int>> worth;
        for (int g = 0; g < groups; g++) {
            std::vector<float> in(choice.begin() + static_cast<int64_t>(per) * g, choice.begin() + static_cast<int64_t>(per) * (g + 1));
            std::partial_sort(in.begin(), in.begin() + (best_two && per > 1 ? 2 : 1), in.end(), std::greater<float>());
            worth.push_back({-(in[0] + (best_two && per > 1 ? in[1] : 0.f)), g});
        }
        std::sort(worth.begin(), worth.end());
        for (size_t g = static_cast<size_t>(keep); g < worth.size(); g++)
            std::fill_n(choice.begin() + static_cast<int64_t>(per) * worth[g].second, per, EMPTY);
    }

    // ---- attention ---------------------------------------------------------------------------------------------------------------

    struct Mask { int lo, hi; };
    Mask mask(const Record &r, int row) const {
        const Rows &set = batch.rows[r.rows];
        int p = set.position[row], left = r.i[2], right = r.i[3];
        int hi = p + right + 1;
        if (right != 0) {
            int length = batch.space[plan.caches[static_cast<size_t>(r.i[0])].space].length[set.sequence[row]];
            hi = right < 0 ? length : std::min(hi, length);
        }
        return {left < 0 ? 0 : std::max(0, p - left), hi};
    }

    struct Queries { // the queries of one unit and what they see
        const float *q[NQ], *bias[NQ];
        float *y[NQ];
        int32_t lo[NQ], hi[NQ], bias_at[NQ];
        int n = 0, first = INT32_MAX, last = 0;
    };

    void gather_queries(const Record &r, Group g, int kv_head, int sub, Queries &u) const {
        const Cache &c = plan.caches[static_cast<size_t>(r.i[0])];
        int per = r.i[1] / c.kv_heads, from = sub * NQ, to = std::min(per, from + NQ);
        for (int row = g.row; row < g.row + g.n; row++) {
            Mask m = mask(r, row);
            for (int h = kv_head * per + from; h < kv_head * per + to; h++, u.n++) {
                u.q[u.n] = at(r.a, row) + h * c.head;
                u.y[u.n] = at(r.y, row) + h * c.vhead;
                u.lo[u.n] = m.lo;
                u.hi[u.n] = m.hi;
                if (r.w[0] < 0) continue;
                u.bias[u.n] = vector(r.w[0]) + static_cast<int64_t>(h) * weight(r.w[0]).k;
                u.bias_at[u.n] = r.i[4] - batch.rows[r.rows].position[row];
            }
            if (m.lo < m.hi) {
                u.first = std::min(u.first, m.lo);
                u.last = std::max(u.last, m.hi);
            }
        }
    }

    void attend_chunk(Own &o, const Record &r, Group g, const Queries &u, int kv_head, int chunk, float *m, float *l, float *values) {
        const Cache &c = plan.caches[static_cast<size_t>(r.i[0])];
        const Space &space = batch.space[c.space];
        AttendUnit unit = {&c, space.table + static_cast<int64_t>(batch.rows[r.rows].sequence[g.row]) * space.stride, u.q, u.lo, u.hi,
                           r.w[0] < 0 ? nullptr : u.bias, u.bias_at, r.w[0] < 0 ? 0 : weight(r.w[0]).k, u.n, kv_head,
                           std::max(u.first, chunk * CHUNK), std::min(u.last, (chunk + 1) * CHUNK), r.f[0], r.f[1],
                           m, l, values, o.scores.data(), o.tile.data()};
        plan.kernels->attend(unit);
    }

    static void write_out(float *y, const float *o, float l, int n) { // a query that sees nothing yields zeros
        for (int j = 0; j < n; j++) y[j] = l == 0.f ? 0.f : o[j] / l;
    }

    struct Shape { int per, subs, group, chunks; bool split; };
    Shape shape(const Record &r) const {
        const Cache &c = plan.caches[static_cast<size_t>(r.i[0])];
        int per = r.i[1] / c.kv_heads, n = rows(r), most = 0;
        for (int row = 0; row < n; row++) most = std::max(most, mask(r, row).hi);
        Shape s = {per, (per + NQ - 1) / NQ, std::max(1, NQ / per), (most + CHUNK - 1) / CHUNK, false};
        s.split = s.chunks > 1 && n * c.kv_heads * s.subs < 4 * plan.team->size;
        if (s.split) s.group = 1;
        return s;
    }
    int64_t part_bytes(const Record &r) const {
        Shape s = shape(r);
        int64_t width = plan.caches[static_cast<size_t>(r.i[0])].width();
        return s.split ? static_cast<int64_t>(rows(r)) * r.i[1] * s.chunks * (width + 2) * 4 : 0;
    }

    void attend(size_t index, const Record &r, int id) {
        const Cache &c = plan.caches[static_cast<size_t>(r.i[0])];
        Own &o = own[static_cast<size_t>(id)];
        Shape s = shape(r);
        int n = rows(r), width = c.width();
        std::vector<Group> list;
        const int32_t *sequence = batch.rows[r.rows].sequence;
        for (int row = 0; row < n; row++) {
            if (!list.empty() && list.back().n < s.group && sequence[row] == sequence[list.back().row]) list.back().n++;
            else list.push_back({row, 1});
        }
        int heads = c.kv_heads * s.subs, units = static_cast<int>(list.size()) * heads, splits = s.split ? s.chunks : 1;
        float *m = o.parts.data(), *l = m + NQ, *rm = l + NQ, *rl = rm + NQ, *values = o.o.data(), *run = values + NQ * width;
        float *parts = reinterpret_cast<float *>(plan.shared.data());
        auto part = [&](int64_t row, int64_t head, int chunk) { return parts + ((row * r.i[1] + head) * s.chunks + chunk) * (width + 2); };
        for (int item; (item = take(index, 0)) < units * splits;) {
            Group g = list[static_cast<size_t>(item / splits / heads)];
            int kv_head = item / splits % heads / s.subs, sub = item / splits % s.subs;
            Queries u;
            gather_queries(r, g, kv_head, sub, u);
            for (int i = 0; i < u.n; i++) { rm[i] = EMPTY; rl[i] = 0; }
            for (int chunk = 0; chunk < s.chunks; chunk++) {
                if ((s.split && chunk != item % splits) || chunk * CHUNK >= u.last || (chunk + 1) * CHUNK <= u.first) continue;
                attend_chunk(o, r, g, u, kv_head, chunk, m, l, values);
                for (int i = 0; i < u.n; i++) {
                    if (!s.split) {
                        plan.kernels->merge(rm + i, rl + i, run + i * width, m[i], l[i], values + i * width, width);
                        continue;
                    }
                    float *p = part(g.row, kv_head * s.per + sub * NQ + i, chunk);
                    p[0] = m[i];
                    p[1] = l[i];
                    std::memcpy(p + 2, values + i * width, sizeof(float) * static_cast<size_t>(width));
                }
            }
            for (int i = 0; !s.split && i < u.n; i++) write_out(u.y[i], run + i * width, rl[i], c.vhead);
        }
        if (!s.split) return;
        plan.team->barrier();
        for (int item; (item = take(index, 1)) < n * r.i[1];) {
            int row = item / r.i[1], head = item % r.i[1];
            Mask seen = mask(r, row);
            rm[0] = EMPTY;
            rl[0] = 0;
            for (int chunk = seen.lo / CHUNK; chunk * CHUNK < seen.hi; chunk++) {
                const float *p = part(row, head, chunk);
                plan.kernels->merge(rm, rl, run, p[0], p[1], p + 2, width);
            }
            write_out(at(r.y, row) + head * c.vhead, run, rl[0], c.vhead);
        }
    }

    void append(const Record &r, int first, int last) const { // heads outside: one head's page stays in the nearest cache
        const Cache &c = plan.caches[static_cast<size_t>(r.i[0])];
        const Rows &set = batch.rows[r.rows];
        const Space &space = batch.space[c.space];
        std::vector<float> joined;
        for (int h = 0; h < c.kv_heads; h++)
            for (int row = first; row < last; row++) {
                int p = set.position[row], page = space.table[static_cast<int64_t>(set.sequence[row]) * space.stride + p / PAGE];
                const float *k = at(r.a, row), *v = has(r.b) ? at(r.b, row) : nullptr;
                if (c.latent && v) {
                    joined.assign(k, k + c.vhead);
                    joined.insert(joined.end(), v, v + (c.head - c.vhead));
                    k = joined.data();
                }
                plan.kernels->store(c, page, p % PAGE, h, k + h * c.head, c.latent ? nullptr : v + h * c.vhead);
            }
    }

    // ---- rows --------------------------------------------------------------------------------------------------------------------

    static const int32_t *indices(const Record &r, const Batch &b) {
        return r.i[0] == 0 ? b.ids : r.i[0] == 1 ? b.rows[r.rows].position : b.segments;
    }
    void embed(const Record &r, int row) const {
        const Weight &w = weight(r.w[0]);
        int64_t i = indices(r, batch)[row] + r.i[1];
        float *y = at(r.y, row);
        if (w.kind != VECTOR) {
            plan.kernels->column(w.kind, w.data + i / NR * panel_bytes(w.kind, w.k), static_cast<int>(i % NR), w.k, r.f[0], r.i[2] != 0, y);
            return;
        }
        const float *x = reinterpret_cast<const float *>(w.data) + i * w.k;
        for (int j = 0; j < w.k; j++) y[j] = (r.i[2] ? y[j] : 0.f) + x[j] * r.f[0];
    }
    void angles(const Record &r, int row) const {
        const Weight &w = weight(r.w[0]);
        float *y = at(r.y, row), p = static_cast<float>(batch.rows[r.rows].position[row]);
        for (int j = 0; j < w.k; j++) {
            y[j] = std::cos(p * vector(r.w[0])[j]) * r.f[0];
            y[w.k + j] = std::sin(p * vector(r.w[0])[j]) * r.f[0];
        }
    }
    void rotary(const Record &r, int row) const {
        int half = r.i[2] / 2, step = r.i[4] ? 2 : 1, apart = r.i[4] ? 1 : half;
        const float *c = at(r.b, row), *s = c + half;
        for (int h = 0; h < r.i[0]; h++) {
            float *x = at(r.a, row) + h * r.i[1] + r.i[3];
            for (int j = 0; j < half; j++) {
                float a = x[j * step], b = x[j * step + apart];
                x[j * step] = a * c[j] - b * s[j];
                x[j * step + apart] = b * c[j] + a * s[j];
            }
        }
    }
    void element(const Record &r, int row) const {
        for (int c = 0; c < r.i[2]; c++) {
            const float *a = at(r.a, row) + c * r.i[3], *b = r.w[0] >= 0 ? vector(r.w[0]) + c * r.i[4] : has(r.b) ? at(r.b, row) + c * r.i[4] : nullptr;
            float *y = at(r.y, row) + c * r.i[5], alpha = r.f[0];
            int n = r.i[1];
            switch (r.i[0]) {
            case ADD: for (int j = 0; j < n; j++) y[j] = a[j] + alpha * b[j]; break;
            case MULTIPLY: for (int j = 0; j < n; j++) y[j] = alpha * a[j] * b[j]; break;
            case SOFTCAP:
                for (int j = 0; j < n; j++) y[j] = a[j] / alpha;
                plan.kernels->activate(TANH, y, n);
                for (int j = 0; j < n; j++) y[j] *= alpha;
                break;
            default: // COPY, GATE
                std::memmove(y, a, sizeof(float) * static_cast<size_t>(n));
                plan.kernels->activate(r.i[6], y, n);
                for (int j = 0; j < n; j++) y[j] *= r.i[0] == GATE ? b[j] : alpha;
            }
        }
    }
    void pool(const Record &r, int sequence) const {
        const int32_t *starts = batch.rows[r.i[0]].starts;
        int from = starts[sequence], to = starts[sequence + 1], n = r.i[2];
        float *y = at(r.y, sequence);
        for (int j = 0; j < n; j++) {
            float s = from < to ? at(r.a, r.i[1] == 3 ? to - 1 : from)[j] : 0.f;
            for (int row = from + 1; row < to && r.i[1] < 2; row++) s = r.i[1] ? std::max(s, at(r.a, row)[j]) : s + at(r.a, row)[j];
            y[j] = r.i[1] == 0 && to > from ? s / static_cast<float>(to - from) : s;
        }
    }
    void unfold(const Record &r, int row) const { // position counts output frames of the sequence
        const Rows &set = batch.rows[r.rows];
        const int32_t *starts = batch.rows[r.i[4]].starts + set.sequence[row];
        for (int j = 0; j < r.i[0]; j++) {
            int from = starts[0] + set.position[row] * r.i[1] - r.i[2] + j;
            float *y = at(r.y, row) + j * r.i[3];
            bool inside = from >= starts[0] && from < starts[1];
            if (inside) std::memcpy(y, at(r.a, from), sizeof(float) * static_cast<size_t>(r.i[3]));
            else std::fill_n(y, r.i[3], 0.f);
        }
    }
    void norm(const Record &r, int row) const {
        for (int c = 0; c < r.i[1]; c++)
            plan.kernels->norm(at(r.a, row) + c * r.i[2], vector(r.w[0]), vector(r.w[1]), at(r.y, row) + c * r.i[2], r.i[2], r.f[0], r.i[0] != 0);
    }

    void by_row(const Record &r, int row) const {
        switch (r.op) {
        case EMBED: embed(r, row); break;
        case ANGLES: angles(r, row); break;
        case NORM: norm(r, row); break;
        case ROTARY: rotary(r, row); break;
        case ELEMENT: element(r, row); break;
        case ROUTE: route(r, row); break;
        case GATHER: std::memcpy(at(r.y, row), at(r.a, batch.select[row]), sizeof(float) * static_cast<size_t>(r.i[0])); break;
        case POOL: pool(r, row); break;
        case UNFOLD: unfold(r, row); break;
        default: break;
        }
    }

    void by_rows(size_t from, size_t to) {
        const Record *r = &plan.records[from];
        int n = rows(*r), grain = n > 4 * PAGE ? PAGE : 1; // the keys of one page share their cache lines
        for (int first; (first = take(from, 0, grain)) < n;)
            for (size_t i = from; i < to; i++) {
                int last = std::min(n, first + grain);
                if (plan.records[i].op == APPEND) append(plan.records[i], first, last);
                else for (int row = first; row < last; row++) by_row(plan.records[i], row);
            }
    }

    void work(int id) {
        auto then = std::chrono::steady_clock::now();
        const Record *norm = nullptr; // left to the linear behind it
        for (size_t i = 0, end; i < plan.records.size(); i = end) {
            const Record &r = plan.records[i];
            end = seconds ? i + 1 : plan.past[i];
            if (!seconds && end == i + 1 && plan.fused[i] && rows(r) <= 2) {
                norm = &r;
                continue;
            }
            if (r.op == LINEAR) linear(i, r, id, norm);
            else if (r.op == EXPERTS) experts(i, r, id);
            else if (r.op == ATTEND) attend(i, r, id);
            else by_rows(i, end);
            norm = nullptr;
            plan.team->barrier(&own[static_cast<size_t>(id)].ahead);
            if (!seconds || id) continue;
            auto now = std::chrono::steady_clock::now();
            seconds[i] += std::chrono::duration<double>(now - then).count();
            then = now;
        }
    }
};

float *Plan::buffer(int i, int64_t *stride) const {
    *stride = round_up(widths[static_cast<size_t>(i)], NR);
    return storage[static_cast<size_t>(i)].data<float>();
}

std::string Plan::step(const Batch &batch, double *seconds) {
    std::string wrong = check_batch(batch);
    if (!wrong.empty()) return wrong;
    std::lock_guard<std::mutex> lock(team->busy);
    Run run = {*this, batch, seconds, own, {}, {}, {}};
    int64_t parts = 0;
    for (const Record &r : records) {
        if (r.op == ATTEND) parts = std::max(parts, run.part_bytes(r));
        if (r.op != EXPERTS) continue;
        run.slots.resize(std::max(run.slots.size(), static_cast<size_t>(run.rows(r) * r.i[1])));
        run.starts.resize(std::max(run.starts.size(), static_cast<size_t>(r.i[0]) + 1));
    }
    if (static_cast<int64_t>(shared.size) < parts) shared = Zeroed(static_cast<size_t>(parts));
    for (auto &n : next) n.store(0, std::memory_order_relaxed);
    bool ran = team->run([](void *arg, int id) { static_cast<Run *>(arg)->work(id); }, &run);
    return ran ? "" : "this process was forked after the plan's threads were started";
}

} // namespace transept
