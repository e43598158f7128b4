// Mamba-2 over short blocks and prompts, everything between in_proj and out_proj, in one pass over each group of heads.
//
// A block is one chunk of at most 64 positions, and a prompt's chunk a row of such: within it, products over pairs of positions; from before it, one product
// with the seed S. What takes a state along, which is the context tower's part, goes position by position instead (`step_group`): its
// bits do not depend on how the tokens are cut into blocks. S and all sums are fp32; x, b and c are rounded to bf16 where the torch layer rounds them. A group's
// result depends on nothing but its own row, so that a row has the same bits in any batch.

#include <math.h>

#include "vectors.h"

namespace {

constexpr int64_t kMaxBlock = 64;
constexpr int kMaxKernel = 8;

// A tensor of either type, read as fp32.
struct Floats {
  const void* data;
  bool is_bf16;
  float operator[](int64_t i) const {
    return is_bf16 ? widen(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
  }
};

int64_t padded(int64_t count) { return (count + kFloats - 1) / kFloats * kFloats; }

// Conv and silu of channels [first, first + count) over `length` positions: out (length, count), rounded to bf16.
// columns: the raw channel `first` at the first position, rows `step` apart; tail: (channels, kernel), newest last.
void convolve(const bf16* columns, int64_t step, const bf16* tail, Floats weight, Floats bias, int64_t first, int64_t count,
              int64_t length, int kernel, float* out, bf16* new_tail) {
  for (int64_t c = 0; c < count; c += kFloats) {
    const int64_t channel = first + c;
    alignas(64) float spread[kFloats];
    __m512 taps[kMaxKernel], seen[kMaxBlock + kMaxKernel];
    const auto gather = [&](auto value) {
      for (int i = 0; i < kFloats; i++) spread[i] = value(channel + i);
      return _mm512_load_ps(spread);
    };
    for (int k = 0; k < kernel; k++) {
      taps[k] = gather([&](int64_t of) { return weight[of * kernel + k]; });
      seen[k] = gather([&](int64_t of) { return widen(tail[of * kernel + k]); });
    }
    for (int64_t i = 0; i < length; i++) seen[kernel + i] = load_wide(columns + i * step + c);
    const __m512 shift = bias.data ? gather([&](int64_t of) { return bias[of]; }) : _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i++) {
      __m512 sum = _mm512_mul_ps(seen[i + 1], taps[0]);
      for (int k = 1; k < kernel; k++) sum = _mm512_fmadd_ps(seen[i + 1 + k], taps[k], sum);
      _mm512_storeu_ps(out + i * count + c, rounded(silu(rounded(_mm512_add_ps(sum, shift)))));
    }
    if (new_tail) {
      for (int k = 0; k < kernel; k++) {
        alignas(32) bf16 column[kFloats];
        _mm256_store_si256(reinterpret_cast<__m256i*>(column), narrow(seen[length + k]));
        for (int i = 0; i < kFloats; i++) new_tail[(channel + i) * kernel + k] = column[i];
      }
    }
  }
}

void store_rows(const float* from, int64_t count, int64_t length, bf16* to, int64_t step) {
  for (int64_t i = 0; i < length; i++)
    for (int64_t c = 0; c < count; c += kFloats) store_bf16(to + i * step + c, _mm512_loadu_ps(from + i * count + c));
}

// scores (length, width) = c b^T, width: length padded. c, b (length, n); b_t: room for (n, width).
void pair_scores(const float* c, const float* b, int64_t length, int64_t n, float* b_t, float* scores) {
  const int64_t width = padded(length);
  memset(b_t, 0, n * width * sizeof(float));
  for (int64_t j = 0; j < length; j++)
    for (int64_t k = 0; k < n; k++) b_t[k * width + j] = b[j * n + k];
  for (int64_t i = 0; i < length; i++) {
    for (int64_t j = 0; j < width; j += kFloats) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = 0; k < n; k++) sum = _mm512_fmadd_ps(_mm512_set1_ps(c[i * n + k]), _mm512_loadu_ps(b_t + k * width + j), sum);
      _mm512_storeu_ps(scores + i * width + j, sum);
    }
  }
}

