// The kernels, once for every instruction set (included by kernels_*.cpp).
//
// Determinism. Each output number is one chain of multiply-adds (or exact integer sums, then multiply-adds per block) over the
// reduction in rising order, in its own vector lane. How many rows share a loaded tile, how columns fall to threads, which pages hold
// the keys: none of it enters the chain. So a row's bits are the same alone, among others, and for every number of threads.
#include "simd.h"

namespace transept::TRANSEPT_ISA {

// ---- blocks of quantised weights -------------------------------------------------------------------------------------------------

template <int K> INLINE vb group(const uint8_t *body, int g) {
    constexpr Layout l = layout(K);
    const uint8_t *planes = body + l.scales, *quants = planes + l.planes;
    if constexpr (l.bits == 8) return load_bytes(quants + 64 * g);
    vb w = load_bytes(quants + 64 * (g / 2));
    EACH w.v[i] = (g % 2 ? (nb)((nh)w.v[i] >> 4) : w.v[i]) & 15;
    if constexpr (l.bits == 5) {
        vb h = load_bytes(planes);
        EACH w.v[i] |= (nb)(g < 4 ? (nh)h.v[i] << (4 - g) : (nh)h.v[i] >> (g - 4)) & 0x10;
    }
    if constexpr (l.bits == 6) { // pairs of bits: groups 0..3 of a plane sit at bits 0, 2, 4, 6 and must come to bit 4
        vb h = load_bytes(planes + 64 * (g / 4));
        int at = 2 * (g % 4);
        EACH w.v[i] |= (nb)(at <= 4 ? (nh)h.v[i] << (4 - at) : (nh)h.v[i] >> (at - 4)) & 0x30;
    }
    return w;
}

template <int K> INLINE void scales(const uint8_t *head, const uint8_t *body, int half, vf &s, vf &b) {
    constexpr Layout l = layout(K);
    const uint16_t *d = reinterpret_cast<const uint16_t *>(l.blocks > 1 ? head : body);
    s = from_half(d);
    if constexpr (K == Q6_K) s = s * from_s8(reinterpret_cast<const int8_t *>(body) + 16 * half);
    if constexpr (K == Q4_K || K == Q5_K) {
        s = s * from_u8(body);
        b = zero() - from_half(d + 16) * from_u8(body + 16);
    } else if constexpr (l.zero < 0) b = from_half(d + 16);
}

// 32 x 16 floats, exactly the numbers that the file means.
template <int K> INLINE const float *widen(const uint8_t *head, const uint8_t *body, float *tile) {
    constexpr Layout l = layout(K);
    if constexpr (K == F32) return reinterpret_cast<const float *>(body);
    if constexpr (K == BF16 || K == F16)
        for (int j = 0; j < KB; j++) {
            const uint16_t *p = reinterpret_cast<const uint16_t *>(body) + NR * j;
            store(tile + NR * j, K == BF16 ? from_bf16(p) : from_half(p));
        }
    if constexpr (l.bits > 0)
        for (int half = 0; half < 2; half++) {
            vf s, b = zero();
            scales<K>(head, body, half, s, b);
            UNROLL for (int g = 4 * half; g < 4 * half + 4; g++) {
                vb w = group<K>(body, g);
                UNROLL for (int j = 0; j < 4; j++) {
                    vi q;
                    EACH q.v[i] = ((ni)w.v[i] >> (8 * j)) & 255;
                    vf f = to_float(q);
                    store(tile + NR * (4 * g + j), l.zero < 0 ? fma(f, s, b) : (f - set1((float)l.zero)) * s);
                }
            }
        }
    return tile;
}

template <int K> struct Walk { // steps through a panel block by block
    const uint8_t *head, *body;
    int b = 0;
    __attribute__((always_inline)) Walk(const uint8_t *p) : head(p), body(p + layout(K).head) {}
    __attribute__((always_inline)) void next() {
        constexpr Layout l = layout(K);
        body += l.body();
        if (l.blocks > 1 && ++b == l.blocks) {
            b = 0;
            head = body;
            body += l.head;
        }
    }
};

// ---- float rows against a tile ---------------------------------------------------------------------------------------------------

INLINE vf widened(const float *p) { return load(p); }
INLINE vf widened(const uint16_t *p) { return from_half(p); }

template <int R, class E> INLINE void micro(const E *tile, int ldw, int n, const float *const *x, int at, float *acc, int lda) {
    vf a[R];
    const float *p[R];
    UNROLL for (int r = 0; r < R; r++) {
        a[r] = load(acc + r * lda);
        p[r] = x[r] + at;
    }
    for (int k = 0; k < n; k++) {
        vf w = widened(tile + k * ldw);
        UNROLL for (int r = 0; r < R; r++) a[r] = fma(set1(p[r][k]), w, a[r]);
    }
    UNROLL for (int r = 0; r < R; r++) store(acc + r * lda, a[r]);
}

template <class E> INLINE void rows(const E *tile, int ldw, int n, const float *const *x, int at, int t, float *acc, int lda) {
    int r = 0;
    if (VN == 1) for (; r + 12 <= t; r += 12) micro<12>(tile, ldw, n, x + r, at, acc + r * lda, lda);
    for (; r + 6 <= t; r += 6) micro<6>(tile, ldw, n, x + r, at, acc + r * lda, lda);
    switch (t - r) {
    case 5: micro<5>(tile, ldw, n, x + r, at, acc + r * lda, lda); break;
    case 4: micro<4>(tile, ldw, n, x + r, at, acc + r * lda, lda); break;
    case 3: micro<3>(tile, ldw, n, x + r, at, acc + r * lda, lda); break;
    case 2: micro<2>(tile, ldw, n, x + r, at, acc + r * lda, lda); break;
    case 1: micro<1>(tile, ldw, n, x + r, at, acc + r * lda, lda); break;
    }
}

// Panels follow each other in memory: fetch what comes 2 kB later, across the ends of pages where the hardware stops.
template <int K> INLINE void ahead(const uint8_t *body) {
    UNROLL for (int i = 0; i < layout(K).body(); i += 64) __builtin_prefetch(body + 2048 + i);
}

constexpr int RUN = 8; // blocks that many rows meet at once: their tile of 16 kB stays in the nearest cache

template <int K> static void panel_float_of(const uint8_t *panel, int k, const float *const *x, int t, float *sums) {
    float tile[K == F32 ? 1 : RUN * KB * NR];
    for (int r = 0; r < t; r++) store(sums + NR * r, zero());
    Walk<K> w(panel);
    for (int b = 0, run = t <= 4 ? 1 : RUN; b < blocks_of(k); b += run) {
        const float *f = K == F32 ? reinterpret_cast<const float *>(w.body) : tile;
        int many = blocks_of(k) - b < run ? blocks_of(k) - b : run;
        for (int i = 0; i < many; i++, w.next()) {
            if (t <= 4) ahead<K>(w.body);
            if constexpr (K != F32) widen<K>(w.head, w.body, tile + KB * NR * i);
        }
        rows(f, NR, k - KB * b < many * KB ? k - KB * b : many * KB, x, KB * b, t, sums, NR);
    }
}

// One row meets P panels of floats at once: the multiply-adds of one alone would wait for each other.
template <int K, int P> static void beside(const uint8_t *panel, int64_t stride, int k, const float *x, float *sums) {
    vf a[P];
    UNROLL for (int p = 0; p < P; p++) a[p] = zero();
    constexpr int step = NR * (K == F32 ? 4 : 2);
    for (int j = 0; j < k; j++, panel += step) {
        vf v = set1(x[j]);
        UNROLL for (int p = 0; p < P; p++) {
            const uint8_t *at = panel + p * stride;
            const uint16_t *half = reinterpret_cast<const uint16_t *>(at);
            __builtin_prefetch(at + 2048);
            a[p] = fma(v, K == F32 ? load(reinterpret_cast<const float *>(at)) : K == BF16 ? from_bf16(half) : from_half(half), a[p]);
        }
    }
    UNROLL for (int p = 0; p < P; p++) store(sums + NR * p, a[p]);
}

template <int K> static void panels_one_of(const uint8_t *panel, int64_t stride, int count, int k, const float *x, float *sums) {
    switch (count) {
    case 4: beside<K, 4>(panel, stride, k, x, sums); break;
    case 3: beside<K, 3>(panel, stride, k, x, sums); break;
    case 2: beside<K, 2>(panel, stride, k, x, sums); break;
    default: beside<K, 1>(panel, stride, k, x, sums); break;
    }
}

// ---- int8 rows against a block ---------------------------------------------------------------------------------------------------

// Keeps the compiler from computing all products first and spilling them.
#define HOLD(v) __asm__ volatile("" : "+x"(v))

// Sums of quants times int8 activations of groups [from, from + 4) or all eight; `get(g)` yields a group's 64 bytes.
template <int BITS, int R, class Get> INLINE void dots(Get get, const QRow *x, int b, int from, int to, vi *out) {
#if defined(__AVX2__) && !defined(TRANSEPT_512)
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi16(255);
    if constexpr (BITS == 8) { // bytes widened to 16 bits in place: elements 0, 2 and 1, 3 of each four
        UNROLL for (int r = 0; r < R; r++) out[r] = zero_int();
        UNROLL for (int g = from; g < to; g++) {
            vb w = get(g);
            __m256i even[2], odd[2];
            UNROLL for (int i = 0; i < 2; i++) {
                even[i] = _mm256_and_si256((__m256i)w.v[i], low);
                odd[i] = _mm256_srli_epi16((__m256i)w.v[i], 8);
                if constexpr (R > 1) { HOLD(even[i]); HOLD(odd[i]); }
            }
            UNROLL for (int r = 0; r < R; r++) {
                int32_t e, o;
                std::memcpy(&e, x[r].wide + KB * b + 2 * g, 4);
                std::memcpy(&o, x[r].wide + KB * b + 2 * g + KB / 2, 4);
                __m256i xe = _mm256_set1_epi32(e), xo = _mm256_set1_epi32(o);
                UNROLL for (int i = 0; i < 2; i++) {
                    __m256i s = _mm256_add_epi32(_mm256_madd_epi16(even[i], xe), _mm256_madd_epi16(odd[i], xo));
                    out[r].v[i] = (ni)_mm256_add_epi32((__m256i)out[r].v[i], s);
                    HOLD(out[r].v[i]);
                }
            }
        }
        return;
    }
    // Products of quant pairs stay in 16 bits as long as they cannot overflow: 8, 4, 2 groups for 4, 5, 6 bits.
    constexpr int run = BITS == 4 ? 8 : BITS == 5 ? 4 : 2;
    __m256i sum[R][2];
    UNROLL for (int r = 0; r < R; r++) out[r] = zero_int();
    UNROLL for (int g = from; g < to; g++) {
        vb w = get(g);
        if constexpr (R > 1) { HOLD(w.v[0]); HOLD(w.v[1]); } // loaded once, not once for each row
        UNROLL for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, x[r].q + KB * b + 4 * g, 4);
            __m256i v = _mm256_set1_epi32(four);
            UNROLL for (int i = 0; i < 2; i++) {
                __m256i p = _mm256_maddubs_epi16((__m256i)w.v[i], v);
                sum[r][i] = g % run == 0 ? p : _mm256_add_epi16(sum[r][i], p);
                HOLD(sum[r][i]);
                if (g % run != run - 1 && g != to - 1) continue;
                __m256i s = _mm256_madd_epi16(sum[r][i], ones);
                out[r].v[i] = (ni)_mm256_add_epi32((__m256i)out[r].v[i], s);
            }
        }
    }
