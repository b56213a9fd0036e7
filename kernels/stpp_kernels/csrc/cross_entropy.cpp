// upsample_cross_entropy on the CPU: loss, count and gradient of the low-resolution logits in one pass. Derivation: cross_entropy.py.
//
// An image is cut into bands of cell rows; a task is one band of one image, so results do not depend on the thread count. A band
// goes through its columns in blocks of 16 pixels, and through a block from top to bottom, one cell row after another:
//   - the two corner rows, interpolated along x, are 16 lanes a class (the lower one serves the next cell row again);
//   - each pixel row: logits = their mix along y, softmax over classes, gradient added to two 16-lane sums a class;
//   - the sum of a finished corner row is spread along x into the band's gradient, by 16 multiply-adds a class.
// Everything a block touches stays in the first-level cache. Corner rows shared by two bands are added at the end, in fixed order.

#include <torch/library.h>

#include "common.h"

namespace stpp {
namespace {

constexpr int32_t kIgnored = -1, kInvalid = -2;

// A log for positive normal numbers, relative to 1: |error| about 1e-7 near 1. The sum of a softmax is in [1, 256].
inline vfloat log_lanes(vfloat x) {
  vfloat out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = std::log(x[lane]);
  return out;
}

struct Problem {
  at::Tensor logits, labels, class_weight, pixel_weight;  // the weights: float32, contiguous, or undefined
  int64_t ignore_index;
  bool with_gradient;
  Axis rows, columns;
  std::vector<Block> blocks;
  int64_t cells_per_band, bands;

  int64_t classes() const { return logits.size(1); }
  int64_t width() const { return logits.size(3); }
  int64_t band_begin(int64_t band) const { return std::min(band * cells_per_band, rows.cells()); }
};

// What one thread needs for one band, reused for its next one.
struct Scratch {
  std::vector<float> logits, gradient;                    // [cells + 1][C][padded(w)]
  std::vector<vfloat> upper, lower, prob, grad_upper, grad_lower;  // [C], lanes are pixels

  void fit(const Problem& problem) {
    const int64_t size = (problem.cells_per_band + 1) * problem.classes() * padded(problem.width());
    logits.resize(size);
    if (problem.with_gradient) gradient.resize(size);
    for (auto* lanes : {&upper, &lower, &prob, &grad_upper, &grad_lower}) lanes->resize(problem.classes());
  }
};

template <typename T>
inline bool read_labels(const T* source, int32_t lanes, int64_t ignore, int64_t classes, int32_t* target) {
  int32_t all = kIgnored;
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t value = static_cast<int64_t>(source[lane]);
    const int32_t label = value == ignore ? kIgnored : value >= 0 && value < classes ? static_cast<int32_t>(value) : kInvalid;
    target[lane] = label;
    all &= label;
  }
  for (int lane = lanes; lane < kLanes; ++lane) target[lane] = kIgnored;
  return all != kIgnored;
}

struct Totals {
  double loss = 0;
  int64_t counted = 0;
  bool invalid = false;
};

// Labels (kIgnored where a pixel does not count) and weights of 16 pixels of row y; false if none counts.
bool read_pixels(const Problem& problem, int64_t n, int64_t y, int64_t x, int32_t lanes, int32_t* label, vfloat& weight,
                 Totals& totals) {
  const int64_t at = (n * problem.labels.size(1) + y) * problem.labels.size(2) + x;
  const bool any = problem.labels.scalar_type() == at::kByte
      ? read_labels(problem.labels.const_data_ptr<uint8_t>() + at, lanes, problem.ignore_index, problem.classes(), label)
      : read_labels(problem.labels.const_data_ptr<int64_t>() + at, lanes, problem.ignore_index, problem.classes(), label);
  if (!any) return false;
  const float* class_weight = problem.class_weight.defined() ? problem.class_weight.const_data_ptr<float>() : nullptr;
  const float* pixel_weight = problem.pixel_weight.defined() ? problem.pixel_weight.const_data_ptr<float>() + at : nullptr;
  for (int lane = 0; lane < kLanes; ++lane) {
    totals.invalid |= label[lane] == kInvalid;
    label[lane] = std::max(label[lane], kIgnored);
    const bool counts = label[lane] != kIgnored;
    float value = counts ? 1.f : 0.f;
    if (counts && class_weight) value *= class_weight[label[lane]];
    if (counts && pixel_weight) value *= pixel_weight[lane];
    weight[lane] = value;
    totals.counted += counts;
  }
  return true;
}

// One row of 16 pixels: adds its loss to `loss`, and its gradient to the sums of the two corner rows.
void pixel_row(Scratch& scratch, int64_t classes, float frac, const int32_t* label, vfloat weight, bool with_gradient,
               vfloat& loss) {
  const vfloat* upper = scratch.upper.data();
  const vfloat* lower = scratch.lower.data();
  vfloat* prob = scratch.prob.data();
  const vfloat w0 = splat(1.f - frac), w1 = splat(frac);
  vfloat top = w0 * upper[0] + w1 * lower[0];
  for (int64_t c = 0; c < classes; ++c) {
    prob[c] = w0 * upper[c] + w1 * lower[c];
    top = vmax(top, prob[c]);
  }
  vfloat own{};
  const float* flat = reinterpret_cast<const float*>(prob);
  for (int lane = 0; lane < kLanes; ++lane) own[lane] = flat[std::max(label[lane], 0) * kLanes + lane];
  vfloat sum{};
  for (int64_t c = 0; c < classes; ++c) {
    prob[c] = exp_nonpositive(prob[c] - top);
    sum += prob[c];
  }
  loss += weight * (log_lanes(sum) + (top - own));
  if (!with_gradient) return;

  vfloat* grad_upper = scratch.grad_upper.data();
  vfloat* grad_lower = scratch.grad_lower.data();
  const vfloat scale = weight / sum, s0 = scale * w0, s1 = scale * w1;
  for (int64_t c = 0; c < classes; ++c) {
    grad_upper[c] += prob[c] * s0;
    grad_lower[c] += prob[c] * s1;
  }
  float* flat_upper = reinterpret_cast<float*>(grad_upper);
  float* flat_lower = reinterpret_cast<float*>(grad_lower);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t at = std::max(label[lane], 0) * kLanes + lane;
    flat_upper[at] -= weight[lane] * w0[lane];
    flat_lower[at] -= weight[lane] * w1[lane];
  }
}