// pairs[i][j] = scores[i][j] * exp(decay from j to i) * dt[j] for j <= i, and since[i] = exp(decay from the start up to and with i).
void decayed(const float* scores, const float* dt, float a, int64_t length, float* pairs, float* since) {
  const int64_t width = padded(length);
  alignas(64) float run[kMaxBlock] = {};  // exp(decay from j to i), of the row at hand
  float whole = 1;
  for (int64_t i = 0; i < length; i++) {
    const float factor = expf(dt[i] * a);
    whole *= factor;
    since[i] = whole;
    for (int64_t j = 0; j < i; j++) run[j] *= factor;
    run[i] = 1;
    for (int64_t j = 0; j <= i; j++) pairs[i * width + j] = scores[i * width + j] * run[j] * dt[j];
  }
}

// y (length, row) += since[i] * (S c_i), for one head: ssm (head_dim, n), c (length, n).
void from_seed(const float* ssm, const float* c, const float* since, int64_t length, int64_t head_dim, int64_t n, float* y,
               int64_t row) {
  for (int64_t p = 0; p < head_dim; p += 4) {
    for (int64_t i = 0; i < length; i += 4) {
      const float* at[4];
      for (int64_t k = 0; k < 4; k++) at[k] = c + (i + k < length ? i + k : length - 1) * n;
      __m512 acc[16];
      for (int k = 0; k < 16; k++) acc[k] = _mm512_setzero_ps();
      for (int64_t s = 0; s < n; s += kFloats) {
        __m512 seed[4];
#pragma GCC unroll 4
        for (int o = 0; o < 4; o++) seed[o] = _mm512_loadu_ps(ssm + (p + o) * n + s);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
          const __m512 of = _mm512_loadu_ps(at[k] + s);
#pragma GCC unroll 4
          for (int o = 0; o < 4; o++) acc[4 * k + o] = _mm512_fmadd_ps(of, seed[o], acc[4 * k + o]);
        }
      }
      alignas(64) float four[16];
      _mm512_store_ps(four, sums(acc));
      for (int64_t k = 0; k < 4 && i + k < length; k++)
        for (int o = 0; o < 4; o++) y[(i + k) * row + p + o] += since[i + k] * four[4 * k + o];
    }
  }
}

// y (length, row) = sum over j <= i of pairs[i][j] x_j, plus d x_i, for one head of x (length, row).
void within(const float* pairs, const float* x, float d, int64_t length, int64_t head_dim, float* y, int64_t row) {
  const int64_t width = padded(length);
  for (int64_t p = 0; p < head_dim; p += kFloats) {
    for (int64_t i = 0; i < length; i++) {
      __m512 sum = _mm512_mul_ps(_mm512_set1_ps(d), _mm512_loadu_ps(x + i * row + p));
      for (int64_t j = 0; j <= i; j++)
        sum = _mm512_fmadd_ps(_mm512_set1_ps(pairs[i * width + j]), _mm512_loadu_ps(x + j * row + p), sum);
      _mm512_storeu_ps(y + i * row + p, sum);
    }
  }
}

// out = norm(y silu(z)) weight, over `count` channels.
void gated_norm(const float* y, const bf16* z, const float* weight, float eps, int64_t count, float* gated, bf16* out) {
  __m512 square = _mm512_setzero_ps();
  for (int64_t c = 0; c < count; c += kFloats) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(y + c), silu(load_wide(z + c)));
    _mm512_storeu_ps(gated + c, v);
    square = _mm512_fmadd_ps(v, v, square);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(square) / count + eps));
  for (int64_t c = 0; c < count; c += kFloats) {
    const __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(gated + c), scale), _mm512_loadu_ps(weight + c));
    store_bf16(out + c, v);
  }
}

// Sizes of a layer, and what it holds between its projections.
struct Layer {
  int64_t heads, head_dim, groups, n;
  int kernel;
  Floats weight, bias;
  const float *dt_bias, *a, *d, *norm;
  float eps, dt_low, dt_high;

