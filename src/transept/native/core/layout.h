// How weights, caches and quantised rows lie in memory. Nothing here depends on the instruction set,
// so that a packed file made on one little-endian machine serves on every other.
#pragma once
#include <cstddef>
#include <cstdint>

namespace transept {

constexpr int NR = 16;     // output columns of one panel
constexpr int KB = 32;     // elements of the reduction in one block
constexpr int PAGE = 16;   // tokens of one cache page
constexpr int CHUNK = 64;  // keys of one attention chunk; partial results are merged in chunk order
constexpr int BESIDE = 4;  // panels of floats that one row meets together
constexpr int NQ = 32;     // queries that attend together

// The numbers of the GGUF format. VECTOR is a plain float table that no panel layout touches.
enum Kind : int32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30, VECTOR = 100 };

// One panel = 16 output columns. Its blocks follow each other along the reduction. A block of a quantised kind is
//   scales (see pack.cpp) | bit planes | quants
// The quants are eight groups of four k; a group is 64 bytes: column c, element j of the group at byte 4 c + j.
// Four-bit kinds keep groups 2v (low nibble) and 2v + 1 (high nibble) in one 64-byte vector v. The fifth bit of group g is
// bit g of a 64-byte plane; bits five and six of group g are bits 2 (g % 4) of plane g / 4.
// K kinds put 16 half-precision d (and dmin) per 256 elements in a head before eight such blocks.
struct Layout {
    int bits;   // 4, 5, 6, 8; 0 for floats
    int zero;   // subtracted from the stored unsigned quant; -1 where the kind has a minimum instead
    int blocks; // blocks under one head
    int head, scales, planes, quants;
    constexpr int body() const { return scales + planes + quants; }
};

constexpr Layout layout(int kind) {
    switch (kind) {
    case F32: return {0, 0, 1, 0, 0, 0, KB * NR * 4};
    case F16: case BF16: return {0, 0, 1, 0, 0, 0, KB * NR * 2};
    case Q4_0: return {4, 8, 1, 0, 32, 0, 256};
    case Q4_1: return {4, -1, 1, 0, 64, 0, 256};
    case Q5_0: return {5, 16, 1, 0, 32, 64, 256};
    case Q5_1: return {5, -1, 1, 0, 64, 64, 256};
    case Q8_0: return {8, 128, 1, 0, 32, 0, 512};
    case Q4_K: return {4, -1, 8, 64, 32, 0, 256};
    case Q5_K: return {5, -1, 8, 64, 32, 64, 256};
    case Q6_K: return {6, 32, 8, 32, 32, 128, 256};
    default: return {-1, 0, 1, 0, 0, 0, 0};
    }
}

constexpr int blocks_of(int k) { return (k + KB - 1) / KB; }
constexpr int panels_of(int n) { return (n + NR - 1) / NR; }
constexpr int64_t panel_bytes(int kind, int k) {
    Layout l = layout(kind);
    return static_cast<int64_t>(blocks_of(k) / l.blocks) * (l.head + l.blocks * l.body());
}

// A row of activations in int8: one scale and two sums (of 16) per block of 32.
struct QRow {
    int8_t *q;
    int16_t *wide; // the same numbers, those at even places of a block before the odd ones; filled only for 8-bit weights
    float *scale;
    int32_t *sum;    // of each half of a block
    float *weighted; // a block's sum times its scale
};

enum CacheKind : int32_t { CACHE_F32 = 0, CACHE_F16 = 1, CACHE_Q8 = 2 };

// One layer's keys and values. Page, then kv head: keys transposed [head][16 tokens], values [16 tokens][vhead up to a multiple of 16].
// Latent caches keep one copy [16 tokens][head up to a multiple of 16] whose first vhead columns are the values.
// Q8 puts 16 key scales and 16 value scales (float) before them.
struct Cache {
    int32_t kv_heads, head, vhead, kind, latent, space;
    int32_t pages;
    uint8_t *data;
    int width() const { return (((latent ? head : vhead) + 15) / 16) * 16; }
    int element() const { return kind == CACHE_F32 ? 4 : kind == CACHE_F16 ? 2 : 1; }
    int64_t scale_bytes() const { return kind == CACHE_Q8 ? 2 * PAGE * 4 : 0; }
    int64_t key_bytes() const { return latent ? 0 : static_cast<int64_t>(PAGE) * head * element(); }
    int64_t head_bytes() const { return scale_bytes() + key_bytes() + static_cast<int64_t>(PAGE) * width() * element(); }
    int64_t page_bytes() const { return (kv_heads * head_bytes() + 63) / 64 * 64; }
    uint8_t *block(int page, int kv_head) const { return data + page * page_bytes() + kv_head * head_bytes(); }
};

enum Act : int32_t { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4, QUICK_GELU = 5, RELU2 = 6, SIGMOID = 7, TANH = 8 };

// What becomes of a panel's sums: y = residual + alpha * act(sum + bias), or the gated form act(first) * second.
struct Finish {
    float *const *y;
    const float *const *residual; // or null
    const float *bias;            // or null; starts at this panel's first column
    const float *bias2;           // the second panel's, gated form
    int act, gated, column, columns; // the panel's first column, and how many it has
    float alpha;
};

struct AttendUnit {
    const Cache *cache;
    const int32_t *table;    // page numbers of this sequence
    const float *const *q;   // nq queries of `head` floats
    const int32_t *lo, *hi;  // query i may attend to keys lo <= j < hi
    const float *const *bias; // null, or per query a table indexed by clamp(offset + j) in [0, biases)
    const int32_t *bias_at;
    int biases, nq, kv_head, begin, end; // keys of this chunk that some query sees
    float scale, cap;
    float *m, *l, *o;        // results: maximum, sum, weighted values [nq][width]
    float *scores, *tile;    // scratch: [nq][CHUNK], and one page widened to float
};

// One table per instruction set.
struct Kernels {
    const char *name;
    void (*panel_float)(int kind, const uint8_t *panel, int k, const float *const *x, int t, float *sums);
    void (*panels_one)(int kind, const uint8_t *panel, int64_t stride, int count, int k, const float *x, float *sums); // floats, count <= BESIDE
    void (*panel_int)(int kind, const uint8_t *panel, int k, const QRow *x, int t, float *sums);
    void (*quantise)(const float *x, int k, bool wide, QRow out);
    void (*column)(int kind, const uint8_t *panel, int column, int k, float scale, bool add, float *out);
    void (*finish)(float *sums, int t, const Finish &f);
    void (*norm)(const float *x, const float *w, const float *b, float *y, int n, float eps, bool layer);
    double (*exp_sum)(const float *x, int n, float most);
    void (*activate)(int act, float *x, int n);
    void (*attend)(const AttendUnit &u);
    void (*merge)(float *m, float *l, float *o, float pm, float pl, const float *po, int n);
    void (*store)(const Cache &c, int page, int slot, int kv_head, const float *k, const float *v);
};

#define MAYBE extern const Kernels __attribute__((weak)) // a build may leave any of them out
MAYBE kernels_plain;
#if defined(__x86_64__)
MAYBE kernels_avx512, kernels_avx2;
#elif defined(__aarch64__)
MAYBE kernels_neon;
#endif

float half_to_float(uint16_t h);
} // namespace transept
