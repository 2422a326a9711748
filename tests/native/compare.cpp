// Every kernel of every instruction set that runs here against the plain ones, then whole steps: `compare ROUNDS SEED`. Needs no Python,
// so that it serves under an emulator of another processor and under the sanitisers. Prints a count per instruction set; 1 on a difference.
//
// Exact rounds use small whole numbers and powers of two, so that no order of additions rounds: all bits must agree. The other rounds
// use any numbers and a tolerance; there a row must have the same bits alone as among others.
#include "plan.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace transept;

namespace {

uint64_t state = 1;
long compared = 0;
const char *isa = "";

uint32_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
}
int upto(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n + 1)); }
int between(int a, int b) { return a + upto(b - a); }
float number(bool exact) { return exact ? static_cast<float>(between(-8, 8)) : static_cast<float>(between(-1000000, 1000000)) * 3e-6f; }
std::vector<float> numbers(int n, bool exact) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float &x : v) x = number(exact);
    return v;
}

void fail(const char *what, int i, double found, double expected) {
    std::printf("%s %s: number %d is %.9g, expected %.9g\n", isa, what, i, found, expected);
    std::exit(1);
}
void same(const char *what, const float *a, const float *b, int n, double tolerance) { // 0: to the bit
    double top = 0;
    for (int i = 0; i < n; i++) if (std::isfinite(b[i])) top = std::fmax(top, std::fabs(b[i]));
    for (int i = 0; i < n; i++, compared++) {
        bool equal = tolerance ? std::fabs(a[i] - b[i]) <= tolerance * (1 + top) || a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])) : !std::memcmp(a + i, b + i, 4);
        if (!equal) fail(what, i, a[i], b[i]);
    }
}

constexpr int KINDS[] = {F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K};

void halves(uint8_t *p, bool exact) { // sixteen half-precision scales
    for (int c = 0; c < NR; c++) {
        uint16_t h = static_cast<uint16_t>(exact ? 11 << 10 : (bits() & 0x83ff) | between(5, 10) << 10);
        std::memcpy(p + 2 * c, &h, 2);
    }
}

uint16_t half_of(uint32_t word) { // of a small whole number
    return static_cast<uint16_t>(word << 1 ? (word >> 16 & 0x8000) | (((word & 0x7fffffff) >> 13) - (112 << 10)) : 0);
}

std::vector<uint8_t> panel_of(int kind, int k, bool exact) {
    Layout l = layout(kind);
    std::vector<uint8_t> p(static_cast<size_t>(panel_bytes(kind, k)));
    for (uint8_t &b : p) b = static_cast<uint8_t>(bits());
    uint8_t *at = p.data();
    for (int b = 0; b < blocks_of(k); b++) {
        if (l.bits == 0)
            for (int i = 0; i < KB * NR; i++) {
                float v = number(exact);
                uint32_t word;
                std::memcpy(&word, &v, 4);
                uint16_t half = static_cast<uint16_t>(kind == BF16 ? word >> 16 : exact ? half_of(word) : (bits() & 0x83ff) | 14 << 10);
                std::memcpy(at + i * (kind == F32 ? 4 : 2), kind == F32 ? static_cast<void *>(&v) : &half, kind == F32 ? 4 : 2);
            }
        if (l.bits && l.blocks == 1) for (int s = 0; s < l.scales; s += 32) halves(at + s, exact);
        if (l.blocks > 1) {
            if (b % l.blocks == 0) {
                for (int s = 0; s < l.head; s += 32) halves(at + s, exact);
                at += l.head;
            }
            for (int s = 0; s < 32; s++) at[s] = static_cast<uint8_t>(exact ? 1 << upto(3) : kind == Q6_K ? bits() : bits() & 63);
        }
        at += l.body();
    }
    return p;
}

struct Ints { // rows of int8 activations
    std::vector<int8_t> q;
    std::vector<int16_t> wide;
    std::vector<float> scale;
    std::vector<int32_t> sum;
    std::vector<float> weighted;
    Ints(int t, int k)
        : q(static_cast<size_t>(t * blocks_of(k) * KB)), wide(q.size()), scale(q.size() / KB), sum(q.size() / 16), weighted(q.size() / KB) {}
    QRow row(int i, int k) {
        size_t at = static_cast<size_t>(i * blocks_of(k) * KB);
        return {q.data() + at, wide.data() + at, scale.data() + at / KB, sum.data() + at / 16, weighted.data() + at / KB};
    }
};