  int64_t inner() const { return heads * head_dim; }
  int64_t channels() const { return inner() + 2 * groups * n; }
  int64_t own() const { return heads / groups; }     // heads of a group
  int64_t count() const { return own() * head_dim; }  // their channels
};

// What a thread works with, for up to `length` positions of one group.
struct Scratch {
  float *x, *y;           // (length, count)
  float *b, *c;           // (length, n)
  float* b_t;             // (n, width): width is length, padded
  float *scores, *pairs;  // (length, width)
  float* gated;           // (count)
  float* dt;              // (own, length)
  float* since;           // (length)

  static int64_t room(const Layer& layer, int64_t length) {
    return length * (2 * layer.count() + 2 * layer.n) + layer.n * padded(length) + 2 * length * padded(length) + layer.count() +
           layer.own() * length + length;
  }

  Scratch(float* memory, const Layer& layer, int64_t length) {
    const auto take = [&](int64_t size) { return memory += size, memory - size; };
    x = take(length * layer.count()), y = take(length * layer.count());
    b = take(length * layer.n), c = take(length * layer.n), b_t = take(layer.n * padded(length));
    scores = take(length * padded(length)), pairs = take(length * padded(length));
    gated = take(layer.count()), dt = take(layer.own() * length), since = take(length);
  }
};

float time_step(const Layer& layer, bf16 projected, int64_t head) {
  const float raw = widen(projected) + layer.dt_bias[head];
  const float soft = raw > 20 ? raw : log1pf(expf(raw));
  const float low = soft < layer.dt_low ? layer.dt_low : soft;  // keeps NaN
  return low > layer.dt_high ? layer.dt_high : low;
}

// One group's output over `length` <= 64 positions from a seed. z: projected at the first position, rows `step` apart; tail
// (channels, kernel), ssm (heads, head_dim, n); out: (.., inner) at the first position. The new tail of the group's channels goes to
// `new_tail`, which may be `tail` itself, or nowhere. Leaves x, b and dt in `s`.
void scan_group(const Layer& layer, int64_t g, const bf16* z, int64_t step, int64_t length, const bf16* tail, const float* ssm,
                const Scratch& s, bf16* new_tail, bf16* out) {
  const int64_t inner = layer.inner(), channels = layer.channels(), own = layer.own(), count = layer.count();
  const int64_t head_dim = layer.head_dim, n = layer.n;
  const bf16* xbc = z + inner;
  const auto conv = [&](int64_t first, int64_t many, float* to) {
    convolve(xbc + first, step, tail, layer.weight, layer.bias, first, many, length, layer.kernel, to, new_tail);
  };
  conv(g * count, count, s.x);
  conv(inner + g * n, n, s.b);
  conv(inner + (layer.groups + g) * n, n, s.c);
  pair_scores(s.c, s.b, length, n, s.b_t, s.scores);
  for (int64_t h = 0; h < own; h++) {
    const int64_t head = g * own + h;
    for (int64_t i = 0; i < length; i++) s.dt[h * length + i] = time_step(layer, z[i * step + inner + channels + head], head);
    decayed(s.scores, s.dt + h * length, layer.a[head], length, s.pairs, s.since);
    within(s.pairs, s.x + h * head_dim, layer.d[head], length, head_dim, s.y + h * head_dim, count);
    from_seed(ssm + head * head_dim * n, s.c, s.since, length, head_dim, n, s.y + h * head_dim, count);
  }
  for (int64_t i = 0; i < length; i++)
    gated_norm(s.y + i * count, z + i * step + g * count, layer.norm + g * count, layer.eps, count, s.gated,
               out + i * inner + g * count);
}

