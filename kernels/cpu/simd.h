// One vector type for every instruction set: GCC's vector extensions, with intrinsics only where these generate better
// code.
//
// Every file of kernels/cpu is compiled once per instruction set, into the namespace GPTCORE_ISA. Templates and inline
// functions must have internal linkage, and the STL must not be used: the linker would keep one copy, and an AVX-512
// copy crashes on an older CPU. tests/test_native.py checks the symbols.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own headers (its PR 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define GPTCORE_INLINE static inline __attribute__((always_inline, unused))

namespace gptcore {
namespace GPTCORE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;  // a tile of 6 rows x 4 vectors keeps 24 of the 32 registers busy
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kPanelVectors = 2;  // 6 x 2 of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kPanelVectors = 2;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;

GPTCORE_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  Vec v;  // not Vec{} + x, which is an addition: it turns -0 into 0
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}
GPTCORE_INLINE IntVec lane_index() {
  IntVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---- loads and stores: memory of any of the three types, float32 in registers ---------------------------------------

template <class T, class U>
GPTCORE_INLINE T bit_cast(const U& from) {
  static_assert(sizeof(T) == sizeof(U), "same size");
  T to;
  memcpy(&to, &from, sizeof to);
  return to;
}

GPTCORE_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
GPTCORE_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

GPTCORE_INLINE Vec load(const bfloat16* p) {
#if defined(__AVX512F__)  // GCC 12 compiles the general form to four instructions
  return bit_cast<Vec>((UintVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return bit_cast<Vec>((UintVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  HalfBits bits;
  memcpy(&bits, p, sizeof bits);
  return bit_cast<Vec>(__builtin_convertvector(bits, UintVec) << 16);
#endif
}
GPTCORE_INLINE HalfBits to_bfloat16(Vec v) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  return bit_cast<HalfBits>(_mm512_cvtneps_pbh((__m512)v));
#else
  UintVec u = bit_cast<UintVec>(v);
  UintVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : ((u >> 16) | 0x40u), HalfBits);
#endif
}
GPTCORE_INLINE void store(bfloat16* p, Vec v) {
  HalfBits bits = to_bfloat16(v);
  memcpy(p, &bits, sizeof bits);
}

GPTCORE_INLINE Vec load(const float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  HalfBits bits;
  memcpy(&bits, p, sizeof bits);
  UintVec h = __builtin_convertvector(bits, UintVec);
  UintVec sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and turns float16's denormals into normal numbers.
  Vec scaled = bit_cast<Vec>(magnitude) * 0x1p112f;
  UintVec special = magnitude | 0x7f800000u;  // infinity and NaN keep their mantissa
  return bit_cast<Vec>((magnitude >= 0x0f800000u ? special : bit_cast<UintVec>(scaled)) | sign);
#endif
}
GPTCORE_INLINE void store(float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  UintVec u = bit_cast<UintVec>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal results: rebias and round to nearest even. Denormal results: adding 0.5 lets the adder do the rounding.
  UintVec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  UintVec denormal = bit_cast<UintVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  UintVec finite = magnitude < 0x38800000u ? denormal : normal;
  UintVec huge = magnitude > 0x7f800000u ? UintVec{} + 0x7e00u : UintVec{} + 0x7c00u;
  HalfBits bits = __builtin_convertvector((magnitude >= 0x477ff000u ? huge : finite) | sign, HalfBits);
  memcpy(p, &bits, sizeof bits);
#endif
}

// Loads or stores the first n < kLanes elements; the other lanes are `fill`.
template <class T>
GPTCORE_INLINE Vec load_partial(const T* p, int64_t n, float fill = 0.0f) {
  T buffer[kLanes] = {};
#if defined(__AVX512BW__) && defined(__AVX512VL__)  // the buffer stays a register
  if (sizeof(T) == 4) _mm512_storeu_ps((float*)buffer, _mm512_maskz_loadu_ps((1u << n) - 1, p));
  else _mm256_storeu_si256((__m256i*)buffer, _mm256_maskz_loadu_epi16((1u << n) - 1, p));
#else
  memcpy(buffer, p, n * sizeof(T));
#endif
  return lane_index() < (int32_t)n ? load(buffer) : splat(fill);
}
template <class T>
GPTCORE_INLINE void store_partial(T* p, Vec v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (1u << n) - 1, _mm512_loadu_ps((const float*)buffer));
  else _mm256_mask_storeu_epi16(p, (1u << n) - 1, _mm256_loadu_si256((const __m256i*)buffer));
#else
  memcpy(p, buffer, n * sizeof(T));
#endif
}

template <class T>
GPTCORE_INLINE Vec load_up_to(const T* p, int64_t n) { return n >= kLanes ? load(p) : load_partial(p, n); }
template <class T>
GPTCORE_INLINE void store_up_to(T* p, Vec v, int64_t n) {
  if (n >= kLanes) store(p, v);
  else store_partial(p, v, n);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)  // GCC 12 compiles the general form to a comparison and a masked move
GPTCORE_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }  // b where either is NaN
GPTCORE_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
GPTCORE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
GPTCORE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// Returns x. A product in x is rounded, never fused with a following addition.
GPTCORE_INLINE Vec rounded(Vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

GPTCORE_INLINE bool any(IntVec mask) {  // of lanes that are all ones or all zeros
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

GPTCORE_INLINE float sum_lanes(Vec v) {  // a fixed tree: the order of addition is always the same
#if defined(__AVX512F__)  // the same tree; GCC 12 compiles the loop to memory accesses
  return _mm512_reduce_add_ps((__m512)v);
#endif
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// 2^x: 0 below -150, infinity above 128, NaN for NaN; at most 1.5 ulp with kDegree 6, 2 ulp with 5. For results rounded
// to 16 bits: relative error 3e-6 with 4 and, for bfloat16, 9e-5 with 3.
template <int kDegree = 6>
GPTCORE_INLINE Vec exp2(Vec x) {
  static_assert(3 <= kDegree && kDegree <= 6, "a degree with coefficients below");
#if defined(__AVX512F__)
  Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x), 0 for infinity
#else
  x = min(splat(130.0f), max(splat(-200.0f), x));
  Vec whole = ((x - 0.5f) + 0x1.8p23f) - 0x1.8p23f;  // rounds to an integer in the mantissa's last place
  Vec f = x - whole;
#endif
  // Minimax polynomials of 2^f on [0, 1] with 2^0 = 1: relative error 9e-5, 3e-6, 8e-8, 2e-9 before rounding.
  Vec p;
  if (kDegree == 3) {
    p = splat(7.7067137e-2f);
    p = p * f + 2.2764489e-1f;
    p = p * f + 6.9511681e-1f;
  } else if (kDegree == 4) {
    p = splat(1.3426688e-2f);
    p = p * f + 5.2242469e-2f;
    p = p * f + 2.4128021e-1f;
    p = p * f + 6.9304484e-1f;
  } else if (kDegree == 5) {
    p = splat(1.8671302e-3f);
    p = p * f + 9.0170300e-3f;
    p = p * f + 5.5799913e-2f;
    p = p * f + 2.4016445e-1f;
    p = p * f + 6.9315131e-1f;
  } else {
    p = splat(2.1612914e-4f);
    p = p * f + 1.2467846e-3f;
    p = p * f + 9.6754516e-3f;
    p = p * f + 5.5485282e-2f;
    p = p * f + 2.4022931e-1f;
    p = p * f + 6.9314706e-1f;
  }
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);  // p x 2^floor(x)
#else
  IntVec n = __builtin_convertvector(whole, IntVec);
  IntVec half = n >> 1;  // in two steps, which neither overflow nor underflow early
  return p * bit_cast<Vec>((half + 127) << 23) * bit_cast<Vec>((n - half + 127) << 23);
#endif
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
