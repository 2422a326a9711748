// Sixteen floats as native vectors of this translation unit's instruction set. Everything lives in TRANSEPT_ISA's own namespace
// and nothing inline is taken from the standard library: the linker must never merge code of two instruction sets.
#pragma once
#include "layout.h"
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__SANITIZE_ADDRESS__) // checked code takes ten times the instructions: inlined and unrolled it would compile for ever
#define INLINE static inline __attribute__((unused))
#define UNROLL
#else
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#endif

namespace transept::TRANSEPT_ISA {

// What the two x86 sets spell differently: the width of a name, and loads of half and a quarter as many bytes as a vector has.
#if defined(__AVX512VNNI__) || defined(TRANSEPT_EMULATED)
#define TRANSEPT_512
#define X86(name) _mm512_##name
#define LOAD_HALF(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_QUARTER(p) _mm_loadu_si128((const __m128i *)(p))
constexpr int LANES = 16;
typedef __m512 xf;
#elif defined(__AVX2__)
#define X86(name) _mm256_##name
#define LOAD_HALF(p) _mm_loadu_si128((const __m128i *)(p))
#define LOAD_QUARTER(p) _mm_loadl_epi64((const __m128i *)(p))
constexpr int LANES = 8;
typedef __m256 xf;
#else
constexpr int LANES = 4;
#endif
constexpr int VN = NR / LANES;

typedef float nf __attribute__((vector_size(LANES * 4)));
typedef int32_t ni __attribute__((vector_size(LANES * 4)));
typedef uint16_t nh __attribute__((vector_size(LANES * 4)));
typedef uint8_t nb __attribute__((vector_size(LANES * 4)));

struct vf { nf v[VN]; };
struct vi { ni v[VN]; };
struct vb { nb v[VN]; };

INLINE nf splat(float s) {
#if defined(__AVX2__)
    return (nf)X86(set1_ps)(s);
#else
    return s - (nf){};
#endif
}
INLINE ni splat_int(int32_t s) { return s - (ni){}; }

// The one multiply-add: its rounding is part of the contract that a row's bits do not depend on its neighbours.
INLINE nf fma1(nf a, nf b, nf c) {
#if defined(__AVX2__)
    return (nf)X86(fmadd_ps)((xf)a, (xf)b, (xf)c);
#elif defined(__aarch64__)
    return (nf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// Every loop over a fixed few must vanish, else its vectors live in memory.
#define EACH UNROLL for (int i = 0; i < VN; i++)
typedef float nfu __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef uint8_t nbu __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
INLINE vf load(const float *p) { vf r; EACH r.v[i] = *(const nfu *)(p + LANES * i); return r; }
INLINE vb load_bytes(const uint8_t *p) { vb r; EACH r.v[i] = *(const nbu *)(p + 4 * LANES * i); return r; }
INLINE void store(float *p, vf a) { EACH *(nfu *)(p + LANES * i) = a.v[i]; }
INLINE void store_bytes(uint8_t *p, vb a) { EACH *(nbu *)(p + 4 * LANES * i) = a.v[i]; }
INLINE vf load_some(const float *p, int n) { // the first n; zeros behind them
    if (n >= NR) return load(p);
    float e[NR] = {};
    for (int j = 0; j < n; j++) e[j] = p[j];
    return load(e);
}
INLINE void store_some(float *p, vf a, int n) {
    if (n >= NR) return store(p, a);
    float e[NR];
    store(e, a);
    for (int j = 0; j < n; j++) p[j] = e[j];
}
INLINE vf set1(float s) { vf r; EACH r.v[i] = splat(s); return r; }
INLINE vf zero() { vf r; EACH r.v[i] = (nf){}; return r; }
INLINE vi zero_int() { vi r; EACH r.v[i] = (ni){}; return r; }
INLINE vf operator+(vf a, vf b) { EACH a.v[i] = a.v[i] + b.v[i]; return a; }
INLINE vf operator-(vf a, vf b) { EACH a.v[i] = a.v[i] - b.v[i]; return a; }
INLINE vf operator*(vf a, vf b) { EACH a.v[i] = a.v[i] * b.v[i]; return a; }
INLINE vf operator/(vf a, vf b) { EACH a.v[i] = a.v[i] / b.v[i]; return a; }
INLINE vf fma(vf a, vf b, vf c) { EACH c.v[i] = fma1(a.v[i], b.v[i], c.v[i]); return c; }
INLINE vf above(vf x, float limit, float then) { // x > limit ? then : x, so that NaN stays
    EACH x.v[i] = x.v[i] > splat(limit) ? splat(then) : x.v[i];
    return x;
}
INLINE vf below(vf x, vf y, float limit, float then) { EACH y.v[i] = x.v[i] < splat(limit) ? splat(then) : y.v[i]; return y; }
INLINE vf maximum(vf a, vf b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE vf magnitude(vf a) { EACH a.v[i] = (nf)((ni)a.v[i] & 0x7fffffff); return a; }
INLINE vf to_float(vi a) { vf r; EACH r.v[i] = __builtin_convertvector(a.v[i], nf); return r; }
#if defined(TRANSEPT_512)
INLINE __m256 low(vf a) { return _mm512_castps512_ps256((__m512)a.v[0]); }
INLINE __m256 high(vf a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)a.v[0], 1)); }
#elif defined(__AVX2__)
INLINE __m256 low(vf a) { return (__m256)a.v[0]; }
INLINE __m256 high(vf a) { return (__m256)a.v[1]; }
#endif
#if defined(__AVX2__)
INLINE __m128 halved(__m256 a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
INLINE float total(vf a) { // fixed order: halves onto halves
    __m128 t = halved(_mm256_add_ps(low(a), high(a)));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
INLINE float largest(vf a) {
    __m256 m = _mm256_max_ps(low(a), high(a));
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
#else
INLINE float total(vf a) {
    float t[NR];
    store(t, a);
    for (int w = NR / 2; w; w /= 2) for (int i = 0; i < w; i++) t[i] += t[i + w];
    return t[0];
}
INLINE float largest(vf a) {
    float t[NR];
    store(t, a);
    for (int w = NR / 2; w; w /= 2) for (int i = 0; i < w; i++) t[i] = t[i + w] > t[i] ? t[i + w] : t[i];
    return t[0];
}
#endif

INLINE vf from_bf16(const uint16_t *p) {
    vf r;
    EACH {
#if defined(__AVX2__)
        r.v[i] = (nf)X86(slli_epi32)(X86(cvtepu16_epi32)(LOAD_HALF(p + LANES * i)), 16);
#elif defined(__aarch64__)
        r.v[i] = (nf)vshll_n_u16(vld1_u16(p + LANES * i), 16);
#else
        ni w;
        for (int j = 0; j < LANES; j++) w[j] = (int32_t)((uint32_t)p[LANES * i + j] << 16);
        r.v[i] = (nf)w;
#endif
    }
    return r;
}

INLINE vf from_half(const uint16_t *p) {
    vf r;
    EACH {
#if defined(__AVX2__)
        r.v[i] = (nf)X86(cvtph_ps)(LOAD_HALF(p + LANES * i));
#elif defined(__aarch64__)
        r.v[i] = (nf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + LANES * i)));
#else
        for (int j = 0; j < LANES; j++) r.v[i][j] = half_to_float(p[LANES * i + j]);
#endif
    }
    return r;
}

INLINE void to_half(uint16_t *p, const float *x) { // sixteen
#if defined(__AVX2__)
    for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i *)(p + 8 * i), _mm256_cvtps_ph(_mm256_loadu_ps(x + 8 * i), 0));
#elif defined(__aarch64__)
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + 4 * i))));
#else
    for (int i = 0; i < 16; i++) {
        uint32_t b;
        std::memcpy(&b, x + i, 4);
        uint32_t sign = (b >> 16) & 0x8000, e = (b >> 23) & 255, m = b & 0x7fffff, h;
        if (e == 255) h = 0x7c00 | (m ? 0x200 : 0);
        else if (e >= 143) h = 0x7c00;
        else if (e >= 113) { h = ((e - 112) << 10) | (m >> 13); h += (m & 0x1000) && ((m & 0xfff) || (h & 1)); }
        else if (e < 102) h = 0;
        else {
            m |= 0x800000;
            uint32_t s = 126 - e, half = 1u << (s - 1), rest = m & ((1u << s) - 1);
            h = m >> s;
            h += rest > half || (rest == half && (h & 1));
        }
        p[i] = (uint16_t)(sign | h);
    }