// One head's S (head_dim, n) past `length` positions: x (length, row), b (length, n), dt (length).
void advance(float* ssm, const float* x, int64_t row, const float* b, const float* dt, float a, int64_t length, int64_t head_dim,
             int64_t n) {
  alignas(64) float fade[kMaxBlock];
  for (int64_t i = 0; i < length; i++) fade[i] = expf(dt[i] * a);
  for (int64_t p = 0; p < head_dim; p += 8) {
    for (int64_t k = 0; k < n; k += kFloats) {
      __m512 acc[8];
#pragma GCC unroll 8
      for (int o = 0; o < 8; o++) acc[o] = _mm512_loadu_ps(ssm + (p + o) * n + k);
      for (int64_t i = 0; i < length; i++) {
        const __m512 factor = _mm512_set1_ps(fade[i]), of = _mm512_loadu_ps(b + i * n + k);
#pragma GCC unroll 8
        for (int o = 0; o < 8; o++)
          acc[o] = _mm512_fmadd_ps(_mm512_set1_ps(dt[i] * x[i * row + p + o]), of, _mm512_mul_ps(acc[o], factor));
      }
#pragma GCC unroll 8
      for (int o = 0; o < 8; o++) _mm512_storeu_ps(ssm + (p + o) * n + k, acc[o]);
    }
  }
}

// As scan_group, position by position: a position has the bits that it has in a block of its own, from the S that tt_apply_factors
// leaves behind those before it. dt, decay: (length, heads) at the first position. Leaves x and b in `s`.
void step_group(const Layer& layer, int64_t g, const bf16* z, int64_t step, int64_t length, const bf16* tail, const float* ssm,
                const float* dt, const float* decay, const Scratch& s, bf16* new_tail, bf16* out) {
  const int64_t inner = layer.inner(), own = layer.own(), count = layer.count(), head_dim = layer.head_dim, n = layer.n;
  const bf16* xbc = z + inner;
  const auto conv = [&](int64_t first, int64_t many, float* to) {
    convolve(xbc + first, step, tail, layer.weight, layer.bias, first, many, length, layer.kernel, to, new_tail);
  };
  conv(g * count, count, s.x);
  conv(inner + g * n, n, s.b);
  conv(inner + (layer.groups + g) * n, n, s.c);
  for (int64_t h = 0; h < own; h++) {
    const int64_t head = g * own + h;
    for (int64_t p = 0; p < head_dim; p += 4) {
      float* rows = s.b_t;  // four rows of S; it has room for n rows of 16
      memcpy(rows, ssm + (head * head_dim + p) * n, 4 * n * sizeof(float));
      for (int64_t i = 0; i < length; i++) {
        const float of = dt[i * layer.heads + head];
        const float* x = s.x + i * count + h * head_dim + p;
        const __m512 fade = _mm512_set1_ps(decay[i * layer.heads + head]);
        __m512 dtx[4], acc[4];
#pragma GCC unroll 4
        for (int o = 0; o < 4; o++) dtx[o] = _mm512_set1_ps(of * x[o]), acc[o] = _mm512_setzero_ps();
        for (int64_t k = 0; k < n; k += kFloats) {
          const __m512 b = _mm512_loadu_ps(s.b + i * n + k), c = _mm512_loadu_ps(s.c + i * n + k);
#pragma GCC unroll 4
          for (int o = 0; o < 4; o++) {
            float* at = rows + o * n + k;
            const __m512 moved = _mm512_fmadd_ps(dtx[o], b, _mm512_mul_ps(_mm512_loadu_ps(at), fade));
            _mm512_storeu_ps(at, moved);
            acc[o] = _mm512_fmadd_ps(moved, c, acc[o]);
          }
        }
        for (int o = 0; o < 4; o++) s.y[i * count + h * head_dim + p + o] = fmaf(layer.d[head], x[o], _mm512_reduce_add_ps(acc[o]));
      }
    }
  }
  for (int64_t i = 0; i < length; i++)
    gated_norm(s.y + i * count, z + i * step + g * count, layer.norm + g * count, layer.eps, count, s.gated,
               out + i * inner + g * count);
}

}  // namespace