#else
    UNROLL for (int r = 0; r < R; r++) out[r] = zero_int();
    WHERE_FAST for (int g = from; g < to; g++) {
        vb w = get(g);
        UNROLL for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, x[r].q + KB * b + 4 * g, 4);
            WHERE_FAST for (int i = 0; i < VN; i++) out[r].v[i] = dot<BITS>(out[r].v[i], w.v[i], four);
        }
    }
#endif
}

#if defined(__ARM_FEATURE_DOTPROD)
constexpr int offset(int kind) { return kind == Q8_0 ? 0 : layout(kind).zero; }
#else
constexpr int offset(int kind) { return layout(kind).zero; }
#endif

template <int K, int R, class Get> INLINE void add_block(Get get, const uint8_t *head, const uint8_t *body, const QRow *x, int b, vf *sums) {
    constexpr Layout l = layout(K);
    constexpr int halves = K == Q6_K ? 2 : 1;
    UNROLL for (int half = 0; half < halves; half++) {
        vf s, m;
        vi d[R];
        dots<l.bits, R>(get, x, b, half * 4, half * 4 + 8 / halves, d);
        scales<K>(head, body, half, s, m);
        UNROLL for (int r = 0; r < R; r++) {
            int32_t sum = K == Q6_K ? x[r].sum[2 * b + half] : x[r].sum[2 * b] + x[r].sum[2 * b + 1];
            if constexpr (l.zero >= 0) EACH d[r].v[i] -= splat_int(offset(K) * sum);
            sums[r] = fma(s * set1(x[r].scale[b]), to_float(d[r]), sums[r]);
            if constexpr (l.zero < 0) sums[r] = fma(m, set1(x[r].weighted[b]), sums[r]);
        }
    }
}

