// The choice of experts for each token: logits in fp64, sigmoid scores, the best `k` of scores + correction.

#include <initializer_list>

#include "vectors.h"

namespace {

constexpr int kDoubles = 8;  // fp64 of a vector

// e^x in fp64 within a few ulp, for finite x. NaN stays NaN.
inline __m512d exp(__m512d x) {
  x = _mm512_min_pd(_mm512_set1_pd(710.0), _mm512_max_pd(_mm512_set1_pd(-746.0), x));  // of NaN the second operand
  const __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(1.4426950408889634)), 0);
  __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(6.93147180369123816490e-01), x);
  r = _mm512_fnmadd_pd(n, _mm512_set1_pd(1.90821492927058770002e-10), r);
  __m512d p = _mm512_set1_pd(1.0 / 6227020800);  // 1 / 13!, and down: the rest is below 1 ulp for |r| <= ln(2) / 2
  for (const double f : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                         1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2, 1.0, 1.0})
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(f));
  return _mm512_scalef_pd(p, n);
}

// out[t][e], t and e < 4: dot products of 4 tokens (size, fp64) with 4 rows of weights (size, fp64); size a multiple of 8.
inline void dots(const double* const* token, const double* const* weight, int64_t size, double (*out)[4]) {
  __m512d acc[16];
  for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_pd();
  for (int64_t at = 0; at < size; at += kDoubles) {
    __m512d of[4];
#pragma GCC unroll 4
    for (int e = 0; e < 4; e++) of[e] = _mm512_loadu_pd(weight[e] + at);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
      const __m512d own = _mm512_loadu_pd(token[t] + at);
#pragma GCC unroll 4
      for (int e = 0; e < 4; e++) acc[4 * t + e] = _mm512_fmadd_pd(own, of[e], acc[4 * t + e]);
    }
  }
  for (int i = 0; i < 16; i++) out[i / 4][i % 4] = _mm512_reduce_add_pd(acc[i]);
}

}  // namespace

extern "C" {

// hidden (n, size) bf16, contiguous, weight (count, size) and correction (count) fp64; size a multiple of 8, count of 8.
// chosen (n, k) int64, best first, of equal ones the lower; weights (n, k) fp32: scores, over their sum if `normalize`, times `scale`.
// 1 if memory ran out, 0 if done.
int tt_route(const bf16* hidden, const double* weight, const double* correction, int64_t* chosen, float* weights, int64_t n, int64_t size,
             int64_t count, int64_t k, int normalize, double scale, int threads) {
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && n >= 16)
  {
    double* tokens = static_cast<double*>(aligned_alloc(64, 4 * size * sizeof(double)));
    double* scores = static_cast<double*>(aligned_alloc(64, 4 * count * sizeof(double)));
    double* choice = static_cast<double*>(aligned_alloc(64, count * sizeof(double)));
    const bool sound = tokens && scores && choice;
    if (!sound) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < n; first += 4) {
      if (!sound) continue;
      const int64_t own = n - first < 4 ? n - first : 4;
      const double* token[4];
      for (int64_t t = 0; t < 4; t++) {
        token[t] = tokens + (t < own ? t : 0) * size;
        if (t >= own) continue;
        for (int64_t i = 0; i < size; i += kDoubles) {
          const __m256 wide = _mm512_castps512_ps256(load_wide(hidden + (first + t) * size + i, 0xff));
          _mm512_store_pd(tokens + t * size + i, _mm512_cvtps_pd(wide));
        }
      }
      for (int64_t e = 0; e < count; e += 4) {
        const double* of[4] = {weight + e * size, weight + (e + 1) * size, weight + (e + 2) * size, weight + (e + 3) * size};
        double out[4][4];
        dots(token, of, size, out);
        for (int64_t t = 0; t < own; t++) memcpy(scores + t * count + e, out[t], sizeof(out[t]));
      }
      for (int64_t t = 0; t < own; t++) {
        double* score = scores + t * count;
        const __m512d one = _mm512_set1_pd(1.0);
        for (int64_t e = 0; e < count; e += kDoubles) {
          const __m512d s = _mm512_div_pd(one, _mm512_add_pd(one, exp(_mm512_sub_pd(_mm512_setzero_pd(), _mm512_load_pd(score + e)))));
          _mm512_store_pd(score + e, s);
          _mm512_store_pd(choice + e, _mm512_add_pd(s, _mm512_loadu_pd(correction + e)));
        }
        int64_t* to = chosen + (first + t) * k;
        float* out = weights + (first + t) * k;
        double sum = 1e-20;
        for (int64_t j = 0; j < k; j++) {
          int64_t best = 0;
          for (int64_t e = 1; e < count; e++)
            if (choice[e] > choice[best] || (choice[best] != choice[best] && choice[e] == choice[e])) best = e;
          choice[best] = -__builtin_inf();
          to[j] = best;
          sum += score[best];
        }
        for (int64_t j = 0; j < k; j++) out[j] = static_cast<float>((normalize ? score[to[j]] / sum : score[to[j]]) * scale);
      }
    }
    free(tokens), free(scores), free(choice);
  }
  return failed;
}

}  // extern "C"
