// The C interface. Every function that can fail returns null or non-zero and leaves a sentence in transept_error().
#include "plan.h"
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

using namespace transept;

namespace transept {
// What the processor and the system can run, the best first: the builtins ask the system too whether it keeps the wide registers.
static int runnable(const Kernels **found) {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"), avx512 = avx2;
#if !defined(TRANSEPT_EMULATED)
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    if (avx512 && &kernels_avx512) found[n++] = &kernels_avx512;
    if (avx2 && &kernels_avx2) found[n++] = &kernels_avx2;
#elif defined(__aarch64__) && defined(__linux__)
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && &kernels_neon) found[n++] = &kernels_neon;
#elif defined(__aarch64__)
    if (&kernels_neon) found[n++] = &kernels_neon;
#endif
    if (&kernels_plain) found[n++] = &kernels_plain;
    return n;
}

const Kernels *kernels_named(const char *name) {
    const Kernels *found[3] = {};
    int n = runnable(found);
    if (!name || !*name) name = std::getenv("TRANSEPT_ISA");
    if (!name || !*name) return found[0];
    for (int i = 0; i < n; i++)
        if (!std::strcmp(found[i]->name, name)) return found[i];
    return nullptr;
}
} // namespace transept

namespace {
thread_local std::string message;
int fail(const std::string &why) { message = why; return 1; }
bool known(int kind) { return layout(kind).bits >= 0; }
bool sized(int kind, int64_t n, int64_t k) {
    return known(kind) && n > 0 && k > 0 && n < (int64_t{1} << 31) && k < (int64_t{1} << 24) && raw_row_bytes(kind, static_cast<int>(k)) > 0;
}
} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int transept_abi() { return 2; }
EXPORT const char *transept_error() { return message.c_str(); }
EXPORT const char *transept_isa(const char *wanted) {
    const Kernels *k = kernels_named(wanted);
    return k ? k->name : "";
}
EXPORT int64_t transept_raw_bytes(int kind, int64_t n, int64_t k) { return sized(kind, n, k) ? n * raw_row_bytes(kind, static_cast<int>(k)) : -1; }
EXPORT int64_t transept_panel_bytes(int kind, int64_t k) { return sized(kind, 1, k) ? panel_bytes(kind, static_cast<int>(k)) : -1; }

EXPORT int transept_pack(int kind, int64_t n, int64_t k, const uint8_t *raw, int64_t raw_bytes, uint8_t *out, int64_t out_bytes, int64_t stride) {
    if (!sized(kind, n, k)) return fail("this kind and shape of weight cannot be packed");
    int64_t panel = panel_bytes(kind, static_cast<int>(k)), panels = panels_of(static_cast<int>(n));
    if (raw_bytes != transept_raw_bytes(kind, n, k)) return fail("the weight's bytes do not match its shape");
    if (stride < panel || out_bytes < (panels - 1) * stride + panel) return fail("the packed weight does not fit its memory");
    pack(kind, static_cast<int>(n), static_cast<int>(k), raw, out, stride);
    return 0;
}

EXPORT int64_t transept_cache_page_bytes(const Cache *c) {
    bool sound = c->kv_heads > 0 && c->kv_heads < 1 << 16 && c->head > 0 && c->head < 1 << 16 && c->vhead > 0 && c->vhead < 1 << 16 && c->kind >= 0 &&
                 c->kind <= CACHE_Q8 && c->space >= 0 && c->space < 2 && (!c->latent || (c->kv_heads == 1 && c->vhead <= c->head));
    return sound ? c->page_bytes() : -1;
}

EXPORT Team *transept_team_new(int threads) {
    if (threads < 1 || threads > 1024) { fail("the number of threads must be 1..1024"); return nullptr; }
    try { return new Team(threads); }
    catch (const std::exception &e) { fail(std::string("the threads could not be started: ") + e.what()); return nullptr; }
}
EXPORT void transept_team_free(Team *t) { delete t; }

EXPORT Plan *transept_plan_new(const Record *records, int record_count, const Weight *weights, const int64_t *weight_bytes, int weight_count,
                               const Cache *caches, const int64_t *cache_bytes, int cache_count, const int32_t *widths, int buffer_count,
                               int max_rows, Team *team, const char *isa) {
    try {
        auto plan = std::make_unique<Plan>();
        plan->kernels = kernels_named(isa);
        if (!plan->kernels) { fail(std::string("this machine has no kernels named ") + (*isa ? isa : std::getenv("TRANSEPT_ISA"))); return nullptr; }
        for (int i = 0; i < weight_count; i++) {
            const Weight &w = weights[i];
            int64_t need = w.kind == VECTOR ? static_cast<int64_t>(w.n) * w.k * 4
                           : sized(w.kind, w.n, w.k) ? panels_of(w.n) * panel_bytes(w.kind, w.k) : -1;
            if (w.n <= 0 || w.k <= 0 || need <= 0 || weight_bytes[i] != need) {
                fail("weight " + std::to_string(i) + " has " + std::to_string(weight_bytes[i]) + " bytes, expected " + std::to_string(need));
                return nullptr;
            }
        }
        for (int i = 0; i < cache_count; i++) {
            int64_t page = transept_cache_page_bytes(caches + i);
            if (page <= 0 || caches[i].pages < 0 || cache_bytes[i] < page * caches[i].pages) { fail("cache " + std::to_string(i) + " does not fit its memory"); return nullptr; }
        }
        plan->records.assign(records, records + record_count);
        plan->weights.assign(weights, weights + weight_count);
        plan->caches.assign(caches, caches + cache_count);
        plan->widths.assign(widths, widths + buffer_count);
        plan->max_rows = max_rows;
        plan->team = team;
        std::string wrong = plan->build();
        if (wrong.empty()) return plan.release();
        fail(wrong);
    } catch (const std::exception &e) { fail(e.what()); }
    return nullptr;
}
EXPORT void transept_plan_free(Plan *p) { delete p; }

EXPORT int transept_step(Plan *p, const Batch *b, double *seconds) {
    try {
        std::string wrong = p->step(*b, seconds);
        return wrong.empty() ? 0 : fail(wrong);
    } catch (const std::exception &e) { return fail(e.what()); }
}

EXPORT float *transept_buffer(Plan *p, int i, int64_t *stride) {
    if (i < 0 || i >= static_cast<int>(p->widths.size())) { fail("this plan has no such buffer"); return nullptr; }
    return p->buffer(i, stride);
}

EXPORT double transept_exp_sum(const float *x, int n, float most) {
    const Kernels *k = kernels_named(nullptr);
    return k ? k->exp_sum(x, n, most) : -1;
}

// Sums memory with every thread, for the measured floor of benchmarks: the checksum keeps the reads alive.
EXPORT uint64_t transept_read(Team *team, const uint64_t *data, int64_t words) {
    struct Job { const uint64_t *data; int64_t words; std::atomic<uint64_t> sum; int size; } job = {data, words, {0}, team->size};
    team->run([](void *arg, int id) {
        Job &j = *static_cast<Job *>(arg);
        int64_t from = j.words / j.size * id, to = id == j.size - 1 ? j.words : from + j.words / j.size;
        uint64_t s[8] = {};
        for (int64_t i = from; i + 8 <= to; i += 8) {
            __builtin_prefetch(j.data + i + 256);
            for (int k = 0; k < 8; k++) s[k] += j.data[i + k];
        }
        for (uint64_t v : s) j.sum += v;
    }, &job);
    return job.sum;
}
