// Everything that a plan or a batch could get wrong is refused here, before a kernel touches memory.
#include "plan.h"
#include <algorithm>

namespace transept {

namespace {

const char *const NAMES[OPS] = {"embed", "angles", "linear", "norm", "rotary", "append", "attend", "element", "route", "experts", "gather", "pool", "unfold"};

std::string text(const char *what, int64_t found, int64_t expected) {
    return std::string(what) + " is " + std::to_string(found) + ", expected " + std::to_string(expected);
}

// Gathers the first complaint about one record.
struct Checker {
    const Plan &plan;
    const Record &r;
    std::string wrong;

    void need(bool holds, const std::string &what) { if (!holds && wrong.empty()) wrong = what; }
    void equal(const char *what, int64_t found, int64_t expected) { if (found != expected) need(false, text(what, found, expected)); }
    void view(const char *what, View v, int64_t extent) {
        bool known = v.buffer >= 0 && v.buffer < static_cast<int>(plan.widths.size());
        need(known, std::string(what) + " names buffer " + std::to_string(v.buffer) + " of " + std::to_string(plan.widths.size()));
        if (!known) return;
        int width = plan.widths[static_cast<size_t>(v.buffer)];
        need(v.at >= 0 && extent > 0 && v.at + extent <= width,
             std::string(what) + " needs columns " + std::to_string(v.at) + ".." + std::to_string(v.at + extent) + " of a buffer of " + std::to_string(width));
    }
    void range(const char *what, int64_t v, int64_t lo, int64_t hi) {
        need(v >= lo && v <= hi, std::string(what) + " is " + std::to_string(v) + ", expected " + std::to_string(lo) + ".." + std::to_string(hi));
    }
    const Weight *weight(int slot, bool vector) {
        int w = r.w[slot];
        bool known = w >= 0 && w < static_cast<int>(plan.weights.size());
        need(known, "weight " + std::to_string(w) + " of " + std::to_string(plan.weights.size()) + " does not exist");
        if (!known) return nullptr;
        const Weight &found = plan.weights[static_cast<size_t>(w)];
        if (vector != (found.kind == VECTOR)) {
            need(false, vector ? "a packed weight stands where a float vector is expected" : "a float vector stands where a packed weight is expected");
            return nullptr;
        }
        return &found;
    }
    void vector(int slot, int64_t n) { // an optional vector
        if (r.w[slot] < 0) return;
        if (const Weight *w = weight(slot, true)) equal("length of a vector", static_cast<int64_t>(w->n) * w->k, n);
    }
    const Cache *cache() {
        bool known = r.i[0] >= 0 && r.i[0] < static_cast<int>(plan.caches.size());
        need(known, "cache " + std::to_string(r.i[0]) + " of " + std::to_string(plan.caches.size()) + " does not exist");
        return known ? &plan.caches[static_cast<size_t>(r.i[0])] : nullptr;
    }

