// The AVX-512 names that the core uses, for a processor without them: halves by AVX2, the rest number by number from Intel's definitions.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace emulated {
template <class To, class From> inline To as(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "the same bytes under another name");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
struct Floats { float f[16]; };
struct Ints { int32_t i[16]; };
struct Bytes { uint8_t b[64]; };

inline __m512 set1_ps(float x) { Floats r; for (float &f : r.f) f = x; return as<__m512>(r); }
inline __m512i set1_epi32(int x) { Ints r; for (int32_t &i : r.i) i = x; return as<__m512i>(r); }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    Floats x = as<Floats>(a), y = as<Floats>(b), z = as<Floats>(c);
    for (int i = 0; i < 16; i++) z.f[i] = __builtin_fmaf(x.f[i], y.f[i], z.f[i]);
    return as<__m512>(z);
}
inline __m512i slli_epi32(__m512i a, unsigned n) { Ints x = as<Ints>(a); for (int32_t &i : x.i) i = (int32_t)((uint32_t)i << n); return as<__m512i>(x); }
template <class T> inline __m512i widen(const void *p) { Ints r; for (int i = 0; i < 16; i++) { T t; std::memcpy(&t, (const T *)p + i, sizeof t); r.i[i] = t; } return as<__m512i>(r); }
inline __m512i cvtepu16_epi32(__m256i a) { return widen<uint16_t>(&a); }
inline __m512i cvtepu8_epi32(__m128i a) { return widen<uint8_t>(&a); }
inline __m512i cvtepi8_epi32(__m128i a) { return widen<int8_t>(&a); }
inline __m512 cvtepi32_ps(__m512i a) { Ints x = as<Ints>(a); Floats r; for (int i = 0; i < 16; i++) r.f[i] = (float)x.i[i]; return as<__m512>(r); }
inline __m512 cvtph_ps(__m256i a) {
    Floats r;
    _mm256_storeu_ps(r.f, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
    _mm256_storeu_ps(r.f + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
    return as<__m512>(r);
}
inline __m256 castps512_ps256(__m512 a) { return _mm256_loadu_ps(as<Floats>(a).f); }
inline __m256d extractf64x4_pd(__m512d a, int half) { return _mm256_castps_pd(_mm256_loadu_ps(as<Floats>(a).f + 8 * half)); }
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) { // unsigned bytes of a times signed bytes of b, four and four, no saturation
    Ints s = as<Ints>(sum);
    Bytes x = as<Bytes>(a), y = as<Bytes>(b);
    for (int i = 0; i < 64; i++) s.i[i / 4] += (int32_t)x.b[i] * (int8_t)y.b[i];
    return as<__m512i>(s);
}
} // namespace emulated

#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated::castps512_ps256
#undef _mm512_extractf64x4_pd
#define _mm512_extractf64x4_pd emulated::extractf64x4_pd
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