void products(const Kernels &fast, const Kernels &plain, bool exact) {
    int kind = KINDS[upto(10)], k = layout(kind).blocks > 1 ? 256 : layout(kind).bits ? KB * between(1, exact ? 8 : 20) : between(1, 200), t = between(1, 45);
    const auto panels = panel_of(kind, k, exact);
    std::vector<float> x = numbers(t * k, exact), a(static_cast<size_t>(t * NR)), b(a.size()), alone(NR);
    std::vector<const float *> rows;
    for (int i = 0; i < t; i++) rows.push_back(x.data() + i * k);
    int one = upto(t - 1);
    fast.panel_float(kind, panels.data(), k, rows.data(), t, a.data());
    plain.panel_float(kind, panels.data(), k, rows.data(), t, b.data());
    same("panel_float", a.data(), b.data(), t * NR, exact ? 0 : 1e-5);
    fast.panel_float(kind, panels.data(), k, rows.data() + one, 1, alone.data());
    same("panel_float alone", alone.data(), a.data() + one * NR, NR, 0);
    int column = upto(NR - 1);
    std::vector<float> out = numbers(k, exact), ours = out;
    fast.column(kind, panels.data(), column, k, 2.f, exact, ours.data());
    plain.column(kind, panels.data(), column, k, 2.f, exact, out.data());
    same("column", ours.data(), out.data(), k, exact ? 0 : 1e-6);
    if (!layout(kind).bits) {
        std::vector<uint8_t> beside;
        int count = between(1, BESIDE);
        for (int p = 0; p < count; p++) beside.insert(beside.end(), panels.begin(), panels.end());
        std::vector<float> sums(static_cast<size_t>(count * NR));
        fast.panels_one(kind, beside.data(), static_cast<int64_t>(panels.size()), count, k, rows[static_cast<size_t>(one)], sums.data());
        for (int p = 0; p < count; p++) same("panels_one", sums.data() + p * NR, a.data() + one * NR, NR, 0);
        return;
    }
    Ints ints(t, k);
    std::vector<QRow> q;
    for (int i = 0; i < t; i++) {
        q.push_back(ints.row(i, k));
        plain.quantise(rows[static_cast<size_t>(i)], k, true, q.back());
        for (int block = 0; exact && block < blocks_of(k); block++) { // the extremes too, by a scale that is a power of two
            QRow r = q.back();
            r.scale[block] = 0.25f;
            for (int j = 0; j < KB; j++) r.q[KB * block + j] = static_cast<int8_t>(upto(3) ? between(-128, 127) : -128);
            r.sum[2 * block] = r.sum[2 * block + 1] = 0;
            for (int j = 0; j < KB; j++) r.sum[2 * block + j / 16] += r.q[KB * block + j];
            r.weighted[block] = r.scale[block] * static_cast<float>(r.sum[2 * block] + r.sum[2 * block + 1]);
            for (int j = 0; j < KB; j++) r.wide[KB * block + j % 2 * (KB / 2) + j / 2] = r.q[KB * block + j];
        }
    }
    fast.panel_int(kind, panels.data(), k, q.data(), t, a.data());
    plain.panel_int(kind, panels.data(), k, q.data(), t, b.data());
    same("panel_int", a.data(), b.data(), t * NR, exact ? 0 : 1e-5);
    fast.panel_int(kind, panels.data(), k, q.data() + one, 1, alone.data());
    same("panel_int alone", alone.data(), a.data() + one * NR, NR, 0);
}

void quantise(const Kernels &fast, const Kernels &plain) {
    int k = between(1, 200), off = 0;
    Ints a(1, k), b(1, k);
    std::vector<float> x = numbers(k, false);
    if (upto(3) == 0) x[static_cast<size_t>(upto(k - 1))] = upto(1) ? NAN : INFINITY;
    QRow qa = a.row(0, k), qb = b.row(0, k);
    fast.quantise(x.data(), k, true, qa);
    plain.quantise(x.data(), k, true, qb);
    same("quantise: scale", qa.scale, qb.scale, blocks_of(k), 1e-30);
    for (int j = 0; j < blocks_of(k) * KB; j++, compared++) {
        if (std::abs(qa.q[j] - qb.q[j]) > 1) fail("quantise", j, qa.q[j], qb.q[j]);
        off += qa.q[j] != qb.q[j];
        if (qa.wide[j / KB * KB + j % 2 * (KB / 2) + j % KB / 2] != qa.q[j]) fail("quantise: wide", j, 0, qa.q[j]);
        int sum = 0;
        for (int i = j / 16 * 16; i < j / 16 * 16 + 16; i++) sum += qa.q[i];
        if (sum != qa.sum[j / 16]) fail("quantise: sum", j, qa.sum[j / 16], sum);
    }
    for (int i = 0; i < blocks_of(k); i++) {
        float product = qa.scale[i] * static_cast<float>(qa.sum[2 * i] + qa.sum[2 * i + 1]);
        same("quantise: weighted", qa.weighted + i, &product, 1, 1e-30);
    }
    if (off > 2) fail("quantise: steps apart", 0, off, 2);
}

