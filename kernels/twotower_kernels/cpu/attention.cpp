// Attention of a block over a session's keys and values, bf16: the queries of all heads that share a KV head are one matrix.

#include "vectors.h"

namespace {

constexpr int64_t kQueries = 128;  // queries of a tile, whose sums stay in the second-level cache
constexpr int64_t kKeys = 64;      // keys that are processed at a time

// 16 rows of 16 values become columns.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
    }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++) {
      t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0x88);
      t[8 * i + j + 4] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// A thread's buffers. Pairs are two bf16 that one instruction multiplies and adds.
struct Tile {
  uint32_t* queries;  // (kQueries, dim / 2) pairs along dim
  uint32_t* keys;     // (dim / 2, kKeys) pairs along dim
  uint32_t* values;   // (kKeys / 2, dim) pairs along keys
  uint32_t* weights;  // (kQueries, kKeys / 2) pairs along keys
  float* scores;      // (kQueries, kKeys)
  float* out;         // (kQueries, dim)
  float top[kQueries], total[kQueries];
};

// Loads keys and values of up to kKeys tokens; missing ones become 0.
void pack(const Tile& tile, const bf16* k, const bf16* v, int64_t count, int64_t dim) {
  for (int64_t d = 0; d < dim / 2; d += kFloats)
    for (int64_t first = 0; first < kKeys; first += 16) {
      __m512i rows[16];
      for (int64_t i = 0; i < 16; i++)
        rows[i] = first + i < count ? _mm512_loadu_si512(k + (first + i) * dim + 2 * d) : _mm512_setzero_si512();
      transpose(rows);
      for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(tile.keys + (d + i) * kKeys + first, rows[i]);
    }
  for (int64_t i = 0; i < kKeys; i += 2)
    for (int64_t d = 0; d < dim; d += kFloats) {
      const auto wide = [&](int64_t at) {
        if (at >= count) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + at * dim + d)));
      };
      const __m512i pairs = _mm512_or_si512(wide(i), _mm512_slli_epi32(wide(i + 1), 16));
      _mm512_storeu_si512(tile.values + i / 2 * dim + d, pairs);
    }
}

inline __m512bh pairs(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh pair(uint32_t p) { return (__m512bh)_mm512_set1_epi32(p); }

// scores = queries times keys, scaled.
void score(const Tile& tile, int64_t rows, int64_t dim, float scale) {
  for (int64_t i = 0; i < rows; i += 4) {
    __m512 acc[4][4];
    for (auto& row : acc)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim / 2; d++) {
      __m512bh k[4];
      for (int j = 0; j < 4; j++) k[j] = pairs(tile.keys + d * kKeys + 16 * j);
      for (int a = 0; a < 4; a++) {
        const __m512bh q = pair(tile.queries[(i + a) * (dim / 2) + d]);
        for (int j = 0; j < 4; j++) acc[a][j] = _mm512_dpbf16_ps(acc[a][j], k[j], q);
      }
    }
    for (int a = 0; a < 4; a++)
      for (int j = 0; j < 4; j++)
        _mm512_storeu_ps(tile.scores + (i + a) * kKeys + 16 * j, _mm512_mul_ps(acc[a][j], _mm512_set1_ps(scale)));
  }
}

// Turns one row's scores, of which the first `seen` count, into weights; earlier sums are rescaled to the new maximum.
void soften(Tile& tile, int64_t row, int64_t seen, int64_t dim) {
  uint32_t* to = tile.weights + row * (kKeys / 2);
  if (seen <= 0) {
    memset(to, 0, kKeys * sizeof(bf16));
    return;
  }
  const float* from = tile.scores + row * kKeys;
  __m512 high = _mm512_set1_ps(tile.top[row]);
  for (int64_t j = 0; j < kKeys; j += kFloats) {
    if (seen > j) high = _mm512_mask_max_ps(high, lanes(seen - j), _mm512_loadu_ps(from + j), high);
  }
  const float top = _mm512_reduce_max_ps(high);
  const __m512 shrink = exp(_mm512_set1_ps(tile.top[row] - top));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < kKeys; j += kFloats) {
    const __mmask16 mask = seen > j ? lanes(seen - j) : 0;
    const __m512 weight = _mm512_maskz_mov_ps(mask, exp(_mm512_sub_ps(_mm512_loadu_ps(from + j), _mm512_set1_ps(top))));
    sum = _mm512_add_ps(sum, weight);
    store_bf16(reinterpret_cast<bf16*>(to) + j, weight);
  }
  const float factor = _mm512_cvtss_f32(shrink);
  tile.total[row] = tile.total[row] * factor + _mm512_reduce_add_ps(sum);
  tile.top[row] = top;
  if (factor != 1.0f)
    for (int64_t d = 0; d < dim; d += kFloats) {
      float* at = tile.out + row * dim + d;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
    }
}