template <int K, int R> static void few(const uint8_t *panel, int nb, const QRow *x, float *sums) {
    vf a[R];
    UNROLL for (int r = 0; r < R; r++) a[r] = zero();
    Walk<K> w(panel);
    for (int b = 0; b < nb; b++, w.next()) {
        ahead<K>(w.body);
        add_block<K, R>([&](int g) { return group<K>(w.body, g); }, w.head, w.body, x, b, a);
    }
    UNROLL for (int r = 0; r < R; r++) store(sums + NR * r, a[r]);
}

// The running sums stay in memory: sixteen registers do not hold them beside the integer sums of four rows.
template <int K, int R> INLINE void from_tile(const uint8_t *tile, const Walk<K> &w, const QRow *x, int b, float *sums) {
    vf a[R];
    UNROLL for (int r = 0; r < R; r++) a[r] = load(sums + NR * r);
    add_block<K, R>([&](int g) { return load_bytes(tile + 64 * g); }, w.head, w.body, x, b, a);
    UNROLL for (int r = 0; r < R; r++) store(sums + NR * r, a[r]);
}

template <int K> static void panel_int_of(const uint8_t *panel, int k, const QRow *x, int t, float *sums) {
    int nb = blocks_of(k);
    switch (t) {
    case 1: few<K, 1>(panel, nb, x, sums); return;
    case 2: few<K, 2>(panel, nb, x, sums); return;
    case 3: few<K, 3>(panel, nb, x, sums); return;
    case 4: few<K, 4>(panel, nb, x, sums); return;
    }
    for (int r = 0; r < t; r++) store(sums + NR * r, zero());
    alignas(64) uint8_t tile[KB * NR];
    Walk<K> w(panel);
    for (int b = 0; b < nb; b++, w.next()) {
        ahead<K>(w.body);
        UNROLL for (int g = 0; g < 8; g++) store_bytes(tile + 64 * g, group<K>(w.body, g));
        int r = 0;
        if (VN == 1) for (; r + 8 <= t; r += 8) from_tile<K, 8>(tile, w, x + r, b, sums + NR * r);
        for (; r + 4 <= t; r += 4) from_tile<K, 4>(tile, w, x + r, b, sums + NR * r);
        for (; r < t; r++) from_tile<K, 1>(tile, w, x + r, b, sums + NR * r);
    }
}

