// upsample_argmax on the CPU: class and confidence of the bilinearly resized logits, one output row at a
// time.
//
// Per output pixel and class the kernel blends two rows that are already resized along their width (rows.h)
// and keeps the running maximum and its class in registers, so nothing of size [N, C, H, W] is stored. The
// confidence, the largest softmax probability, is 1 / sum_c exp(v_c - max v): a second pass over the classes.
#include <torch/library.h>

#include "rows.h"

namespace stpp {
namespace {

using namespace rows;
typedef uint8_t vbyte __attribute__((vector_size(kLanes)));

struct Blend {
  const float *a, *b;
  float wa, wb;
  vfloat at(int64_t offset) const { return load(a + offset) * wa + load(b + offset) * wb; }
};

void argmax_row(const Blend& rows, int64_t channels, int64_t stride, int64_t width, uint8_t* mask,
                float* confidence) {
  for (int64_t x = 0; x < width; x += kLanes) {
    vfloat best = rows.at(x);
    vint arg = {};
    for (int64_t c = 1; c < channels; ++c) {
      const vfloat value = rows.at(c * stride + x);
      const vint larger = value > best;  // strictly: the lowest class keeps a tie
      best = select(larger, value, best);
      arg = (splat_int(static_cast<int32_t>(c)) & larger) | (arg & ~larger);
    }
    const vbyte bytes = __builtin_convertvector(arg, vbyte);
    const int64_t n = std::min(kLanes, width - x);
    std::memcpy(mask + x, &bytes, n);
    if (confidence == nullptr) continue;
    vfloat sum = {};
    for (int64_t c = 0; c < channels; ++c) sum += exp_nonpositive(rows.at(c * stride + x) - best);
    const vfloat probability = 1.0f / sum;
    std::memcpy(confidence + x, &probability, n * sizeof(float));
  }
}

std::tuple<at::Tensor, at::Tensor> upsample_argmax(const at::Tensor& logits, at::IntArrayRef size,
                                                   bool confidence) {
  const int64_t batch = logits.size(0), height = size[0], width = size[1];
  at::Tensor mask =
      at::empty({batch, height, width}, logits.options().dtype(at::kByte), at::MemoryFormat::Contiguous);
  at::Tensor probability =
      at::empty(confidence ? std::vector<int64_t>{batch, height, width} : std::vector<int64_t>{0},
                logits.options().dtype(at::kFloat), at::MemoryFormat::Contiguous);
  const Map map(logits);
  const Columns columns(map.width, width, false);
  const Taps taps = make_taps(map.height, height, false);
  uint8_t* masks = mask.data_ptr<uint8_t>();
  float* probabilities = confidence ? probability.data_ptr<float>() : nullptr;
  at::parallel_for(0, batch * height, 8, [&](int64_t begin, int64_t end) {
    RowCache cache(map, columns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / height, y = i % height;
      const float* a = cache.get(n, taps.first[y]);
      const float* b = taps.right[y] == 0.0f ? a : cache.get(n, taps.first[y] + 1);
      argmax_row({a, b, taps.left[y], taps.right[y]}, map.channels, cache.stride(), width, masks + i * width,
                 probabilities == nullptr ? nullptr : probabilities + i * width);
    }
  });
  return {mask, probability};
}

}  // namespace
}  // namespace stpp

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) { m.impl("upsample_argmax", &stpp::upsample_argmax); }
