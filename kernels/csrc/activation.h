// Activations and their derivatives, sixteen numbers at a time. Polynomials are least-squares fits whose weights were
// moved towards the largest error (errors given are of the fit, in exact arithmetic).
#pragma once
#include <immintrin.h>

namespace gatewright {

using Vec = __m512;

inline Vec set(float value) { return _mm512_set1_ps(value); }

// Horner's rule, coefficients from the highest power down.
template <class... Rest>
inline Vec polynomial(Vec x, Vec sum, Rest... rest) {
    ((sum = _mm512_fmadd_ps(sum, x, set(rest))), ...);
    return sum;
}

// e^x = 2^n (1 + r + r^2 g(r)), |r| <= ln(2) / 2; relative error 1e-8 before rounding. NaN stays NaN: the bounds are
// the first operand, and the second is what min and max return then. Never infinite.
inline Vec exp(Vec x) {
    x = _mm512_max_ps(set(-104.0f), _mm512_min_ps(set(88.0f), x));
    Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // ln 2 in two parts, so that n ln 2 is taken off without rounding
    Vec r = _mm512_fnmadd_ps(n, set(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, set(1.42860677e-06f), r);
    Vec g = polynomial(r, set(1.3901279e-03f), 8.3631449e-03f, 4.16668535e-02f, 1.666657729e-01f, 0.5f);
    Vec mantissa = _mm512_add_ps(set(1.0f), _mm512_fmadd_ps(_mm512_mul_ps(r, r), g, r));
    return _mm512_scalef_ps(mantissa, n);
}

// 1 / (1 + e^-x), and 1 minus that without cancellation.
struct Sigmoid {
    Vec value, rest;
};
inline Sigmoid sigmoid(Vec x) {
    Vec e = exp(_mm512_sub_ps(_mm512_setzero_ps(), x)), value = _mm512_div_ps(set(1.0f), _mm512_add_ps(set(1.0f), e));
    return {value, _mm512_mul_ps(value, e)};
}

// x P(x^2) up to 1 (relative error 1e-9), 1 - e^-Q(x) up to 4 (1e-9), 1 beyond.
inline Vec erf(Vec x) {
    Vec size = _mm512_abs_ps(x), s = _mm512_mul_ps(x, x);
    Vec small = _mm512_mul_ps(x, polynomial(
        s, set(7.853854599e-05f), -8.010191582e-04f, 5.188327453e-03f, -2.685381181e-02f, 1.128358515e-01f,
        -3.761262582e-01f, 1.128379166f));
    Vec bounded = _mm512_min_ps(set(4.0f), size);
    Vec q = polynomial(
        bounded, set(-1.600543628e-06f), 4.531342524e-05f, -5.903422756e-04f, 4.72839325e-03f, -2.632970418e-02f,
        1.099139388e-01f, 6.320085001e-01f, 1.130122936f, -2.919154841e-04f);
    Vec large = _mm512_sub_ps(set(1.0f), exp(_mm512_sub_ps(_mm512_setzero_ps(), q)));
    const Vec sign = _mm512_and_ps(x, set(-0.0f));
    return _mm512_mask_or_ps(small, _mm512_cmp_ps_mask(size, set(1.0f), _CMP_GT_OQ), large, sign);
}

enum Activation { GELU, GELU_TANH, RELU, RELU2, SILU, SWIGLU, GEGLU };

constexpr bool is_gated(Activation f) { return f == SWIGLU || f == GEGLU; }
// What a gated activation does to its gate.
constexpr Activation of_gate(Activation f) { return f == SWIGLU ? SILU : f == GEGLU ? GELU : f; }

struct ValueAndSlope {
    Vec value, slope;
};

// f(x) and, where asked for, f'(x).
template <Activation F, bool SLOPE>
inline ValueAndSlope activate(Vec x) {
    const Vec zero = _mm512_setzero_ps(), one = set(1.0f);
    Vec slope = zero;
    if constexpr (F == RELU || F == RELU2) {
        // a NaN goes through: max returns its second operand then
        Vec value = _mm512_max_ps(zero, x);
        if constexpr (F == RELU2) return {_mm512_mul_ps(value, value), _mm512_add_ps(value, value)};
        return {value, _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero, _CMP_NLE_UQ), one)};
    } else if constexpr (F == SILU) {
        Sigmoid s = sigmoid(x);
        Vec value = _mm512_mul_ps(x, s.value);
        if (SLOPE) slope = _mm512_fmadd_ps(value, s.rest, s.value);
        return {value, slope};
    } else if constexpr (F == GELU) {
        Vec phi = _mm512_fmadd_ps(set(0.5f), erf(_mm512_mul_ps(x, set(0.70710678f))), set(0.5f));
        if (SLOPE) {
            Vec density = exp(_mm512_mul_ps(_mm512_mul_ps(x, x), set(-0.5f)));
            slope = _mm512_fmadd_ps(_mm512_mul_ps(x, set(0.39894228f)), density, phi);
        }
        return {_mm512_mul_ps(x, phi), slope};
    } else {
        static_assert(F == GELU_TANH);
        // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        Vec square = _mm512_mul_ps(x, x);
        Vec u2 = _mm512_mul_ps(_mm512_mul_ps(x, set(1.59576912f)), _mm512_fmadd_ps(square, set(0.044715f), one));
        Sigmoid s = sigmoid(u2);
        Vec value = _mm512_mul_ps(x, s.value);
        if (SLOPE) {
            Vec du2 = _mm512_fmadd_ps(square, set(0.21406442f), set(1.59576912f));
            slope = _mm512_fmadd_ps(_mm512_mul_ps(value, s.rest), du2, s.value);
        }
        return {value, slope};
    }
}

}  // namespace gatewright