// Each 32 get a scale, with the sign that brings the value of largest magnitude to -128, and are rounded to nearest.
// A NaN or infinity makes its block's scale NaN: it must show in the result.
static void quantise(const float *x, int k, bool wide, QRow out) {
    for (int b = 0; b < blocks_of(k); b++) {
        int n = k - KB * b;
        vf lo = load_some(x + KB * b, n), hi = load_some(x + KB * b + NR, n - NR);
        float above = largest(maximum(lo, hi)), below = largest(maximum(zero() - lo, zero() - hi));
        float most = (above > below ? above : below) / 128.f, least = (above < below ? above : below) / 127.f;
        float scale = __builtin_copysignf(most > least ? most : least, below - above), inverse = 1.f / scale;
        float bad = total(lo * set1(0.f) + hi * set1(0.f));
        out.scale[b] = bad == 0.f ? scale : bad;
        float q[KB];
        for (int h = 0; h < 2; h++) {
            vf y = fma(h ? hi : lo, set1(inverse), set1(12582912.f)) - set1(12582912.f); // adding 1.5 * 2^23 rounds to nearest even
            if (!(bad + inverse * 0.f == 0.f)) y = zero();
            out.sum[2 * b + h] = (int32_t)total(y); // whole numbers: exact in any order
            store(q + NR * h, y);
        }
        for (int j = 0; j < KB; j++) out.q[KB * b + j] = (int8_t)q[j];
        out.weighted[b] = out.scale[b] * (float)(out.sum[2 * b] + out.sum[2 * b + 1]);
        for (int j = 0; wide && j < KB / 2; j++) {
            out.wide[KB * b + j] = (int16_t)q[2 * j];
            out.wide[KB * b + KB / 2 + j] = (int16_t)q[2 * j + 1];
        }
    }
}