void rest(const Kernels &fast, const Kernels &plain) {
    int n = between(1, 70), t = between(1, 5);
    std::vector<float> x = numbers(n, false), w = numbers(n, false), b = numbers(n, false), y(x.size()), z(x.size());
    bool layer = upto(1), weighted = upto(1), biased = upto(1);
    for (const Kernels *k : {&fast, &plain}) k->norm(x.data(), weighted ? w.data() : nullptr, biased ? b.data() : nullptr, (k == &fast ? y : z).data(), n, 1e-5f, layer);
    same("norm", y.data(), z.data(), n, n > 4 ? 1e-5 : 1e-3);
    int act = upto(TANH);
    for (float &v : x) v *= 5;
    y = z = x;
    fast.activate(act, y.data(), n);
    plain.activate(act, z.data(), n);
    same("activate", y.data(), z.data(), n, 1e-6);
    Finish f = {nullptr, nullptr, nullptr, nullptr, act, upto(1), 0, between(1, NR), upto(1) ? 1.f : 0.5f};
    std::vector<float> sums = numbers(2 * t * NR, false), bias = numbers(2 * NR, false), residual = numbers(t * NR, false), out(static_cast<size_t>(t * NR)), expected = out;
    if (upto(1)) f.bias = bias.data() + NR - f.columns; // nothing may be read or written behind the last column
    if (f.bias && f.gated) f.bias2 = bias.data() + 2 * NR - f.columns;
    bool added = upto(1);
    for (const Kernels *k : {&fast, &plain}) {
        std::vector<float *> to;
        std::vector<const float *> from;
        for (int r = 0; r < t; r++) {
            to.push_back((k == &fast ? out : expected).data() + r * NR + NR - f.columns);
            from.push_back(residual.data() + r * NR + NR - f.columns);
        }
        f.y = to.data();
        f.residual = added ? from.data() : nullptr;
        std::vector<float> copy = sums;
        k->finish(copy.data(), t, f);
    }
    same("finish", out.data(), expected.data(), t * NR, 2e-6);
}

void attention(const Kernels &fast, const Kernels &plain) {
    bool latent = upto(2) == 0, biased = upto(1);
    int head = between(1, 40), vhead = latent ? between(1, head) : between(1, 40), kv = latent ? 1 : between(1, 3), pages = CHUNK / PAGE + 1;
    Cache c = {kv, head, vhead, upto(CACHE_Q8), latent, 0, pages, nullptr}, d = c;
    size_t bytes = static_cast<size_t>(c.page_bytes() * pages);
    std::vector<uint8_t> first(bytes, 255), second(bytes, 255); // NaN where nothing is written
    c.data = first.data();
    d.data = second.data();
    int begin = upto(20), end = between(begin + 1, CHUNK), nq = between(1, NQ), kv_head = upto(kv - 1), width = c.width();
    for (int j = 0; j < end; j++) {
        std::vector<float> k = numbers(kv * head, false), v = numbers(kv * vhead, false);
        for (int h = 0; h < kv; h++) {
            fast.store(c, pages - 1 - j / PAGE, j % PAGE, h, k.data() + h * head, latent ? nullptr : v.data() + h * vhead);
            plain.store(d, pages - 1 - j / PAGE, j % PAGE, h, k.data() + h * head, latent ? nullptr : v.data() + h * vhead);
        }
    }
    if (std::memcmp(first.data(), second.data(), bytes)) fail("store", 0, 0, 0);
    std::vector<int32_t> table, lo, hi, bias_at;
    for (int p = 0; p < pages; p++) table.push_back(pages - 1 - p);
    std::vector<float> q = numbers(nq * head, false), bias = numbers(40, false), scores(NQ * CHUNK), tile(static_cast<size_t>(PAGE * (round_up(head, NR) + width)));
    std::vector<const float *> queries, biases;
    for (int i = 0; i < nq; i++) {
        queries.push_back(q.data() + i * head);
        lo.push_back(between(begin, end));
        hi.push_back(between(begin, end));
        biases.push_back(bias.data());
        bias_at.push_back(upto(40) - 30);
    }
    std::vector<float> result[2];
    int each = width + 2;
    for (const Kernels *k : {&fast, &plain}) {
        std::vector<float> m(static_cast<size_t>(nq)), l = m, o(static_cast<size_t>(nq * width)), &into = result[k == &plain];
        AttendUnit u = {k == &fast ? &c : &d, table.data(), queries.data(), lo.data(), hi.data(), biased ? biases.data() : nullptr, bias_at.data(), 40, nq, kv_head,
                        begin, end, 0.3f, biased ? 5.f : 0.f, m.data(), l.data(), o.data(), scores.data(), tile.data()};
        k->attend(u);
        for (int i = 1; i < nq; i++) k->merge(m.data(), l.data(), o.data(), m[static_cast<size_t>(i)], l[static_cast<size_t>(i)], o.data() + i * width, width);
        for (int i = 0; i < nq; i++) {
            into.push_back(m[static_cast<size_t>(i)]);
            into.push_back(l[static_cast<size_t>(i)]);
            bool some = l[static_cast<size_t>(i)] > 0;
            for (int j = 0; j < width; j++) into.push_back(some && j < vhead ? o[static_cast<size_t>(i * width + j)] / l[static_cast<size_t>(i)] : 0.f);
        }
    }
    same("attend and merge", result[0].data(), result[1].data(), nq * each, 1e-3);
}

