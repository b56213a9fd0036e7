// softmax_accumulate and finalize on the CPU: one view of test-time augmentation is added to the sum, row by
// row.
//
// The eager form stores the softmax at the scaled size, [N, C, hs, ws], and its resized form, [N, C, H, W].
// Here two streams of rows are nested: an output row needs two rows of probabilities at the scaled size, each
// of which needs two rows of logits. Each stream keeps its last two rows, so every row is computed once per
// thread, and no further memory is used. Mirroring back is free: it only reverses the column numbers that the
// last resize reads.
//
// Each output row is summed by one thread in a fixed order: the result does not depend on the number of
// threads.
#include <torch/library.h>

#include <limits>
#include <mutex>

#include "rows.h"

namespace stpp {
namespace {

using namespace rows;

// out = softmax over channels of wa * a + wb * b, for `Vectors` vectors of pixels.
template <int Vectors>
inline void softmax_vectors(const float* a, const float* b, float wa, float wb, int64_t channels,
                            int64_t stride, float* out) {
  vfloat largest[Vectors], sum[Vectors];
  for (int v = 0; v < Vectors; ++v)
    largest[v] = splat(-std::numeric_limits<float>::infinity()), sum[v] = vfloat{};
  for (int64_t c = 0, at = 0; c < channels; ++c, at += stride) {
    for (int v = 0; v < Vectors; ++v) {
      const vfloat value = load(a + at + v * kLanes) * wa + load(b + at + v * kLanes) * wb;
      store(out + at + v * kLanes, value);
      largest[v] = vmax(value, largest[v]);
    }
  }
  for (int64_t c = 0, at = 0; c < channels; ++c, at += stride) {
    for (int v = 0; v < Vectors; ++v) {
      const vfloat power = exp_nonpositive(load(out + at + v * kLanes) - largest[v]);
      store(out + at + v * kLanes, power);
      sum[v] += power;
    }
  }
  for (int v = 0; v < Vectors; ++v) sum[v] = 1.0f / sum[v];
  for (int64_t c = 0, at = 0; c < channels; ++c, at += stride)
    for (int v = 0; v < Vectors; ++v) store(out + at + v * kLanes, load(out + at + v * kLanes) * sum[v]);
}

// Two vectors at a time, so that their latencies overlap; an odd last one alone.
void softmax_row(const float* a, const float* b, float wa, float wb, int64_t channels, int64_t stride,
                 int64_t width, float* out) {
  int64_t x = 0;
  for (; x + kLanes < width; x += 2 * kLanes)
    softmax_vectors<2>(a + x, b + x, wa, wb, channels, stride, out + x);
  for (; x < width; x += kLanes) softmax_vectors<1>(a + x, b + x, wa, wb, channels, stride, out + x);
}

// Cache of the last two rows of probabilities at the scaled size, resized to the output width if `columns` is
// given.
class ProbabilityRows {
 public:
  ProbabilityRows(const Map& map, const Columns& logit_columns, const Taps& logit_rows,
                  const Columns* columns)
      : logits_(map, logit_columns), taps_(logit_rows), columns_(columns), channels_(map.channels),
        width_(logit_columns.out()), scaled_stride_(logits_.stride()),
        stride_(columns ? plane_stride(columns->out()) : scaled_stride_), scaled_(channels_ * scaled_stride_),
        even_(channels_ * stride_), odd_(channels_ * stride_) {}

  int64_t stride() const { return stride_; }

  const float* get(int64_t n, int64_t y) {
    float* planes = (y & 1 ? odd_ : even_).data();
    const int64_t key = n * static_cast<int64_t>(taps_.first.size()) + y;
    if (held_[y & 1] == key) return planes;
    held_[y & 1] = key;
    float* scaled = columns_ ? scaled_.data() : planes;
    const float* a = logits_.get(n, taps_.first[y]);
    const float* b = taps_.right[y] == 0.0f ? a : logits_.get(n, taps_.first[y] + 1);
    softmax_row(a, b, taps_.left[y], taps_.right[y], channels_, scaled_stride_, width_, scaled);
    if (columns_)
      for (int64_t c = 0; c < channels_; ++c)
        columns_->resize(scaled + c * scaled_stride_, planes + c * stride_);
    return planes;
  }

 private:
  RowCache logits_;
  const Taps& taps_;
  const Columns* columns_;
  int64_t channels_, width_, scaled_stride_, stride_;
  Scratch scaled_, even_, odd_;
  int64_t held_[2] = {-1, -1};
};

// One row of the accumulator, all channels, in any memory format.
struct AccumulatorRow {
  float* data;
  int64_t stride_c, stride_w, width;