template <int K> static void column_of(const uint8_t *panel, int column, int k, float scale, bool add, float *out) {
    float tile[KB * NR];
    Walk<K> w(panel);
    for (int b = 0; b < blocks_of(k); b++, w.next()) {
        const float *f = widen<K>(w.head, w.body, tile);
        for (int j = 0; j < KB && KB * b + j < k; j++) {
            float y = f[NR * j + column] * scale;
            out[KB * b + j] = add ? out[KB * b + j] + y : y;
        }
    }
}

#define BY_KIND(call, ...)                                                                                                              \
    switch (kind) {                                                                                                                     \
    case F32: call<F32>(__VA_ARGS__); break;                                                                                            \
    case F16: call<F16>(__VA_ARGS__); break;                                                                                            \
    case BF16: call<BF16>(__VA_ARGS__); break;                                                                                          \
        QUANTISED(call, __VA_ARGS__)                                                                                                    \
    default: break;                                                                                                                     \
    }
#define QUANTISED(call, ...)                                                                                                            \
    case Q4_0: call<Q4_0>(__VA_ARGS__); break;                                                                                          \
    case Q4_1: call<Q4_1>(__VA_ARGS__); break;                                                                                          \
    case Q5_0: call<Q5_0>(__VA_ARGS__); break;                                                                                          \
    case Q5_1: call<Q5_1>(__VA_ARGS__); break;                                                                                          \
    case Q8_0: call<Q8_0>(__VA_ARGS__); break;                                                                                          \
    case Q4_K: call<Q4_K>(__VA_ARGS__); break;                                                                                          \
    case Q5_K: call<Q5_K>(__VA_ARGS__); break;                                                                                          \
    case Q6_K: call<Q6_K>(__VA_ARGS__); break;

static void panels_one(int kind, const uint8_t *panel, int64_t stride, int count, int k, const float *x, float *sums) {
    if (kind == F32) panels_one_of<F32>(panel, stride, count, k, x, sums);
    if (kind == F16) panels_one_of<F16>(panel, stride, count, k, x, sums);
    if (kind == BF16) panels_one_of<BF16>(panel, stride, count, k, x, sums);
}
static void panel_float(int kind, const uint8_t *panel, int k, const float *const *x, int t, float *sums) {
    BY_KIND(panel_float_of, panel, k, x, t, sums)
}
static void panel_int(int kind, const uint8_t *panel, int k, const QRow *x, int t, float *sums) {
    switch (kind) {
        QUANTISED(panel_int_of, panel, k, x, t, sums)
    default: break;
    }
}
static void column(int kind, const uint8_t *panel, int c, int k, float scale, bool add, float *out) {
    BY_KIND(column_of, panel, c, k, scale, add, out)
}

// ---- elementwise -----------------------------------------------------------------------------------------------------------------

INLINE vf sigmoid(vf x) { return set1(1.f) / (set1(1.f) + exp(zero() - x)); }
INLINE vf tanh(vf x) { // by exp of -2|x|; near zero by the odd series, where the difference would cancel
    vf e = exp(magnitude(x) * set1(-2.f)), y = (set1(1.f) - e) / (set1(1.f) + e), s = x * x, r;
    vf series = x * fma(s, fma(s, fma(s, set1(-17.f / 315), set1(2.f / 15)), set1(-1.f / 3)), set1(1.f));
    EACH {
        nf full = (nf)(((ni)x.v[i] & (int32_t)0x80000000) | ((ni)y.v[i] & 0x7fffffff));
        r.v[i] = (nf)((ni)x.v[i] & 0x7fffffff) < splat(0.15f) ? series.v[i] : full;
    }
    return r;
}
INLINE vf erf(vf x) { // Abramowitz and Stegun 7.1.26, error below 1.5e-7
    vf a = magnitude(x), t = set1(1.f) / fma(a, set1(0.3275911f), set1(1.f)), p = set1(1.061405429f), r;
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f)) * t;
    p = set1(1.f) - p * exp(zero() - a * a);
    EACH r.v[i] = (nf)(((ni)x.v[i] & (int32_t)0x80000000) ^ (ni)p.v[i]);
    return r;
}

