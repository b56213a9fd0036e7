// Inner loops of depthwise_conv's backward pass, over planes [column][16] of one block of channels.
#pragma once

#include "depthwise_planes.h"

namespace stpp {
namespace depthwise {

#ifdef __AVX512F__
constexpr int kOutputs = 8;  // neighbouring outputs per iteration of an inner loop
#else
constexpr int kOutputs = 4;  // half as many registers
#endif

// Taps of one row of the kernel that reach a column: the first of the neighbouring values that they read,
// from the left, and the first of their weights, in reverse order.
struct TapRow {
  const float *source, *weight;
};

// Calls out(j, sum) for kCount neighbours from j on: the sum over rows and taps of source[j + tap * kGap] *
// weight. Loads dominate the time, so a value is loaded once for all taps that read it.
template <int kTaps, int kGap, int kCount, typename Out>
inline void gather_some(const TapRow* rows, int64_t num_rows, int64_t weight_step, int64_t j,
                        const Out& out) {
  vfloat sum[kCount] = {};
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* source = rows[row].source + j * kLanes;
    vfloat weight[kTaps];
#pragma GCC unroll 5
    for (int tap = 0; tap < kTaps; ++tap) weight[tap] = load(rows[row].weight + tap * weight_step);
#pragma GCC unroll 16
    for (int at = 0; at < kCount + (kTaps - 1) * kGap; ++at) {
      const vfloat value = load(source + at * kLanes);
#pragma GCC unroll 5
      for (int tap = 0; tap < kTaps; ++tap) {
        const int i = at - tap * kGap;
        if (i >= 0 && i < kCount) sum[i] += value * weight[tap];
      }
    }
  }
  for (int i = 0; i < kCount; ++i) out(j + i, sum[i]);
}

template <int kTaps, int kGap, typename Out>
void gather(const TapRow* rows, int64_t num_rows, int64_t weight_step, int64_t count, const Out& out) {
  if (count < kOutputs) {
    for (int64_t j = 0; j < count; ++j) gather_some<kTaps, kGap, 1>(rows, num_rows, weight_step, j, out);
  } else {  // the last iteration may overlap the previous one, and computes the same sums again
    for (int64_t j = 0; j < count; j += kOutputs)
      gather_some<kTaps, kGap, kOutputs>(rows, num_rows, weight_step, std::min(j, count - kOutputs), out);
  }
}

// Row of the kernel: the inputs that its first tap reads for a row of outputs, and the sums of its taps.
struct WeightRow {
  const float* source;
  float* sums;
};

// Adds the products of kCount gradients from `grad` on with the inputs of each tap to the sums of kRows rows
// of the kernel; again, a value is loaded once for all taps.
template <int kTaps, int kStride, int kDilation, int kRows, int kCount>
inline void add_some(const float* grad, const WeightRow* rows, int64_t x, vfloat (&sum)[kRows][kTaps]) {
  vfloat value[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) value[i] = load(grad + (x + i) * kLanes);
#pragma GCC unroll 3
  for (int row = 0; row < kRows; ++row) {
    const float* source = rows[row].source + x * kStride * kLanes;
#pragma GCC unroll 32
    for (int at = 0; at <= (kCount - 1) * kStride + (kTaps - 1) * kDilation; ++at) {
      const vfloat input = load(source + at * kLanes);
#pragma GCC unroll 5
      for (int tap = 0; tap < kTaps; ++tap) {
        const int from = at - tap * kDilation;
        if (from >= 0 && from % kStride == 0 && from / kStride < kCount)
          sum[row][tap] += value[from / kStride] * input;
      }
    }
  }
}

template <int kTaps, int kStride, int kDilation, int kRows>
void add_products(const float* grad, const WeightRow* rows, int64_t columns) {
  vfloat sum[kRows][kTaps] = {};
  int64_t x = 0;
  for (; x + kOutputs <= columns; x += kOutputs)
    add_some<kTaps, kStride, kDilation, kRows, kOutputs>(grad, rows, x, sum);
  for (; x < columns; ++x) add_some<kTaps, kStride, kDilation, kRows, 1>(grad, rows, x, sum);
  for (int row = 0; row < kRows; ++row) {
    for (int tap = 0; tap < kTaps; ++tap) {
      float* at = rows[row].sums + tap * kLanes;
      store(at, load(at) + sum[row][tap]);
    }
  }
}

// Processes several rows at a time, whose sums are independent.
template <int kTaps, int kStride, int kDilation>
void add_rows(const float* grad, const WeightRow* rows, int64_t num_rows, const Geometry& g) {
  constexpr int kRows = kTaps == 3 ? 3 : 2;
  int64_t row = 0;
  for (; row + kRows <= num_rows; row += kRows)
    add_products<kTaps, kStride, kDilation, kRows>(grad, rows + row, g.columns);
  for (; row < num_rows; ++row) add_products<kTaps, kStride, kDilation, 1>(grad, rows + row, g.columns);
}

// General form for every kernel, stride and dilation, one tap at a time.
inline void add_rows_of_any(const float* grad, const WeightRow* rows, int64_t num_rows, const Geometry& g) {
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t tap = 0; tap < g.kernel; ++tap) {
      vfloat sum = {};
      for (int64_t x = 0; x < g.columns; ++x)
        sum += load(grad + x * kLanes) * load(rows[row].source + (x * g.stride + tap * g.dilation) * kLanes);
      float* at = rows[row].sums + tap * kLanes;
      store(at, load(at) + sum);
    }
  }
}

using AddRows = void (*)(const float*, const WeightRow*, int64_t, const Geometry&);
inline AddRows add_rows_of(const Geometry& g) {
  static constexpr AddRows known[2][2][2] = {
      {{add_rows<3, 1, 1>, add_rows<3, 1, 2>}, {add_rows<3, 2, 1>, add_rows<3, 2, 2>}},
      {{add_rows<5, 1, 1>, add_rows<5, 1, 2>}, {add_rows<5, 2, 1>, add_rows<5, 2, 2>}}};
  if ((g.kernel != 3 && g.kernel != 5) || g.stride > 2 || g.dilation > 2) return add_rows_of_any;
  return known[g.kernel / 2 - 1][g.stride - 1][g.dilation - 1];
}

}  // namespace depthwise
}  // namespace stpp