extern "C" {

// dt (batch, length, heads) fp32 of a block, from dt_bias (heads) and the limits; projected as for tt_block_scan.
void tt_time_steps(const bf16* projected, int64_t row, int64_t step, const float* dt_bias, float dt_low, float dt_high, float* dt,
                   int64_t batch, int64_t length, int64_t width, int64_t heads) {
  Layer layer{};
  layer.dt_bias = dt_bias, layer.dt_low = dt_low, layer.dt_high = dt_high;
  for (int64_t r = 0; r < batch; r++)
    for (int64_t i = 0; i < length; i++)
      for (int64_t h = 0; h < heads; h++)
        dt[(r * length + i) * heads + h] = time_step(layer, projected[r * row + i * step + width - heads + h], h);
}

// A block of `length` <= 64 positions in `batch` rows. channels = heads * head_dim + 2 * groups * n; head_dim and n are multiples of 16.
//
// projected (batch, length, z | xBC | dt) bf16, its first two axes `row` and `step` elements apart; tails (.., channels, kernel) bf16
// and ssm (.., heads, head_dim, n): row i starts from slots[i], or from i without slots; neither is changed.
// conv_weight (channels, kernel) and conv_bias (channels), or null, are bf16 if `conv_bf16`, else fp32. dt_bias, a, d (heads), norm (heads * head_dim): fp32.
// out (batch, length, heads * head_dim) bf16. Where x is not null, it goes position by position, with dt of tt_time_steps and decay =
// exp(dt a), both (batch, length, heads) fp32, and the factors are written: x (batch, length, heads, head_dim), b (batch, length, groups, n),
// new_tails (batch, channels, kernel). 1 if memory ran out, 0 if done.
int tt_block_scan(const bf16* projected, int64_t row, int64_t step, const bf16* tails, const float* ssm, const int64_t* slots,
                  const void* conv_weight, const void* conv_bias, int conv_bf16, const float* dt_bias, const float* a, const float* d,
                  const float* norm, float eps, float dt_low, float dt_high, bf16* out, bf16* x, bf16* b, const float* dt, const float* decay,
                  bf16* new_tails, int64_t batch, int64_t length, int64_t heads, int64_t head_dim, int64_t groups, int64_t n, int kernel,
                  int threads) {
  const Layer layer{heads, head_dim, groups, n,    kernel, {conv_weight, conv_bf16 != 0}, {conv_bias, conv_bf16 != 0},
                    dt_bias, a,      d,      norm, eps,    dt_low,                        dt_high};
  const int64_t inner = layer.inner(), channels = layer.channels(), count = layer.count();
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* memory = static_cast<float*>(malloc(Scratch::room(layer, length) * sizeof(float)));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    const Scratch s(memory, layer, length);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t r = 0; r < batch; r++) {
      for (int64_t g = 0; g < groups; g++) {
        if (!memory) continue;
        const int64_t slot = slots ? slots[r] : r;
        const bf16 *from = projected + r * row, *tail = tails + slot * channels * kernel;
        const float* seed = ssm + slot * inner * n;
        if (x) {
          const int64_t first = r * length * heads;
          step_group(layer, g, from, step, length, tail, seed, dt + first, decay + first, s, new_tails + r * channels * kernel,
                     out + r * length * inner);
          store_rows(s.x, count, length, x + r * length * inner + g * count, inner);
          store_rows(s.b, n, length, b + r * length * groups * n + g * n, groups * n);
        } else {
          scan_group(layer, g, from, step, length, tail, seed, s, nullptr, out + r * length * inner);
        }
      }
    }
    free(memory);
  }
  return failed;
}