INLINE vf act(int kind, vf x) {
    switch (kind) {
    case SILU: return x * sigmoid(x);
    case GELU: return x * set1(0.5f) * (set1(1.f) + erf(x * set1(0.70710678118654752f)));
    case GELU_TANH: return x * set1(0.5f) * (set1(1.f) + tanh(x * set1(0.79788456080286536f) * fma(x * x, set1(0.044715f), set1(1.f))));
    case RELU: return below(x, x, 0.f, 0.f);
    case QUICK_GELU: return x * sigmoid(x * set1(1.702f));
    case RELU2: { vf y = below(x, x, 0.f, 0.f); return y * y; }
    case SIGMOID: return sigmoid(x);
    case TANH: return tanh(x);
    default: return x;
    }
}

static void activate(int kind, float *x, int n) {
    for (int j = 0; j < n; j += NR) store_some(x + j, act(kind, load_some(x + j, n - j)), n - j);
}

static void finish(float *sums, int t, const Finish &f) {
    vf bias = f.bias ? load_some(f.bias, f.columns) : zero(), bias2 = f.bias2 ? load_some(f.bias2, f.columns) : zero(), alpha = set1(f.alpha);
    for (int r = 0; r < t; r++) {
        vf a = act(f.act, f.bias ? load(sums + NR * r) + bias : load(sums + NR * r));
        if (f.gated) {
            vf up = load(sums + NR * (t + r));
            a = a * (f.bias2 ? up + bias2 : up);
        }
        if (f.alpha != 1.f) a = a * alpha;
        if (f.residual) a = a + load_some(f.residual[r] + f.column, f.columns);
        store_some(f.y[r] + f.column, a, f.columns);
    }
}

static void norm(const float *x, const float *w, const float *b, float *y, int n, float eps, bool layer) {
    int whole = n / NR * NR;
    vf rest = load_some(x + whole, n - whole), m = zero(), s = rest;
    if (layer) {
        for (int j = 0; j < whole; j += NR) s = s + load(x + j);
        m = set1(total(s) / (float)n);
        float e[NR] = {};
        store_some(e, rest - m, n - whole);
        rest = load(e);
    }
    s = rest * rest;
    for (int j = 0; j < whole; j += NR) {
        vf d = load(x + j) - m;
        s = fma(d, d, s);
    }
    vf scale = set1(1.f / __builtin_sqrtf(total(s) / (float)n + eps));
    for (int j = 0; j < n; j += NR) {
        vf v = (load_some(x + j, n - j) - m) * scale;
        if (w) v = v * load_some(w + j, n - j);
        if (b) v = v + load_some(b + j, n - j);
        store_some(y + j, v, n - j);
    }
}

// The sum of exp(x - most): in float over runs of 1,024, these added up in double.
static double exp_sum(const float *x, int n, float most) {
    double sum = 0;
    for (int from = 0; from < n; from += 64 * NR) {
        vf s = zero();
        for (int j = from; j < n && j < from + 64 * NR; j += NR) {
            float e[NR] = {};
            store_some(e, exp(load_some(x + j, n - j) - set1(most)), n - j);
            s = s + load(e);
        }
        sum += total(s);
    }
    return sum;
}

// ---- attention -------------------------------------------------------------------------------------------------------------------

// One page's keys as [head][16 tokens] floats.
INLINE const float *keys_of(const AttendUnit &u, const uint8_t *block, float *tile) {
    const Cache &c = *u.cache;
    const uint8_t *p = block + c.scale_bytes();
    if (!c.latent && c.kind == CACHE_F32) return reinterpret_cast<const float *>(p);
    vf s = c.kind == CACHE_Q8 ? load(reinterpret_cast<const float *>(block)) : set1(1.f);
    if (!c.latent) {
        for (int j = 0; j < c.head; j++)
            store(tile + NR * j, c.kind == CACHE_F16 ? from_half(reinterpret_cast<const uint16_t *>(p) + NR * j)
                                                     : from_s8(reinterpret_cast<const int8_t *>(p) + NR * j) * s);
        return tile;
    }
    float line[NR], scale[NR];
    store(scale, s);
    for (int tok = 0; tok < PAGE; tok++)
        for (int j = 0; j < c.width(); j += NR) {
            int64_t at = (int64_t)tok * c.width() + j;
            if (c.kind == CACHE_F32) store(line, load(reinterpret_cast<const float *>(p) + at));
            else if (c.kind == CACHE_F16) store(line, from_half(reinterpret_cast<const uint16_t *>(p) + at));
            else store(line, from_s8(reinterpret_cast<const int8_t *>(p) + at) * set1(scale[tok]));
            for (int i = 0; i < NR && j + i < c.head; i++) tile[NR * (j + i) + tok] = line[i];
        }
    return tile;
}