// A layer of a decoder by hand: table, norm, q k v, rotation, cache, attention, output, experts, logits; two sequences, `each` tokens a step.
struct House {
    Plan plan;
    std::vector<std::vector<uint8_t>> data;
    int weight(int kind, int n, int k) {
        std::vector<uint8_t> all;
        if (kind == VECTOR) {
            std::vector<float> v = numbers(n * k, false);
            all.assign(reinterpret_cast<uint8_t *>(v.data()), reinterpret_cast<uint8_t *>(v.data() + v.size()));
        } else
            for (int p = 0; p < panels_of(n); p++) {
                auto panel = panel_of(kind, k, false);
                all.insert(all.end(), panel.begin(), panel.end());
            }
        data.push_back(all);
        plan.weights.push_back({kind, n, k, data.back().data()});
        return static_cast<int>(plan.weights.size()) - 1;
    }
    void add(int op, View a, View b, View y, std::initializer_list<int> w, std::initializer_list<int> i, std::initializer_list<float> f, int rows = 0, View c = {-1, 0}) {
        Record r = {op, rows, a, b, c, y, {-1, -1, -1, -1}, {}, {}};
        std::copy(w.begin(), w.end(), r.w);
        std::copy(i.begin(), i.end(), r.i);
        std::copy(f.begin(), f.end(), r.f);
        plan.records.push_back(r);
    }
};

