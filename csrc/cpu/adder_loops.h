// The inner loops of csrc/cpu/adder.cpp, which includes this file once for each vector width, the
// macro NOISYQ_LANES: nothing here may depend on code that is compiled for another one.

constexpr int64_t kLanes = NOISYQ_LANES;

// Vectors of kLanes floats. The second kind lies anywhere in memory.
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int Bits __attribute__((vector_size(4 * kLanes)));
typedef float Stored __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline const Stored& at(const float* p) { return *reinterpret_cast<const Stored*>(p); }
inline Stored& at(float* p) { return *reinterpret_cast<Stored*>(p); }

// A NaN stays NaN. GCC compiles the comparisons to several instructions.
inline Lanes clipped(Lanes x) {
  const Lanes one = Lanes{} + 1.0f;
#if NOISYQ_LANES == 16
  return _mm512_min_ps(one, _mm512_max_ps(-one, x));
#elif NOISYQ_LANES == 8
  return _mm256_min_ps(one, _mm256_max_ps(-one, x));
#else
  const Lanes above = x < -one ? -one : x;
  return above > one ? one : above;
#endif
}

inline void clear(Lanes* sum) {
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) sum[t] = Lanes{};
}

// y[t, l] = -sum_k |w[k, l] - x[t, k]| of kTile outputs and kLanes channels. x[t] is `kernel_rows`
// rows of `row` values.
inline void forward_tile(const float* x, const int64_t* x_of, int64_t kernel_rows, int64_t row,
                         int64_t next_row, const float* w, float* y, const int64_t* y_of) {
  Lanes sum[kTile];
  clear(sum);
  for (int64_t i = 0; i < kernel_rows; ++i, x += next_row) {
    for (int64_t k = 0; k < row; ++k, w += kBlock) {
      const Lanes weight = at(w);
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) {
        const Lanes difference = weight - x[x_of[t] + k];
        sum[t] -= reinterpret_cast<Lanes>(reinterpret_cast<Bits>(difference) & 0x7fffffff);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) at(y + y_of[t]) = sum[t];
}

// dx[t, l] = sum_{i, j, o} clip(w[i, j, o, l] - x[t, l], -1, 1) g[t - (i, j), o] of kTile inputs
// and kLanes channels, over the elements of the kernel that meet them.
inline void input_gradient_tile(const float* x, const int64_t* x_of, const float* g,
                                const int64_t* g_of, const Taps& taps, int64_t outputs,
                                const float* w, float* dx) {
  Lanes sum[kTile], value[kTile];
  clear(sum);
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) value[t] = at(x + x_of[t]);
  for (int64_t i = 0; i < taps.rows; ++i) {
    for (int64_t j = 0; j < taps.columns; ++j) {
      const float* gradients = g - i * taps.g_row - j * outputs;
      const float* weights = w + i * taps.w_row + j * taps.w_column;
      for (int64_t o = 0; o < outputs; ++o) {
        const Lanes weight = at(weights + o * kBlock);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) {
          sum[t] += clipped(weight - value[t]) * gradients[g_of[t] + o];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) at(dx + x_of[t]) = sum[t];
}

// dw[t, l] += sum_{p, q} (x[p, q, l] - w[t, l]) g[p, q, t] of one image, for kLanes channels of an
// element of the kernel and kTile outputs, of which `count` are written.
inline void weight_gradient_tile(const float* x, int64_t next_row, int64_t next_column,
                                 const float* g, const int64_t* g_of, int64_t rows, int64_t columns,
                                 int64_t outputs, const float* w, const int64_t* w_of, float* dw,
                                 int count) {
  Lanes sum[kTile], weight[kTile];
  clear(sum);
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) weight[t] = at(w + w_of[t]);
  for (int64_t p = 0; p < rows; ++p) {
    const float* values = x + p * next_row;
    for (int64_t q = 0; q < columns; ++q, values += next_column, g += outputs) {
      const Lanes value = at(values);
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) sum[t] += (value - weight[t]) * g[g_of[t]];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) {
    if (t < count) at(dw + w_of[t]) += sum[t];
  }
}

#undef NOISYQ_LANES