// One page's values as [16 tokens][width] floats.
INLINE const float *values_of(const AttendUnit &u, const uint8_t *block, float *tile, int tokens) {
    const Cache &c = *u.cache;
    const uint8_t *p = block + c.scale_bytes() + c.key_bytes();
    if (c.kind == CACHE_F32) return reinterpret_cast<const float *>(p);
    const float *s = reinterpret_cast<const float *>(block) + (c.latent ? 0 : PAGE);
    for (int tok = 0; tok < tokens; tok++)
        for (int j = 0; j < c.width(); j += NR) {
            int64_t at = (int64_t)tok * c.width() + j;
            store(tile + at, c.kind == CACHE_F16 ? from_half(reinterpret_cast<const uint16_t *>(p) + at)
                                                 : from_s8(reinterpret_cast<const int8_t *>(p) + at) * set1(s[tok]));
        }
    return tile;
}

// Score, bias and mask of one query over the keys [from, to) of whole pages; returns the largest.
INLINE float mask_scores(const AttendUnit &u, int i, float *s, int from, int to) {
    vf top = set1(-__builtin_inff());
    for (int j = from; j < to; j += NR) {
        vf v = load(s + j - from) * set1(u.scale);
        if (u.cap > 0) v = tanh(v / set1(u.cap)) * set1(u.cap);
        if (u.bias) {
            float b[NR];
            for (int n = 0; n < NR; n++) {
                int at = u.bias_at[i] + j + n;
                b[n] = u.bias[i][at < 0 ? 0 : at >= u.biases ? u.biases - 1 : at];
            }
            v = v + load(b);
        }
        if (j < u.lo[i] || j + NR > u.hi[i]) {
            float e[NR];
            store(e, v);
            for (int n = 0; n < NR; n++) if (j + n < u.lo[i] || j + n >= u.hi[i]) e[n] = -__builtin_inff();
            v = load(e);
        }
        store(s + j - from, v);
        top = maximum(v, top);
    }
    return largest(top);
}

INLINE void fetch(const uint8_t *p, int64_t bytes) { for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i); }
static void attend(const AttendUnit &u) {
    const Cache &c = *u.cache;
    int width = c.width(), first = u.begin / PAGE, last = (u.end + PAGE - 1) / PAGE, from = first * PAGE;
    const float *s[NQ];
    bool direct = c.kind == CACHE_F16 && !c.latent && u.nq <= 6; // a few queries meet a page once: it need not be widened first
    for (int i = 0; i < u.nq; i++) {
        s[i] = u.scores + i * CHUNK;
        for (int j = 0; j < (last - first) * PAGE; j += NR) store(u.scores + i * CHUNK + j, zero());
        for (int j = 0; j < width; j += NR) store(u.o + i * width + j, zero());
    }
    for (int p = first; p < last; p++) {
        const uint8_t *block = c.block(u.table[p], u.kv_head);
        float *to = u.scores + (p - first) * PAGE;
        if (direct) fetch(block + c.key_bytes(), c.head_bytes() - c.key_bytes());
        if (direct && p + 1 < last) fetch(c.block(u.table[p + 1], u.kv_head), c.key_bytes());
        if (direct) rows(reinterpret_cast<const uint16_t *>(block), NR, c.head, u.q, 0, u.nq, to, CHUNK);
        else rows(keys_of(u, block, u.tile), NR, c.head, u.q, 0, u.nq, to, CHUNK);
    }
    for (int i = 0; i < u.nq; i++) {
        float *line = u.scores + i * CHUNK, top = mask_scores(u, i, line, from, last * PAGE);
        u.m[i] = top;
        vf sum = zero(), shift = set1(top > -__builtin_inff() ? top : 0.f);
        for (int j = 0; j < (last - first) * PAGE; j += NR) {
            vf e = exp(load(line + j) - shift);
            store(line + j, e);
            sum = sum + e;
        }
        u.l[i] = total(sum);
        if (u.l[i] != u.l[i] && top == -__builtin_inff()) u.m[i] = 0.f; // nothing but NaN is not the same as nothing
    }
    for (int p = first; p < last; p++) {
        int tokens = u.end - p * PAGE < PAGE ? u.end - p * PAGE : PAGE; // slots past the end may hold anything, even NaN
        const uint8_t *block = c.block(u.table[p], u.kv_head);
        const float *v = direct ? nullptr : values_of(u, block, u.tile, tokens);
        const uint16_t *half = reinterpret_cast<const uint16_t *>(block + c.key_bytes());
        for (int j = 0; j < width; j += NR) {
            if (direct) rows(half + j, width, tokens, s, (p - first) * PAGE, u.nq, u.o + j, width);
            else rows(v + j, width, tokens, s, (p - first) * PAGE, u.nq, u.o + j, width);
        }
    }
}