std::vector<float> steps(const Kernels *kernels, int threads, int each) {
    constexpr int D = 64, HEADS = 4, E = 16, FFN = 32, VOCAB = 50, TOTAL = 80;
    state = 77; // the same numbers for every instruction set, number of threads and cut
    House h;
    Team team(threads);
    h.plan.team = &team;
    h.plan.kernels = kernels;
    h.plan.max_rows = 2 * TOTAL;
    h.plan.widths = {D, D, (HEADS + 2) * E, D, 8, 4, D, VOCAB, E};
    View none = {-1, 0}, x = {0, 0}, normed = {1, 0}, qkv = {2, 0}, heads = {3, 0}, scores = {4, 0}, routing = {5, 0}, last = {6, 0}, logits = {7, 0}, angles = {8, 0};
    int table = h.weight(Q8_0, VOCAB, D), gain = h.weight(VECTOR, 1, D), frequencies = h.weight(VECTOR, 1, E / 2);
    std::vector<uint8_t> keys;
    h.plan.caches = {{1, E, E, CACHE_F16, 0, 0, 2 * TOTAL / PAGE, nullptr}};
    keys.assign(static_cast<size_t>(h.plan.caches[0].page_bytes() * h.plan.caches[0].pages), 255);
    h.plan.caches[0].data = keys.data();
    h.add(EMBED, none, none, x, {table}, {0, 0, 0}, {0.05f});
    h.add(ANGLES, none, none, angles, {frequencies}, {}, {1.f});
    h.add(NORM, x, none, normed, {gain}, {0, 1, D}, {1e-5f});
    h.add(LINEAR, normed, none, qkv, {h.weight(Q4_1, (HEADS + 2) * E, D)}, {NONE, 1, 0, 1, 0, 0}, {0.1f});
    h.add(ROTARY, qkv, angles, qkv, {}, {HEADS + 1, E, E, 0, 0}, {});
    h.add(APPEND, {2, HEADS * E}, {2, (HEADS + 1) * E}, {2, HEADS * E}, {}, {0}, {});
    h.add(ATTEND, qkv, none, heads, {}, {0, HEADS, -1, 0, 0}, {0.25f, 0.f});
    h.add(LINEAR, heads, x, x, {h.weight(Q5_0, D, D)}, {NONE, 1, 0, 1, 0, 0}, {0.1f});
    h.add(NORM, x, none, normed, {gain}, {1, 1, D}, {1e-5f});
    h.add(LINEAR, normed, none, scores, {h.weight(F32, 8, D)}, {NONE, 0, 0, 1, 0, 0}, {1.f});
    h.add(ROUTE, scores, none, routing, {}, {8, 2, 0, 1, 1, 1, 0}, {1.f, 1e-9f});
    h.add(EXPERTS, normed, routing, x, {h.weight(Q4_0, 8 * 2 * FFN, D), h.weight(BF16, 8 * D, FFN)}, {8, 2, SILU, 1, 1}, {}, 0, x);
    h.add(GATHER, x, none, last, {}, {D}, {}, 1);
    h.add(LINEAR, last, none, logits, {table}, {NONE, 1, 0, 1, 0, 0}, {1.f}, 1);
    std::string wrong = h.plan.build();
    if (!wrong.empty()) { std::printf("%s\n", wrong.c_str()); std::exit(1); }
    std::vector<float> out;
    std::vector<int32_t> tables;
    for (int p = 0; p < 2 * TOTAL / PAGE; p++) tables.push_back(p * 3 % (2 * TOTAL / PAGE));
    for (int at = 0; at < TOTAL; at += each) {
        int n = std::min(each, TOTAL - at);
        std::vector<int32_t> ids, sequence, position, starts = {0, n, 2 * n}, select = {n - 1, 2 * n - 1};
        for (int s = 0; s < 2; s++)
            for (int i = 0; i < n; i++) {
                ids.push_back((at + i) * (7 + s) % VOCAB);
                sequence.push_back(s);
                position.push_back(at + i);
            }
        Batch b = {};
        std::vector<int32_t> chosen_at = {at + n - 1, at + n - 1}, chosen_of = {0, 1};
        b.rows[0] = {2 * n, sequence.data(), position.data(), starts.data()};
        b.rows[1] = {2, chosen_of.data(), chosen_at.data(), nullptr};
        b.ids = ids.data();
        b.select = select.data();
        b.space[0] = {tables.data(), TOTAL / PAGE, nullptr};
        b.sequences = 2;
        wrong = h.plan.step(b, nullptr);
        if (!wrong.empty()) { std::printf("%s\n", wrong.c_str()); std::exit(1); }
        ids[0] = VOCAB;
        if (h.plan.step(b, nullptr).empty()) fail("a token outside the table", 0, VOCAB, VOCAB - 1);
        if (at + n < TOTAL) continue;
        int64_t stride;
        const float *y = h.plan.buffer(7, &stride);
        for (int s = 0; s < 2; s++) out.insert(out.end(), y + s * stride, y + s * stride + VOCAB);
    }
    return out;
}

} // namespace

int main(int count, char **arguments) {
    int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
    const Kernels *plain = nullptr; // or, in a build that leaves the plain ones out, the next best to compare with
    for (const char *name : {"plain", "neon", "avx2"}) if (!plain) plain = kernels_named(name);
    std::vector<float> reference = steps(plain, 1, 7);
    for (const char *name : {"avx512", "avx2", "neon", "plain"}) {
        const Kernels *found = kernels_named(name);
        if (!found) continue;
        const Kernels fast = *found; // at an address of its own, even where it is the plain one
        isa = name;
        compared = 0;
        state = count > 2 ? static_cast<uint64_t>(std::atoll(arguments[2])) * 2 + 1 : 1;
        for (int i = 0; i < rounds; i++) {
            for (int j = 0; j < 4; j++) products(fast, *plain, j < 2);
            quantise(fast, *plain);
            rest(fast, *plain);
            attention(fast, *plain);
        }
        std::vector<float> once = steps(&fast, 1, 80);
        same("steps", once.data(), reference.data(), static_cast<int>(once.size()), 2e-2);
        for (int each : {1, 13}) {
            std::vector<float> cut = steps(&fast, each == 1 ? 2 : 3, each);
            same("steps in other cuts and threads", cut.data(), once.data(), static_cast<int>(cut.size()), 0);
        }
        std::printf("%s %ld numbers\n", name, compared);
    }
    return 0;
}