#endif
}

// Sixteen bytes, unsigned or signed, as floats.
INLINE vf from_u8(const uint8_t *p) {
    vf r;
    EACH {
#if defined(__AVX2__)
        r.v[i] = (nf)X86(cvtepi32_ps)(X86(cvtepu8_epi32)(LOAD_QUARTER(p + LANES * i)));
#elif defined(__aarch64__)
        uint32_t four;
        std::memcpy(&four, p + LANES * i, 4);
        r.v[i] = (nf)vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
#else
        for (int j = 0; j < LANES; j++) r.v[i][j] = p[LANES * i + j];
#endif
    }
    return r;
}
INLINE vf from_s8(const int8_t *p) {
    vf r;
    EACH {
#if defined(__AVX2__)
        r.v[i] = (nf)X86(cvtepi32_ps)(X86(cvtepi8_epi32)(LOAD_QUARTER(p + LANES * i)));
#elif defined(__aarch64__)
        uint32_t four;
        std::memcpy(&four, p + LANES * i, 4);
        r.v[i] = (nf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
#else
        for (int j = 0; j < LANES; j++) r.v[i][j] = p[LANES * i + j];
#endif
    }
    return r;
}

// Four unsigned quants of each column times four int8 activations, onto 32-bit sums; AVX2 has its own way, see `dots`.
#if defined(TRANSEPT_512) || defined(__ARM_FEATURE_DOTPROD)
#define WHERE_FAST UNROLL
#else
#define WHERE_FAST // plain code is short rather than fast
#endif
#if defined(TRANSEPT_512)
template <int BITS> INLINE ni dot(ni sum, nb w, int32_t four) { return (ni)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four)); }
#elif defined(__ARM_FEATURE_DOTPROD)
template <int BITS> INLINE ni dot(ni sum, nb w, int32_t four) { // signed: 8-bit quants go back to their own sign, see `offset`
    int8x16_t s = vreinterpretq_s8_u8(BITS == 8 ? veorq_u8((uint8x16_t)w, vdupq_n_u8(0x80)) : (uint8x16_t)w);
    return (ni)vdotq_s32((int32x4_t)sum, s, vreinterpretq_s8_s32(vdupq_n_s32(four)));
}
#else
template <int BITS> INLINE ni dot(ni sum, nb w, int32_t four) {
    for (int j = 0; j < 4; j++) sum += (((ni)w >> (8 * j)) & 255) * (int32_t)(int8_t)(four >> (8 * j));
    return sum;
}
#endif

// exp to 2 units in the last place: range reduction by ln 2 in two parts, then the degree-6 polynomial of Cephes' expf.
INLINE vf exp(vf x) {
    vf y = above(x, 88.02f, 88.02f), n = fma(y, set1(1.44269504088896341f), set1(12582912.f)) - set1(12582912.f);
    y = fma(n, set1(-0.693359375f), y);
    y = fma(n, set1(2.12194440e-4f), y);
    vf p = set1(1.9875691500e-4f);
    p = fma(p, y, set1(1.3981999507e-3f));
    p = fma(p, y, set1(8.3334519073e-3f));
    p = fma(p, y, set1(4.1665795894e-2f));
    p = fma(p, y, set1(1.6666665459e-1f));
    p = fma(p, y, set1(5.0000001201e-1f));
    p = fma(p, y * y, y) + set1(1.f);
    n = below(x, n, -87.3f, 0.f);
    vf power;
    EACH {
        nf m = n.v[i] + splat(127.f + 8388608.f); // the integer stands in the low bits of the mantissa; NaN only spoils itself
        power.v[i] = (nf)((ni)m << 23);
    }
    return below(x, p * power, -87.3f, 0.f);
}
} // namespace transept::TRANSEPT_ISA
