// label_probability on the CPU: softmax probability of each pixel's label in the bilinearly resized logits,
// one output row at a time.
//
// Per output pixel the kernel blends two rows that are already resized along their width (rows.h), with one
// pass over the classes for the maximum m and the label's logit l, and another for the sum: p = exp(l - m) /
// sum_c exp(v_c - m). Nothing of size [N, C, H, W] is stored.
#include <torch/library.h>

#include "rows.h"

namespace stpp {
namespace {

using namespace rows;

constexpr float kIgnored = 2.0f;  // above every probability

void probability_row(const float* a, const float* b, float wa, float wb, int64_t channels, int64_t stride,
                     int64_t width, const uint8_t* labels, int64_t ignore_index, float* out) {
  for (int64_t x = 0; x < width; x += kLanes) {
    const int64_t n = std::min(kLanes, width - x);
    int32_t own[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) own[i] = labels[x + i];
    vint label;
    std::memcpy(&label, own, sizeof(label));
    const auto at = [&](int64_t c) { return load(a + c * stride + x) * wa + load(b + c * stride + x) * wb; };
    vfloat best = at(0);
    vfloat logit = best;
    vint known = label == splat_int(0);
    for (int64_t c = 1; c < channels; ++c) {
      const vfloat value = at(c);
      const vint mine = label == splat_int(static_cast<int32_t>(c));
      best = select(value > best, value, best);
      logit = select(mine, value, logit);
      known |= mine;
    }
    vfloat sum = {};
    for (int64_t c = 0; c < channels; ++c) sum += exp_nonpositive(at(c) - best);
    const vfloat nothing = {};
    const vfloat probability = select(known, exp_nonpositive(logit - best) / sum, nothing);
    const vfloat result =
        select(label == splat_int(static_cast<int32_t>(ignore_index)), nothing + kIgnored, probability);
    std::memcpy(out + x, &result, n * sizeof(float));
  }
}

at::Tensor label_probability(const at::Tensor& logits, const at::Tensor& labels, int64_t ignore_index) {
  const int64_t batch = labels.size(0), height = labels.size(1), width = labels.size(2);
  at::Tensor probability =
      at::empty({batch, height, width}, logits.options().dtype(at::kFloat), at::MemoryFormat::Contiguous);
  if (probability.numel() == 0) return probability;
  const Map map(logits);
  const Columns columns(map.width, width, false);
  const Taps taps = make_taps(map.height, height, false);
  const uint8_t* classes = labels.const_data_ptr<uint8_t>();
  float* out = probability.data_ptr<float>();
  at::parallel_for(0, batch * height, 8, [&](int64_t begin, int64_t end) {
    RowCache cache(map, columns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / height, y = i % height;
      const float* a = cache.get(n, taps.first[y]);
      const float* b = taps.right[y] == 0.0f ? a : cache.get(n, taps.first[y] + 1);
      probability_row(a, b, taps.left[y], taps.right[y], map.channels, cache.stride(), width,
                      classes + i * width, ignore_index, out + i * width);
    }
  });
  return probability;
}

}  // namespace
}  // namespace stpp

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) { m.impl("label_probability", &stpp::label_probability); }