// Chunks of any lengths, `batch` of them one behind the other, in pieces of 64 positions: chunk i is [borders[i], borders[i + 1]).
//
// Arguments as above, but: projected (positions, ..), rows `step` apart; out (positions, heads * head_dim); tails and ssm are taken past
// the chunks, in place. A chunk's results depend on nothing but its own inputs. 1 if memory ran out, 0 if done.
int tt_prefill_scan(const bf16* projected, int64_t step, const int64_t* borders, bf16* tails, float* ssm, const int64_t* slots,
                    const void* conv_weight, const void* conv_bias, int conv_bf16, const float* dt_bias, const float* a, const float* d,
                    const float* norm, float eps, float dt_low, float dt_high, bf16* out, int64_t batch, int64_t heads,
                    int64_t head_dim, int64_t groups, int64_t n, int kernel, int threads) {
  const Layer layer{heads, head_dim, groups, n,    kernel, {conv_weight, conv_bf16 != 0}, {conv_bias, conv_bf16 != 0},
                    dt_bias, a,      d,      norm, eps,    dt_low,                        dt_high};
  const int64_t inner = layer.inner(), own = layer.own();
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* memory = static_cast<float*>(malloc(Scratch::room(layer, kMaxBlock) * sizeof(float)));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    const Scratch s(memory, layer, kMaxBlock);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t r = 0; r < batch; r++) {
      for (int64_t g = 0; g < groups; g++) {
        if (!memory) continue;
        const int64_t slot = slots ? slots[r] : r;
        bf16* tail = tails + slot * layer.channels() * kernel;
        float* state = ssm + slot * inner * n;
        for (int64_t at = borders[r]; at < borders[r + 1]; at += kMaxBlock) {
          const int64_t length = borders[r + 1] - at < kMaxBlock ? borders[r + 1] - at : kMaxBlock;
          scan_group(layer, g, projected + at * step, step, length, tail, state, s, tail, out + at * inner);
          for (int64_t h = 0; h < own; h++)
            advance(state + (g * own + h) * head_dim * n, s.x + h * head_dim, layer.count(), s.b, s.dt + h * length, a[g * own + h],
                    length, head_dim, n);
        }
      }
    }
    free(memory);
  }
  return failed;
}

// S past `length` positions, in place: per position S * decay, rounded, then a fused multiply-add of (dt x) b. The bits of the
// torch form, which does the same with one pass over S for each of these.
//
// ssm (.., heads, head_dim, n), row i at slots[i], or at i without slots; of row i the first counts[i] positions, or all; x (batch, length, heads, head_dim) and b (batch, length, groups, n)
// bf16, dt and decay (batch, length, heads) fp32.
void tt_apply_factors(float* ssm, const int64_t* slots, const int64_t* counts, const bf16* x, const bf16* b, const float* dt,
                      const float* decay, int64_t batch, int64_t length, int64_t heads, int64_t head_dim, int64_t groups, int64_t n, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic, 4) if (threads > 1)
  for (int64_t r = 0; r < batch; r++) {
    for (int64_t head = 0; head < heads; head++) {
      float* s = ssm + ((slots ? slots[r] : r) * heads + head) * head_dim * n;
      const int64_t count = counts ? counts[r] : length;
      const bf16* from = b + (r * length * groups + head / (heads / groups)) * n;
      for (int64_t p = 0; p < head_dim; p += 4) {
        for (int64_t k = 0; k < n; k += 2 * kFloats) {
          const __mmask16 mask = lanes(n - k), next = k + kFloats < n ? 0xffff : 0;
          __m512 acc[8];
#pragma GCC unroll 4
          for (int o = 0; o < 4; o++) {
            acc[2 * o] = _mm512_maskz_loadu_ps(mask, s + (p + o) * n + k);
            acc[2 * o + 1] = _mm512_maskz_loadu_ps(next, s + (p + o) * n + k + kFloats);
          }
          for (int64_t i = 0; i < count; i++) {
            const int64_t at = (r * length + i) * heads + head;
            const __m512 fade = _mm512_set1_ps(decay[at]);
            const __m512 low = load_wide(from + i * groups * n + k, mask), high = load_wide(from + i * groups * n + k + kFloats, next);
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++) {
              const __m512 dtx = _mm512_set1_ps(dt[at] * widen(x[at * head_dim + p + o]));
              acc[2 * o] = _mm512_fmadd_ps(dtx, low, _mm512_mul_ps(acc[2 * o], fade));
              acc[2 * o + 1] = _mm512_fmadd_ps(dtx, high, _mm512_mul_ps(acc[2 * o + 1], fade));
            }
          }
#pragma GCC unroll 4
          for (int o = 0; o < 4; o++) {
            _mm512_mask_storeu_ps(s + (p + o) * n + k, mask, acc[2 * o]);
            _mm512_mask_storeu_ps(s + (p + o) * n + k + kFloats, next, acc[2 * o + 1]);
          }
        }
      }
    }
  }
}

}  // extern "C"
