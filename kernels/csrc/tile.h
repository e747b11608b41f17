// Matrix products in tiles of up to 14 x 32 numbers, in float32 or in bfloat16 with float32 sums.
//
// A product runs over 32-bit words: one float, or two neighbours in the summed direction in bfloat16 (vdpbf16ps). In
// words both types have one layout, one kernel and one transposition:
//
//     left    rows of words, broadcast one by one. Either rows as they lie in memory, a stride apart ("rows"), or
//             packed [word][16], of which a tile's rows are the first ("columns")
//     right   packed [word][32], padded with 0
//
// 28 sums, two registers of the right side and one broadcast fill the 32 registers of AVX-512: two multiply-adds a
// cycle, for which one broadcast and a seventh of a load each suffice.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activation.h"

namespace gatewright {

constexpr long MR = 14, NR = 32, LANES = 16;
// Words summed in one register before they are added to the tile: bounds the rounding error of long sums.
constexpr long CHUNK = 256;

using Word = uint32_t;
using BFloat16 = uint16_t;
struct alignas(64) Tile {
    float at[MR][NR];
};

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

template <class T>
constexpr long PER_WORD = sizeof(Word) / sizeof(T);

// How `count` rows are cut into stretches of at most 14 as even as can be, of whole words' rows each.
struct Cut {
    long count, unit, parts;
    Cut(long count_, long unit_) : count(count_), unit(unit_), parts(ceil_div(count_, MR)) {}
    long begin(long part) const { return std::min(count, part * ceil_div(count, unit) / std::max(parts, 1L) * unit); }
    long size(long part) const { return begin(part + 1) - begin(part); }
};

// The first n lanes, n of any sign or size.
inline __mmask16 lanes(long n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// Whole vectors go without a mask: a masked store of 16-bit numbers is slow, and no load can take its data from it
// before it is in the cache.
constexpr __mmask16 ALL = 0xffff;

inline Vec load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline void store(float* to, __mmask16 mask, Vec value) {
    mask == ALL ? _mm512_storeu_ps(to, value) : _mm512_mask_storeu_ps(to, mask, value);
}
inline Vec load(const BFloat16* from, __mmask16 mask) {
    const __m256i half = mask == ALL ? _mm256_loadu_si256((const __m256i*)from) : _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store(BFloat16* to, __mmask16 mask, Vec value) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
    mask == ALL ? _mm256_storeu_si256((__m256i*)to, half) : _mm256_mask_storeu_epi16(to, mask, half);
}

template <class T>
inline Vec rounded(Vec value) {
    if constexpr (sizeof(T) == 4) return value;
    __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// ---- The kernel ----

template <class T>
inline __attribute__((always_inline)) Vec multiply_add(Vec left, Vec right, Vec sum) {
    if constexpr (sizeof(T) == 4) return _mm512_fmadd_ps(left, right, sum);
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}

// In assembly, because the compiler would fold the load into both multiply-adds: twice the loads.
inline __attribute__((always_inline)) Vec broadcast(const char* from) {
    Vec value;
    asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*(const float*)from));
    return value;
}

// tile (+)= left right^T over `words` words.
template <class T, bool COLUMNS, int ROWS>
void multiply(const Word* left, long stride, const Word* right, long words, Tile& tile, bool add) {
    Vec sum[ROWS][2];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) sum[row][0] = sum[row][1] = _mm512_setzero_ps();
    // every third row has a pointer; the two behind it are one and two strides away, which an address can say
    const long step = COLUMNS ? sizeof(Word) * LANES : sizeof(Word);
    const long row_step = COLUMNS ? sizeof(Word) : stride * sizeof(Word);
    const char* p0 = (const char*)left;
    const char *p1 = p0 + 3 * row_step, *p2 = p1 + 3 * row_step, *p3 = p2 + 3 * row_step, *p4 = p3 + 3 * row_step;
    for (long word = 0; word < words; word++) {
        Vec r0 = _mm512_load_ps((const float*)right), r1 = _mm512_load_ps((const float*)right + LANES);
#pragma GCC unroll 14
        for (int row = 0; row < ROWS; row++) {
            const char* third = row < 3 ? p0 : row < 6 ? p1 : row < 9 ? p2 : row < 12 ? p3 : p4;
            Vec value = COLUMNS ? broadcast(p0 + row * sizeof(Word)) : broadcast(third + row % 3 * row_step);
            sum[row][0] = multiply_add<T>(value, r0, sum[row][0]);
            sum[row][1] = multiply_add<T>(value, r1, sum[row][1]);
        }
        right += NR;
        p0 += step;
        if constexpr (!COLUMNS) {
            p1 += step, p2 += step, p3 += step, p4 += step;
            asm volatile("" : "+r"(p0), "+r"(p1), "+r"(p2), "+r"(p3), "+r"(p4));  // keeps them five
        }
    }
    // no loop over a register's index that stays a loop: the sums would be kept in memory
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) {
        float *low = tile.at[row], *high = low + LANES;
        if (add) sum[row][0] = _mm512_add_ps(_mm512_load_ps(low), sum[row][0]);
        if (add) sum[row][1] = _mm512_add_ps(_mm512_load_ps(high), sum[row][1]);
        _mm512_store_ps(low, sum[row][0]);
        _mm512_store_ps(high, sum[row][1]);
    }
}