// Adjoint of Block::interpolate for all classes: adds the 16 pixels' gradient to the inputs they read, and clears it.
void spread(const Block& block, std::vector<vfloat>& pixels, float* rows, int64_t pitch) {
  const int64_t classes = static_cast<int64_t>(pixels.size());
  if (!block.narrow) {
    for (int64_t c = 0; c < classes; ++c)
      for (int lane = 0; lane < kLanes; ++lane) {
        float* at = rows + c * pitch + block.base + block.index[lane];
        at[0] += block.rest[lane] * pixels[c][lane];
        at[1] += block.frac[lane] * pixels[c][lane];
      }
  } else {
    vfloat weights[kLanes];  // weights[pixel][input]: a pixel's two weights at its two inputs
    for (int pixel = 0; pixel < kLanes; ++pixel)
      for (int input = 0; input < kLanes; ++input) {
        const int offset = input - block.index[pixel];
        weights[pixel][input] = offset == 0 ? block.rest[pixel] : offset == 1 ? block.frac[pixel] : 0.f;
      }
    for (int64_t c = 0; c < classes; ++c) {
      const float* pixel = reinterpret_cast<const float*>(&pixels[c]);
      float* at = rows + c * pitch + block.base;
      vfloat even = load(at), odd{};
      for (int i = 0; i < kLanes; i += 2) {
        even += weights[i] * pixel[i];
        odd += weights[i + 1] * pixel[i + 1];
      }
      store(at, even + odd);
    }
  }
  std::fill(pixels.begin(), pixels.end(), vfloat{});
}

Totals run_band(const Problem& problem, int64_t n, int64_t band, Scratch& scratch) {
  const int64_t classes = problem.classes(), pitch = padded(problem.width()), row_size = classes * pitch;
  const int64_t first = problem.band_begin(band), last = problem.band_begin(band + 1);
  scratch.fit(problem);
  for (int64_t y = first; y <= last; ++y)
    load_row(problem.logits, n, std::min(y, problem.logits.size(2) - 1), scratch.logits.data() + (y - first) * row_size);
  if (problem.with_gradient) std::fill_n(scratch.gradient.begin(), (last - first + 1) * row_size, 0.f);

  Totals totals;
  int32_t label[kLanes];
  for (size_t b = 0; b < problem.blocks.size(); ++b) {
    const Block& block = problem.blocks[b];
    const auto corner_row = [&](std::vector<vfloat>& target, int64_t y) {
      const float* row = scratch.logits.data() + (y - first) * row_size;
      for (int64_t c = 0; c < classes; ++c) target[c] = block.interpolate(row + c * pitch);
    };
    corner_row(scratch.upper, first);
    std::fill(scratch.grad_upper.begin(), scratch.grad_upper.end(), vfloat{});
    std::fill(scratch.grad_lower.begin(), scratch.grad_lower.end(), vfloat{});
    for (int64_t y = first; y < last; ++y) {
      corner_row(scratch.lower, y + 1);
      vfloat loss{};
      for (int64_t i = problem.rows.begin[y]; i < problem.rows.begin[y + 1]; ++i) {
        vfloat weight;
        if (!read_pixels(problem, n, i, b * kLanes, block.lanes, label, weight, totals)) continue;
        pixel_row(scratch, classes, problem.rows.frac[i], label, weight, problem.with_gradient, loss);
      }
      totals.loss += sum_lanes(loss);
      if (problem.with_gradient) {
        spread(block, scratch.grad_upper, scratch.gradient.data() + (y - first) * row_size, pitch);
        scratch.grad_upper.swap(scratch.grad_lower);
      }
      scratch.upper.swap(scratch.lower);
    }
    if (problem.with_gradient)
      spread(block, scratch.grad_upper, scratch.gradient.data() + (last - first) * row_size, pitch);
  }
  return totals;
}