    void embed() {
        range("embed source", r.i[0], 0, 2);
        need(r.i[0] == 1 || r.rows == 0, "only positions can be embedded outside the token rows");
        if (r.w[0] >= 0 && r.w[0] < static_cast<int>(plan.weights.size())) view("embed output", r.y, plan.weights[static_cast<size_t>(r.w[0])].k);
        else need(false, "embed has no table");
    }
    void linear() {
        const Weight *w = weight(0, false);
        range("linear groups", r.i[3], 1, 1 << 20);
        range("linear activation", r.i[0], 0, TANH);
        range("linear gate", r.i[2], 0, 1);
        if (!w || !wrong.empty()) return;
        int64_t g = r.i[3], per = w->n / g, out = per / (1 + r.i[2]);
        need(w->n % g == 0 && per % (1 + r.i[2]) == 0, "linear outputs do not divide into its groups");
        need((g == 1 && !r.i[2]) || per % (NR * (1 + r.i[2])) == 0, "grouped and gated outputs must be multiples of 16");
        need(g == 1 || (r.i[4] >= out && r.i[5] >= 0), "group strides overlap");
        int64_t in_extent = (g - 1) * r.i[5] + w->k, out_extent = (g - 1) * r.i[4] + out;
        view("linear input", r.a, in_extent);
        view("linear output", r.y, out_extent);
        if (r.b.buffer >= 0) view("linear residual", r.b, out_extent);
        need(r.a.buffer != r.y.buffer || r.a.at + in_extent <= r.y.at || r.y.at + out_extent <= r.a.at, "linear output overlaps its input");
        vector(1, w->n);
    }
    void rotary() {
        range("rotary width", r.i[2], 2, r.i[1] - r.i[3]);
        range("rotary heads", r.i[0], 1, 1 << 16);
        need(r.i[2] % 2 == 0 && r.i[3] >= 0, "rotary width must be even and inside the head");
        view("rotary input", r.a, static_cast<int64_t>(r.i[0]) * r.i[1]);
        view("rotary angles", r.b, r.i[2]);
    }
    void append() {
        const Cache *c = cache();
        if (!c) return;
        bool joined = c->latent && r.b.buffer >= 0;
        view("append keys", r.a, joined ? c->vhead : static_cast<int64_t>(c->kv_heads) * c->head);
        if (joined) view("append rotated key", r.b, c->head - c->vhead);
        else if (!c->latent) view("append values", r.b, static_cast<int64_t>(c->kv_heads) * c->vhead);
    }
    void attend() {
        const Cache *c = cache();
        if (!c) return;
        range("attend heads", r.i[1], 1, 1 << 16);
        need(r.i[1] % c->kv_heads == 0, "heads do not divide into the cache's kv heads");
        need(r.i[2] >= -1 && r.i[3] >= -1, "attend reach must be -1 (no limit) or more");
        view("attend queries", r.a, static_cast<int64_t>(r.i[1]) * c->head);
        view("attend output", r.y, static_cast<int64_t>(r.i[1]) * c->vhead);
        if (r.w[0] < 0) return;
        if (const Weight *w = weight(0, true)) equal("rows of the attention bias", w->n, r.i[1]);
    }
    void element() {
        range("element kind", r.i[0], 0, SOFTCAP);
        range("element width", r.i[1], 1, 1 << 24);
        range("element count", r.i[2], 1, 1 << 20);
        range("element activation", r.i[6], 0, TANH);
        need(r.i[3] >= 0 && r.i[4] >= 0 && r.i[5] >= (r.i[2] > 1 ? r.i[1] : 0), "element strides overlap");
        int64_t last = r.i[2] - 1;
        view("element input", r.a, last * r.i[3] + r.i[1]);
        view("element output", r.y, last * r.i[5] + r.i[1]);
        if (r.i[0] == COPY || r.i[0] == SOFTCAP) return;
        if (r.w[0] < 0) view("element second input", r.b, last * r.i[4] + r.i[1]);
        else if (const Weight *w = weight(0, true)) need(last * r.i[4] + r.i[1] <= static_cast<int64_t>(w->n) * w->k, "element vector is too short");
        need(r.i[0] != GATE || r.w[0] >= 0 || r.b.buffer != r.y.buffer || r.b.at != r.y.at, "gate may not overwrite its second input");
    }
    void route() {
        range("experts", r.i[0], 1, 1 << 16);
        range("experts per token", r.i[1], 1, r.i[0]);
        range("router score", r.i[2], 0, 2);
        range("router groups", r.i[3], 1, r.i[0]);
        range("router groups kept", r.i[4], 1, r.i[3]);
        need(wrong.size() || r.i[0] % r.i[3] == 0, "experts do not divide into the router's groups");
        need(wrong.size() || r.i[1] <= r.i[0] / r.i[3] * r.i[4], "the kept groups hold fewer experts than are chosen");
        view("router scores", r.a, r.i[0]);
        view("router output", r.y, 2 * r.i[1]);
        vector(0, r.i[0]);
    }
    void experts() {
        const Weight *up = weight(0, false), *down = weight(1, false);
        range("experts", r.i[0], 1, 1 << 16);
        range("experts per token", r.i[1], 1, 1 << 10);
        range("expert activation", r.i[2], 0, TANH);
        range("expert gate", r.i[4], 0, 1);
        if (!up || !down || !wrong.empty()) return;
        need(up->n % (r.i[0] * NR * (1 + r.i[4])) == 0 && down->n % (r.i[0] * NR) == 0, "each expert's widths must be multiples of 16");
        equal("expert hidden width", down->k, up->n / r.i[0] / (1 + r.i[4]));
        view("experts input", r.a, up->k);
        view("experts routing", r.b, 2 * r.i[1]);
        view("experts output", r.y, down->n / r.i[0]);
        if (r.c.buffer >= 0) view("experts residual", r.c, down->n / r.i[0]);
        vector(2, up->n);
        vector(3, down->n);
    }
    void norm() {
        range("norm count", r.i[1], 1, 1 << 16);
        range("norm width", r.i[2], 1, 1 << 24);
        view("norm input", r.a, static_cast<int64_t>(r.i[1]) * r.i[2]);
        view("norm output", r.y, static_cast<int64_t>(r.i[1]) * r.i[2]);
        vector(0, r.i[2]);
        vector(1, r.i[2]);
    }
    void other() {
        if (r.op == ANGLES) {
            if (const Weight *w = weight(0, true)) view("angles output", r.y, 2 * static_cast<int64_t>(w->k) * w->n);
        } else if (r.op == GATHER) {
            equal("rows of gather", r.rows, 1);
            view("gather input", r.a, r.i[0]);
            view("gather output", r.y, r.i[0]);
        } else if (r.op == POOL) {
            equal("rows of pool", r.rows, 2);
            range("rows pooled", r.i[0], 0, 3);
            range("pool kind", r.i[1], 0, 3);
            view("pool input", r.a, r.i[2]);
            view("pool output", r.y, r.i[2]);
        } else {
            range("unfold kernel", r.i[0], 1, 1 << 12);
            range("unfold stride", r.i[1], 1, 1 << 12);
            range("unfold channels", r.i[3], 1, 1 << 20);
            range("rows unfolded", r.i[4], 0, 3);
            need(r.i[2] >= 0, "unfold padding is negative");
            view("unfold input", r.a, r.i[3]);
            view("unfold output", r.y, static_cast<int64_t>(r.i[0]) * r.i[3]);
        }
    }
};

} // namespace

std::string Plan::check(const Record &r) const {
    Checker c = {*this, r, ""};
    c.range("op", r.op, 0, OPS - 1);
    c.range("row set", r.rows, 0, 3);
    if (!c.wrong.empty()) return c.wrong;
    switch (r.op) {
    case EMBED: c.embed(); break;
    case LINEAR: c.linear(); break;
    case NORM: c.norm(); break;
    case ROTARY: c.rotary(); break;
    case APPEND: c.append(); break;
    case ATTEND: c.attend(); break;
    case ELEMENT: c.element(); break;
    case ROUTE: c.route(); break;
    case EXPERTS: c.experts(); break;
    default: c.other();
    }
    return c.wrong;
}

std::string Plan::build() {
    if (max_rows < 1 || max_rows > 1 << 16) return text("the number of rows", max_rows, 512);
    int64_t floats = 0;
    for (int32_t w : widths) {
        if (w < 1 || w > 1 << 24) return text("the width of a buffer", w, 1);
        floats += round_up(w, NR) * max_rows;
    }
    if (floats > int64_t{1} << 36) return "the buffers would take more than 256 GiB";
    for (size_t i = 0; i < records.size(); i++) {
        std::string wrong = check(records[i]);
        if (wrong.empty()) continue;
        const char *name = records[i].op >= 0 && records[i].op < OPS ? NAMES[records[i].op] : "unknown";
        return "record " + std::to_string(i) + " (" + name + "): " + wrong;
    }
    allocate();
    return "";
}

// Which records need no barrier between them, because a row of each depends on the same row of the others only.
void Plan::join() {
    size_t n = records.size();
    past.assign(n, 0);
    following.assign(n, n);
    fused.assign(n, false);
    auto alone = [](const Record &r) { return r.op == EMBED || r.op == ANGLES || r.op == NORM || r.op == ROTARY || r.op == APPEND || r.op == ELEMENT || r.op == ROUTE; };
    for (size_t i = n; i-- > 0;) {
        const Record &r = records[i];
        bool joined = i + 1 < n && alone(r) && alone(records[i + 1]) && records[i + 1].rows == r.rows;
        past[i] = joined ? past[i + 1] : i + 1;
        if (i + 1 < n) following[i] = records[i + 1].op == LINEAR ? i + 1 : following[i + 1];
        if (i + 1 == n || r.op != NORM || records[i + 1].op != LINEAR) continue;
        const Record &l = records[i + 1];
        fused[i] = r.i[1] == 1 && l.rows == r.rows && l.i[3] == 1 && l.a.buffer == r.y.buffer && l.a.at == r.y.at && r.a.buffer != r.y.buffer;
    }
}

void Plan::allocate() {
    join();
    for (int32_t w : widths) storage.emplace_back(sizeof(float) * static_cast<size_t>(round_up(w, NR) * max_rows));
    int64_t k = 1, common = 0, values = 0, tile = 0;
    for (const Record &r : records) {
        if (r.op == LINEAR) {
            const Weight &w = weights[static_cast<size_t>(r.w[0])];
            k = std::max<int64_t>(k, w.k);
            if (r.i[1] && quantised(w)) common = std::max(common, max_rows * r.i[3] * qrow_bytes(w.k));
        } else if (r.op == EXPERTS) {
            const Weight &up = weights[static_cast<size_t>(r.w[0])], &down = weights[static_cast<size_t>(r.w[1])];
            k = std::max<int64_t>({k, up.k, down.k});
            int64_t slot = 4 * (round_up(down.k, NR) + round_up(down.n / r.i[0], NR)) + qrow_bytes(down.k);
            common = std::max(common, max_rows * (qrow_bytes(up.k) + r.i[1] * slot));
        } else if (r.op == ATTEND) {
            const Cache &c = caches[static_cast<size_t>(r.i[0])];
            values = std::max<int64_t>(values, c.width());
            tile = std::max<int64_t>(tile, PAGE * std::max(round_up(c.head, NR), static_cast<int64_t>(c.width())));
        }
    }
    shared = Zeroed(static_cast<size_t>(common));
    own.resize(static_cast<size_t>(team->size));
    for (Own &o : own) {
        o.sums.resize(2 * ROWS * NR);
        o.x.resize(ROWS);
        o.y.resize(ROWS);
        o.residual.resize(ROWS);
        o.q.resize(ROWS);
        o.quants.resize(static_cast<size_t>(2 * qrow_bytes(static_cast<int>(k))));
        o.scores.resize(tile ? NQ * CHUNK : 0);
        o.tile.resize(static_cast<size_t>(tile));
        o.o.resize(static_cast<size_t>(2 * NQ * values));
        o.parts.resize(4 * NQ);
        o.normed.resize(static_cast<size_t>(2 * round_up(k, NR)));
    }
    next = std::vector<std::atomic<int>>(records.size() * COUNTERS);
}

// Every page that a row writes or may read must exist.
std::string Plan::check_pages(const Batch &b, const Record &r) const {
    const Cache &c = caches[static_cast<size_t>(r.i[0])];
    const Rows &set = b.rows[r.rows];
    const Space &space = b.space[c.space];
    if (set.n && (!set.sequence || !set.position)) return "rows that use a cache need their sequences and positions";
    if (set.n && !space.table) return "the batch has no page table for cache space " + std::to_string(c.space);
    bool lengths = r.op == ATTEND && r.i[3] != 0;
    if (lengths && set.n && !space.length) return "the batch has no lengths for cache space " + std::to_string(c.space);
    std::vector<int32_t> first(static_cast<size_t>(b.sequences), INT32_MAX), last(static_cast<size_t>(b.sequences), 0);
    for (int row = 0; row < set.n; row++) {
        size_t s = static_cast<size_t>(set.sequence[row]);
        int64_t p = set.position[row], lo = p, hi = p + 1, length = lengths ? space.length[s] : 0;
        if (r.op == ATTEND) {
            hi = r.i[3] == 0 ? p + 1 : r.i[3] < 0 ? length : std::min(p + r.i[3] + 1, length);
            lo = r.i[2] < 0 ? 0 : std::max<int64_t>(0, p - r.i[2]);
        }
        if (hi > static_cast<int64_t>(space.stride) * PAGE)
            return "row " + std::to_string(row) + " reaches key " + std::to_string(hi - 1) + ", its page table ends at " + std::to_string(space.stride * PAGE);
        if (lo >= hi) continue;
        first[s] = std::min(first[s], static_cast<int32_t>(lo / PAGE));
        last[s] = std::max(last[s], static_cast<int32_t>((hi + PAGE - 1) / PAGE));
    }
    for (int s = 0; s < b.sequences; s++)
        for (int p = first[static_cast<size_t>(s)]; p < last[static_cast<size_t>(s)]; p++) {
            int page = space.table[static_cast<int64_t>(s) * space.stride + p];
            if (page < 0 || page >= c.pages)
                return "sequence " + std::to_string(s) + " has page " + std::to_string(page) + " at place " + std::to_string(p) + ", the cache has " + std::to_string(c.pages);
        }
    return "";
}

std::string Plan::check_batch(const Batch &b) const {
    if (b.sequences < 0) return text("the number of sequences", b.sequences, 1);
    for (int s = 0; s < 4; s++) {
        const Rows &set = b.rows[s];
        if (set.n < 0 || set.n > max_rows) return "a step of " + std::to_string(set.n) + " rows does not fit the plan's " + std::to_string(max_rows);
        for (int i = 0; i < set.n && set.sequence; i++)
            if (set.sequence[i] < 0 || set.sequence[i] >= b.sequences) return "row " + std::to_string(i) + " names sequence " + std::to_string(set.sequence[i]) + " of " + std::to_string(b.sequences);
        for (int i = 0; i < set.n && set.position; i++)
            if (set.position[i] < 0) return "row " + std::to_string(i) + " has a negative position";
        for (int i = 0; i < b.sequences && set.starts; i++)
            if (set.starts[0] != 0 || set.starts[i + 1] < set.starts[i] || set.starts[b.sequences] > set.n) return "the starts of the sequences do not rise within the rows";
    }
    if (b.rows[2].n > b.sequences) return text("the number of sequence rows", b.rows[2].n, b.sequences);
    for (int i = 0; i < b.rows[1].n; i++)
        if (!b.select || b.select[i] < 0 || b.select[i] >= b.rows[0].n) return "selected row " + std::to_string(i) + " is not among the step's rows";
    const Record *seen = nullptr;
    for (const Record &r : records) {
        const Rows &set = b.rows[r.rows];
        if (r.op == EMBED) {
            const int32_t *index = r.i[0] == 0 ? b.ids : r.i[0] == 1 ? set.position : b.segments;
            int n = weights[static_cast<size_t>(r.w[0])].n;
            if (set.n && !index) return "the batch lacks the numbers that an embedding looks up";
            for (int i = 0; i < set.n; i++)
                if (index[i] < 0 || static_cast<int64_t>(index[i]) + r.i[1] < 0 || static_cast<int64_t>(index[i]) + r.i[1] >= n)
                    return "row " + std::to_string(i) + " looks up " + std::to_string(static_cast<int64_t>(index[i]) + r.i[1]) + " in a table of " + std::to_string(n);
        } else if (r.op == ANGLES && set.n && !set.position) return "the batch lacks positions";
        else if (r.op == POOL && set.n && !b.rows[r.i[0]].starts) return "pooling needs the starts of the sequences";
        else if (r.op == UNFOLD && set.n && (!b.rows[r.i[4]].starts || !set.sequence || !set.position)) return "unfolding needs the starts, sequences and positions of its rows";
        if (r.op != APPEND && r.op != ATTEND) continue;
        const Cache &c = caches[static_cast<size_t>(r.i[0])];
        if (seen && seen->op == r.op && seen->rows == r.rows && (r.op == APPEND || (seen->i[2] == r.i[2] && seen->i[3] == r.i[3]))) {
            const Cache &d = caches[static_cast<size_t>(seen->i[0])];
            if (c.space == d.space && c.pages == d.pages) continue; // the same question was answered for another layer
        }
        std::string wrong = check_pages(b, r);
        if (!wrong.empty()) return wrong;
        seen = &r;
    }
    return "";
}

} // namespace transept