// Online softmax: the running (maximum, sum, values) takes in one chunk's. A chunk that a query does not see changes nothing.
static void merge(float *m, float *l, float *o, float pm, float pl, const float *po, int n) {
    if (pm == -__builtin_inff()) return;
    bool empty = *m == -__builtin_inff();
    float top = empty || pm > *m ? pm : *m;
    float keep = empty ? 0.f : exp(set1(*m - top)).v[0][0], take = exp(set1(pm - top)).v[0][0];
    *m = top;
    *l = empty ? pl : *l * keep + pl * take;
    for (int j = 0; j < n; j += NR) store(o + j, empty ? load(po + j) : fma(load(o + j), set1(keep), load(po + j) * set1(take)));
}

INLINE float quantise_vector(const float *x, int n, int8_t *q, int stride) {
    float top = 0, bad = 0;
    for (int j = 0; j < n; j++) {
        float a = x[j] < 0 ? -x[j] : x[j];
        top = a > top ? a : top;
        bad += x[j] * 0.f;
    }
    float inverse = bad == 0.f && top > 1e-37f ? 127.f / top : 0.f;
    for (int j = 0; j < n; j++) q[j * stride] = inverse > 0 ? (int8_t)__builtin_lrintf(x[j] * inverse) : 0;
    return bad == 0.f ? top / 127.f : bad;
}

static void write(const Cache &c, uint8_t *p, const float *x, int n, int stride, float *scale) {
    if (c.kind == CACHE_Q8) {
        *scale = quantise_vector(x, n, reinterpret_cast<int8_t *>(p), stride);
        return;
    }
    for (int j = 0; c.kind == CACHE_F32 && j < n; j++) std::memcpy(p + (int64_t)j * stride * 4, x + j, 4);
    for (int j = 0; c.kind == CACHE_F16 && j < n; j += NR) {
        float f[NR] = {};
        uint16_t h[NR];
        int m = n - j < NR ? n - j : NR;
        std::memcpy(f, x + j, sizeof(float) * (size_t)m);
        to_half(h, f);
        for (int i = 0; i < m; i++) std::memcpy(p + (int64_t)(j + i) * stride * 2, h + i, 2);
    }
}

static void store_token(const Cache &c, int page, int slot, int kv_head, const float *k, const float *v) {
    uint8_t *block = c.block(page, kv_head), *p = block + c.scale_bytes();
    float *scale = reinterpret_cast<float *>(block) + slot;
    if (c.latent) { // k holds the latent columns followed by the rotated key
        write(c, p + (int64_t)slot * c.width() * c.element(), k, c.head, 1, scale);
        return;
    }
    write(c, p + (int64_t)slot * c.element(), k, c.head, PAGE, scale);
    write(c, p + c.key_bytes() + (int64_t)slot * c.width() * c.element(), v, c.vhead, 1, scale + PAGE);
}
} // namespace transept::TRANSEPT_ISA

namespace transept {
#define CONCAT2(a, b) a##b
#define CONCAT(a, b) CONCAT2(a, b)
#define STRING2(a) #a
#define STRING(a) STRING2(a)
using namespace TRANSEPT_ISA;
extern const Kernels CONCAT(kernels_, TRANSEPT_ISA) = {STRING(TRANSEPT_ISA), panel_float, panels_one, panel_int, quantise, column, finish,
                                                       norm, exp_sum, activate, attend, merge, store_token};
} // namespace transept