// Writes float rows [C][padded(w)] as row y of image n of `gradient`; `more`, if any, is added first.
template <typename T>
void write_row(at::Tensor& gradient, int64_t n, int64_t y, const float* row, const float* more) {
  const int64_t classes = gradient.size(1), width = gradient.size(3), pitch = padded(width);
  const int64_t sc = gradient.stride(1), sx = gradient.stride(3);
  T* target = gradient.mutable_data_ptr<T>() + n * gradient.stride(0) + y * gradient.stride(2);
  const auto value = [&](int64_t at) { return static_cast<T>(more ? row[at] + more[at] : row[at]); };
  if (sc == 1 && sx != 1) {
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < classes; ++c) target[x * sx + c] = value(c * pitch + x);
  } else {
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t x = 0; x < width; ++x) target[c * sc + x * sx] = value(c * pitch + x);
  }
}

void write_row(at::Tensor& gradient, int64_t n, int64_t y, const float* row, const float* more = nullptr) {
  if (gradient.scalar_type() == at::kBFloat16) return write_row<at::BFloat16>(gradient, n, y, row, more);
  write_row<float>(gradient, n, y, row, more);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> upsample_cross_entropy(
    const at::Tensor& logits, const at::Tensor& labels, const std::optional<at::Tensor>& class_weight,
    const std::optional<at::Tensor>& pixel_weight, int64_t ignore_index, bool with_gradient) {
  const int64_t images = logits.size(0), height = logits.size(2);
  const auto weights = [](const std::optional<at::Tensor>& given) {
    return given.has_value() ? given->to(at::kFloat).contiguous() : at::Tensor();
  };
  Problem problem{logits, labels.contiguous(), weights(class_weight), weights(pixel_weight), ignore_index, with_gradient,
                  Axis(height, labels.size(1)), Axis(logits.size(3), labels.size(2)), {}, 0, 0};
  problem.blocks = blocks_of(problem.columns);
  const int64_t cells = problem.rows.cells();
  // About 64 tasks, of at most 16 cell rows so that a band stays in the second-level cache. By shape alone: see above.
  problem.cells_per_band = std::max<int64_t>(1, std::min<int64_t>(16, cells * images / 64));
  problem.bands = (cells + problem.cells_per_band - 1) / problem.cells_per_band;

  const auto grad_type = logits.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  at::Tensor gradient = with_gradient ? at::empty_like(logits, logits.options().dtype(grad_type))
                                      : at::empty({0}, logits.options().dtype(grad_type));
  const int64_t row_size = problem.classes() * padded(problem.width()), tasks = images * problem.bands;
  std::vector<float> shared(with_gradient ? tasks * 2 * row_size : 0);  // first and last row of every band
  std::vector<Totals> totals(tasks);
  run_tasks(tasks, [&](int64_t task) {
    static thread_local Scratch scratch;
    const int64_t n = task / problem.bands, band = task % problem.bands;
    totals[task] = run_band(problem, n, band, scratch);
    if (!with_gradient) return;
    const int64_t first = problem.band_begin(band), count = problem.band_begin(band + 1) - first;
    std::memcpy(&shared[task * 2 * row_size], scratch.gradient.data(), row_size * sizeof(float));
    std::memcpy(&shared[(task * 2 + 1) * row_size], &scratch.gradient[count * row_size], row_size * sizeof(float));
    for (int64_t y = 1; y < count; ++y) write_row(gradient, n, first + y, &scratch.gradient[y * row_size]);
  });
  if (with_gradient)
    run_tasks(tasks, [&](int64_t task) {
      const int64_t n = task / problem.bands, band = task % problem.bands;
      const float* above = band > 0 ? &shared[(task * 2 - 1) * row_size] : nullptr;
      write_row(gradient, n, problem.band_begin(band), &shared[task * 2 * row_size], above);
      if (band == problem.bands - 1 && height > 1) write_row(gradient, n, height - 1, &shared[(task * 2 + 1) * row_size]);
    });

  Totals all;
  for (const Totals& one : totals) {
    all.loss += one.loss;
    all.counted += one.counted;
    all.invalid |= one.invalid;
  }
  TORCH_CHECK_VALUE(!all.invalid, "a label lies outside [0, ", problem.classes(), ") and is not the ignore index ",
                    ignore_index, "; check the masks");
  return {at::scalar_tensor(all.loss, logits.options().dtype(at::kFloat)),
          at::scalar_tensor(all.counted, logits.options().dtype(at::kLong)), gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) { m.impl("upsample_cross_entropy", upsample_cross_entropy); }

}  // namespace stpp