  void add(int64_t c, int64_t x, vfloat value) const {
    const int64_t n = std::min(kLanes, width - x);
    float* p = data + c * stride_c + x * stride_w;
    if (stride_w == 1 && n == kLanes) {
      __builtin_prefetch(p + stride_c, 1);  // this row in the next plane; only the sums are large
      store(p, load(p) + value);
    } else {
      for (int64_t i = 0; i < n; ++i) p[i * stride_w] += value[i];
    }
  }
};

void accumulate_view(at::Tensor& acc, const at::Tensor& logits, at::IntArrayRef scaled, at::IntArrayRef size,
                     bool flip) {
  const Map map(logits);
  const int64_t channels = map.channels, height = size[0], width = size[1];
  const Columns logit_columns(map.width, scaled[1], false), columns(scaled[1], width, flip);
  const Taps logit_rows = make_taps(map.height, scaled[0], false), taps = make_taps(scaled[0], height, false);
  // Resize along the width where there are fewer rows: probability rows when computed, or output rows after
  // the blend.
  const bool early = scaled[0] <= height && !columns.copies();
  const bool late = !early && !columns.copies();
  float* sums = acc.data_ptr<float>();
  const int64_t stride_n = acc.stride(0), stride_c = acc.stride(1), stride_h = acc.stride(2),
                stride_w = acc.stride(3);
  at::parallel_for(0, logits.size(0) * height, 8, [&](int64_t begin, int64_t end) {
    ProbabilityRows rows(map, logit_columns, logit_rows, early ? &columns : nullptr);
    Scratch blended(plane_stride(scaled[1]));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / height, y = i % height;
      const float wa = taps.left[y], wb = taps.right[y];
      const float* a = rows.get(n, taps.first[y]);
      const float* b = wb == 0.0f ? a : rows.get(n, taps.first[y] + 1);
      const AccumulatorRow out{sums + n * stride_n + y * stride_h, stride_c, stride_w, width};
      for (int64_t c = 0; c < channels; ++c, a += rows.stride(), b += rows.stride()) {
        if (late) {
          for (int64_t x = 0; x < scaled[1]; x += kLanes)
            store(blended.data() + x, load(a + x) * wa + load(b + x) * wb);
          for (int64_t x = 0; x < width; x += kLanes) out.add(c, x, columns.get(blended.data(), x / kLanes));
        } else {
          for (int64_t x = 0; x < width; x += kLanes) out.add(c, x, load(a + x) * wa + load(b + x) * wb);
        }
      }
    }
  });
}

// Adds a pair view by view, in the order of two calls.
void softmax_accumulate(at::Tensor& acc, const at::Tensor& logits, at::IntArrayRef scaled,
                        at::IntArrayRef size, bool flip, bool pair) {
  const int64_t images = acc.size(0);
  accumulate_view(acc, logits.narrow(0, 0, images), scaled, size, flip);
  if (pair) accumulate_view(acc, logits.narrow(0, images, images), scaled, size, !flip);
}

// Writes the mask of one row, counts its pixels per class in four counters each, and returns the sum over the
// row of the chosen class's share. The four counters take turns, so that equal neighbours do not wait for one
// another.
double finalize_row(const float* planes, int64_t channels, int64_t stride, int64_t width, uint8_t* mask,
                    int64_t* counters) {
  double total = 0.0;
  for (int64_t x = 0; x < width; x += kLanes) {
    const int64_t n = std::min(kLanes, width - x);
    vfloat best = load_part(planes + x, n), sum = best;
    vint arg = {};
    for (int64_t c = 1; c < channels; ++c) {
      const vfloat value = load_part(planes + c * stride + x, n);
      const vint larger = value > best;
      best = select(larger, value, best);
      arg = (splat_int(static_cast<int32_t>(c)) & larger) | (arg & ~larger);
      sum += value;
    }
    const vfloat share = best / sum;
    float row = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      mask[x + i] = static_cast<uint8_t>(arg[i]);
      ++counters[4 * arg[i] + (i & 3)];
      row += share[i];
    }
    total += row;
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> finalize(const at::Tensor& acc) {
  const Map map(acc);
  const int64_t batch = acc.size(0), channels = map.channels, height = map.height, width = map.width;
  at::Tensor mask =
      at::empty({batch, height, width}, acc.options().dtype(at::kByte), at::MemoryFormat::Contiguous);
  at::Tensor counts = at::zeros({batch, channels}, acc.options().dtype(at::kLong));
  at::Tensor row_sums =
      at::empty({batch, height}, acc.options().dtype(at::kDouble), at::MemoryFormat::Contiguous);
  uint8_t* masks = mask.data_ptr<uint8_t>();
  double* sums = row_sums.data_ptr<double>();
  int64_t* count = counts.data_ptr<int64_t>();
  std::mutex merging;
  at::parallel_for(0, batch * height, 8, [&](int64_t begin, int64_t end) {
    const bool direct = map.stride_w == 1;
    const int64_t stride = direct ? map.stride_c : plane_stride(width);
    Scratch copy(direct ? 0 : channels * stride);
    std::vector<int64_t> counters(4 * batch * channels, 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / height, y = i % height;
      const float* planes = static_cast<const float*>(map.data) + n * map.stride_n + y * map.stride_h;
      if (!direct) map.read(n, y, copy.data(), stride);
      sums[i] = finalize_row(direct ? planes : copy.data(), channels, stride, width, masks + i * width,
                             counters.data() + 4 * n * channels);
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t k = 0; k < counters.size(); ++k) count[k / 4] += counters[k];
  });
  return {mask, row_sums.sum(1).div_(static_cast<double>(height * width)).to(at::kFloat), counts};
}

}  // namespace
}  // namespace stpp

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) {
  m.impl("softmax_accumulate", &stpp::softmax_accumulate);
  m.impl("finalize", &stpp::finalize);
}