// out += weights times values.
void gather(const Tile& tile, int64_t rows, int64_t dim) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t d = 0; d < dim; d += 2 * kFloats) {
      __m512 acc[8][2];
      for (int a = 0; a < 8; a++)
        for (int j = 0; j < 2; j++) acc[a][j] = _mm512_loadu_ps(tile.out + (i + a) * dim + d + 16 * j);
      for (int64_t key = 0; key < kKeys / 2; key++) {
        const __m512bh v0 = pairs(tile.values + key * dim + d), v1 = pairs(tile.values + key * dim + d + 16);
        for (int a = 0; a < 8; a++) {
          const __m512bh w = pair(tile.weights[(i + a) * (kKeys / 2) + key]);
          acc[a][0] = _mm512_dpbf16_ps(acc[a][0], v0, w);
          acc[a][1] = _mm512_dpbf16_ps(acc[a][1], v1, w);
        }
      }
      for (int a = 0; a < 8; a++)
        for (int j = 0; j < 2; j++) _mm512_storeu_ps(tile.out + (i + a) * dim + d + 16 * j, acc[a][j]);
    }
}

}  // namespace

extern "C" {

// q (heads, length, dim) with strides q_head and q_row, k and v (kv_heads, keys, dim) with strides k_head and v_head and rows
// contiguous, to out (length, heads, dim) contiguous. dim: a multiple of 32. causal: position i sees the first
// keys - length + i + 1. Returns 1 if memory ran out. A query's result depends on nothing but its own inputs.
int tt_attend(const bf16* q, int64_t q_head, int64_t q_row, const bf16* k, int64_t k_head, const bf16* v, int64_t v_head, bf16* out,
              int64_t heads, int64_t kv_heads, int64_t length, int64_t keys, int64_t dim, int causal, float scale, int threads) {
  const int64_t ratio = heads / kv_heads, all = ratio * length, tiles = (all + kQueries - 1) / kQueries;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const size_t words = kQueries * dim / 2 + kKeys * dim + kQueries * kKeys / 2 + kQueries * kKeys + kQueries * dim;
    auto* memory = static_cast<uint32_t*>(aligned_alloc(64, (words * 4 + 63) / 64 * 64));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    Tile tile;
    tile.queries = memory, tile.keys = tile.queries + kQueries * dim / 2, tile.values = tile.keys + kKeys * dim / 2;
    tile.weights = tile.values + kKeys * dim / 2;
    tile.scores = reinterpret_cast<float*>(tile.weights + kQueries * kKeys / 2), tile.out = tile.scores + kQueries * kKeys;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < kv_heads * tiles; task++) {
      if (!memory) continue;
      const int64_t head = task / tiles, first = task % tiles * kQueries;
      const int64_t count = all - first < kQueries ? all - first : kQueries;
      const int64_t rows = (count + 7) / 8 * 8;
      memset(tile.queries, 0, rows * dim * sizeof(bf16));
      memset(tile.out, 0, rows * dim * sizeof(float));
      for (int64_t i = 0; i < rows; i++) {
        const int64_t row = first + i;
        tile.top[i] = -__builtin_inff(), tile.total[i] = 0;
        const bf16* from = q + (head * ratio + row / length) * q_head + row % length * q_row;
        if (i < count) memcpy(tile.queries + i * dim / 2, from, dim * sizeof(bf16));
      }
      for (int64_t at = 0; at < keys; at += kKeys) {
        const int64_t there = keys - at < kKeys ? keys - at : kKeys;
        pack(tile, k + head * k_head + at * dim, v + head * v_head + at * dim, there, dim);
        score(tile, rows, dim, scale);
        for (int64_t i = 0; i < rows; i++) {
          const int64_t visible = causal ? keys - length + (first + i) % length + 1 - at : there;
          soften(tile, i, visible < there ? visible : there, dim);
        }
        gather(tile, rows, dim);
      }
      for (int64_t i = 0; i < count; i++) {
        const int64_t row = first + i;
        bf16* to = out + (row % length * heads + head * ratio + row / length) * dim;
        const __m512 total = _mm512_set1_ps(tile.total[i]);
        const float* sums = tile.out + i * dim;
        for (int64_t d = 0; d < dim; d += kFloats) store_bf16(to + d, _mm512_div_ps(_mm512_loadu_ps(sums + d), total));
      }
    }
    free(memory);
  }
  return failed;
}

}  // extern "C"