template <class T, bool COLUMNS>
void multiply_rows(long rows, const Word* left, long stride, const Word* right, long words, Tile& tile) {
    using Kernel = void (*)(const Word*, long, const Word*, long, Tile&, bool);
#define GATEWRIGHT_ROWS(n) multiply<T, COLUMNS, n>
    static constexpr Kernel kernels[MR] = {
        GATEWRIGHT_ROWS(1), GATEWRIGHT_ROWS(2), GATEWRIGHT_ROWS(3), GATEWRIGHT_ROWS(4), GATEWRIGHT_ROWS(5),
        GATEWRIGHT_ROWS(6), GATEWRIGHT_ROWS(7), GATEWRIGHT_ROWS(8), GATEWRIGHT_ROWS(9), GATEWRIGHT_ROWS(10),
        GATEWRIGHT_ROWS(11), GATEWRIGHT_ROWS(12), GATEWRIGHT_ROWS(13), GATEWRIGHT_ROWS(14)};
#undef GATEWRIGHT_ROWS
    Kernel kernel = kernels[rows - 1];
    for (long word = 0; word < words; word += CHUNK) {
        const long now = std::min(CHUNK, words - word);
        kernel(left + word * (COLUMNS ? LANES : 1), stride, right + word * NR, now, tile, word > 0);
    }
}

// ---- Packing ----

inline void transpose(__m512i rows[LANES]) {
    __m512i a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

// Up to 16 rows of `width` numbers, a stride apart -> to[word][NR], 16 columns of it; missing rows and numbers are 0.
template <class T>
void pack_rows(const T* from, long stride, long rows, long width, Word* to) {
    constexpr long step = LANES * PER_WORD<T>;
    for (long at = 0; at < width; at += step) {
        __m512i words[LANES];
        const long left = std::min(step, width - at);
        for (long row = 0; row < LANES; row++) {
            const T* source = from + row * stride + at;
            if (row >= rows) {
                words[row] = _mm512_setzero_si512();
            } else if constexpr (sizeof(T) == 4) {
                words[row] = _mm512_maskz_loadu_epi32(lanes(left), source);
            } else {
                words[row] = _mm512_maskz_loadu_epi16(left == step ? ~0u : (1u << left) - 1, source);
            }
        }
        transpose(words);
        for (long word = 0; word < ceil_div(left, PER_WORD<T>); word++) _mm512_store_si512(to + word * NR, words[word]);
        to += LANES * NR;
    }
}

// Word of each of 16 columns: a float of `first`; in bfloat16 a number of `first` and the one below it in `second`.
inline __m512i pair(const float* first, const float*, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, first); }
inline __m512i pair(const BFloat16* first, const BFloat16* second, __mmask16 mask) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
    if (second == nullptr) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// `height` rows of up to 32 columns, a stride apart -> to[word][NR], summed along the height; missing columns are 0.
template <class T>
void pack_columns(const T* from, long stride, long height, long columns, Word* to) {
    const __mmask16 low = lanes(columns), high = lanes(columns - LANES);
    for (long row = 0; row < height; row += PER_WORD<T>) {
        const T* second = PER_WORD<T> == 2 && row + 1 < height ? from + stride : nullptr;
        _mm512_store_si512(to, pair(from, second, low));
        _mm512_store_si512(to + LANES, pair(from + LANES, second ? second + LANES : nullptr, high));
        from += PER_WORD<T> * stride;
        to += NR;
    }
}

}  // namespace gatewright
