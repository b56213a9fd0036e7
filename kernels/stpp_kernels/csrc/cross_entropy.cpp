// upsample_cross_entropy on the CPU: loss, count and gradient of the low-resolution logits in one pass.
// Derivation: cross_entropy.py.
//
// An image is split into bands of cell rows; a task is one band of one image, so results do not depend on the
// thread count. A band is processed in blocks of 16 pixel columns, and a block from top to bottom, one cell
// row after another:
//   - the two corner rows, interpolated along x, are 16 lanes per class (the lower one is reused as the upper
//     one of the next cell row);
//   - each pixel row: logits = their blend along y, softmax over classes, gradient added to two 16-lane sums
//     per class;
//   - the sum of a finished corner row is spread along x into the band's gradient, by 16 multiply-adds per
//     class.
// A block's data stays in the nearest caches. Corner rows shared by two bands are added at the end, in fixed
// order.

#include <torch/library.h>

#include "common.h"
#include "rows.h"

namespace stpp {
namespace {

constexpr int32_t kIgnored = -1, kInvalid = -2;

struct Problem {
  const at::Tensor logits, labels;
  const at::Tensor class_weight, pixel_weight;  // float32, contiguous, or undefined
  const int64_t ignore_index;
  const bool with_gradient;
  const rows::Map map;
  const Axis rows, columns;
  const std::vector<Block> blocks;
  const int64_t classes, pitch, row_size;  // a row of scratch is [C][pitch]
  int64_t cells_per_band, bands;

  Problem(const at::Tensor& logits, const at::Tensor& labels, at::Tensor class_weight,
          at::Tensor pixel_weight, int64_t ignore_index, bool with_gradient)
      : logits(logits), labels(labels.contiguous()), class_weight(class_weight), pixel_weight(pixel_weight),
        ignore_index(ignore_index), with_gradient(with_gradient), map(logits),
        rows(logits.size(2), labels.size(1)), columns(logits.size(3), labels.size(2)),
        blocks(blocks_of(columns)), classes(logits.size(1)),
        pitch(rows::plane_stride(logits.size(3) + kLanes)), row_size(classes * pitch) {
    // About 64 tasks, and a band's logits and gradient fit into the second-level cache; by shape alone.
    const int64_t cells = rows.cells(), fitting = (1 << 20) / (2 * row_size * sizeof(float)) - 1;
    cells_per_band = std::max<int64_t>(
        1, std::min({int64_t{16}, std::max<int64_t>(fitting, 4), cells * map_images() / 64}));
    bands = (cells + cells_per_band - 1) / cells_per_band;
  }
  int64_t map_images() const { return logits.size(0); }
  int64_t band_begin(int64_t band) const { return std::min(band * cells_per_band, rows.cells()); }
};

// Buffers of a thread for a band.
struct Scratch {
  rows::Scratch logits, gradient;                                  // [cells + 1][C][pitch]
  std::vector<vfloat> upper, lower, prob, grad_upper, grad_lower;  // [C], lanes are pixels

  explicit Scratch(const Problem& problem)
      : logits((problem.cells_per_band + 1) * problem.row_size),
        gradient(problem.with_gradient ? (problem.cells_per_band + 1) * problem.row_size : 0),
        upper(problem.classes), lower(problem.classes), prob(problem.classes), grad_upper(problem.classes),
        grad_lower(problem.classes) {}
};

struct Totals {
  double loss = 0;
  int64_t counted = 0;
  bool invalid = false;
};

template <typename T>
bool read_labels(const T* source, int32_t lanes, int64_t ignore, int64_t classes, vint& labels) {
  T values[kLanes];
  std::memcpy(values, source, lanes * sizeof(T));
  alignas(64) int32_t label[kLanes];
  int32_t all = kIgnored;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t value = static_cast<int64_t>(values[lane < lanes ? lane : 0]);
    label[lane] = value >= 0 && value < classes ? static_cast<int32_t>(value) : kInvalid;
    label[lane] = value == ignore || lane >= lanes ? kIgnored : label[lane];
    all &= label[lane];
  }
  std::memcpy(&labels, label, sizeof(labels));
  return all != kIgnored;
}

// Reads the labels (kIgnored for uncounted pixels) and weights of 16 pixels of row y from x on; returns false
// if none counts.
inline bool read_pixels(const Problem& problem, int64_t n, int64_t y, int64_t x, int32_t lanes, vint& labels,
                        vfloat& weight, bool& invalid) {
  const int64_t at = (n * problem.labels.size(1) + y) * problem.labels.size(2) + x;
  const bool any = problem.labels.scalar_type() == at::kByte
      ? read_labels(problem.labels.const_data_ptr<uint8_t>() + at, lanes, problem.ignore_index,
                    problem.classes, labels)
      : read_labels(problem.labels.const_data_ptr<int64_t>() + at, lanes, problem.ignore_index,
                    problem.classes, labels);
  if (!any) return false;
  for (int lane = 0; lane < kLanes; ++lane) invalid |= labels[lane] == kInvalid;
  labels = labels < 0 ? splat_int(kIgnored) : labels;
  weight = select(labels >= 0, splat(1.f), vfloat{});
  if (problem.class_weight.defined()) {
    const float* class_weight = problem.class_weight.const_data_ptr<float>();
    for (int lane = 0; lane < kLanes; ++lane) weight[lane] *= class_weight[std::max(labels[lane], 0)];
  }
  if (problem.pixel_weight.defined()) {
    const float* pixel_weight = problem.pixel_weight.const_data_ptr<float>() + at;
    for (int lane = 0; lane < lanes; ++lane)
      weight[lane] = labels[lane] < 0 ? 0.f : weight[lane] * pixel_weight[lane];
  }
  return true;
}

// Processes one row of 16 pixels: adds its loss to `loss`, and its gradient to the sums of the two corner
// rows.
template <bool with_gradient>
inline void pixel_row(Scratch& scratch, int64_t classes, float frac, vint labels, vfloat weight,
                      vfloat& loss) {
  const vfloat* upper = scratch.upper.data();
  const vfloat* lower = scratch.lower.data();
  vfloat* prob = scratch.prob.data();
  const vfloat w0 = splat(1.f - frac), w1 = splat(frac);
  vfloat top = w0 * upper[0] + w1 * lower[0], own{};
  for (int64_t c = 0; c < classes; ++c) {
    const vfloat z = w0 * upper[c] + w1 * lower[c];
    top = vmax(top, z);
    own = select(labels == static_cast<int32_t>(c), z, own);
    prob[c] = z;
  }
  vfloat sum{};
  for (int64_t c = 0; c < classes; ++c) {
    prob[c] = exp_nonpositive(prob[c] - top);
    sum += prob[c];
  }
  loss += weight * (log_positive(sum) + (top - own));
  if (!with_gradient) return;

  vfloat* grad_upper = scratch.grad_upper.data();
  vfloat* grad_lower = scratch.grad_lower.data();
  const vfloat scale = weight / sum, s0 = scale * w0, s1 = scale * w1;
  for (int64_t c = 0; c < classes; ++c) {  // scale * sum is the pixel's weight: subtracts the one-hot label
    const vfloat residual = select(labels == static_cast<int32_t>(c), prob[c] - sum, prob[c]);
    grad_upper[c] += residual * s0;
    grad_lower[c] += residual * s1;
  }
}

// Adds the gradient of 16 pixels of every class to a row of the band's gradient, and clears `pixels`.
void spread(const Block& block, std::vector<vfloat>& pixels, float* row, int64_t pitch) {
  for (size_t c = 0; c < pixels.size(); ++c) block.spread(pixels[c], row + c * pitch);
  std::fill(pixels.begin(), pixels.end(), vfloat{});
}

template <bool with_gradient>
Totals run_band(const Problem& problem, int64_t n, int64_t band, Scratch& scratch) {
  const int64_t classes = problem.classes, row_size = problem.row_size;
  const int64_t first = problem.band_begin(band), last = problem.band_begin(band + 1);
  for (int64_t y = first; y <= last; ++y)
    problem.map.read(n, std::min(y, problem.map.height - 1), scratch.logits.data() + (y - first) * row_size,
                     problem.pitch);
  if (with_gradient) std::fill_n(scratch.gradient.data(), (last - first + 1) * row_size, 0.f);

  Totals totals;
  for (size_t b = 0; b < problem.blocks.size(); ++b) {
    const Block& block = problem.blocks[b];
    const auto corner_row = [&](std::vector<vfloat>& target, int64_t y) {
      const float* row = scratch.logits.data() + (y - first) * row_size;
      for (int64_t c = 0; c < classes; ++c) target[c] = block.interpolate(row + c * problem.pitch);
    };
    const auto finish_row = [&](int64_t y) {
      spread(block, scratch.grad_upper, scratch.gradient.data() + (y - first) * row_size, problem.pitch);
    };
    corner_row(scratch.upper, first);
    for (int64_t y = first; y < last; ++y) {
      corner_row(scratch.lower, y + 1);
      vfloat loss{}, weight;
      vint labels, counted{};
      for (int64_t i = problem.rows.begin[y]; i < problem.rows.begin[y + 1]; ++i) {
        if (!read_pixels(problem, n, i, b * kLanes, block.lanes, labels, weight, totals.invalid)) continue;
        counted -= labels >= 0;
        pixel_row<with_gradient>(scratch, classes, problem.rows.frac[i], labels, weight, loss);
      }
      totals.loss += sum_lanes(loss);
      totals.counted += sum_lanes(counted);
      if (with_gradient) finish_row(y);
      scratch.grad_upper.swap(scratch.grad_lower);
      scratch.upper.swap(scratch.lower);
    }
    if (with_gradient) finish_row(last);
  }
  return totals;
}

// Writes a scratch row, plus `more` if not null, to row y of image n of `gradient`.
template <typename T>
void write_row(at::Tensor& gradient, int64_t n, int64_t y, const float* row, const float* more,
               int64_t pitch) {
  const int64_t classes = gradient.size(1), width = gradient.size(3), sc = gradient.stride(1),
                sx = gradient.stride(3);
  T* target = gradient.mutable_data_ptr<T>() + n * gradient.stride(0) + y * gradient.stride(2);
  const auto value = [&](int64_t at) { return static_cast<T>(more ? row[at] + more[at] : row[at]); };
  if (sx == 1) {
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t x = 0; x < width; ++x) target[c * sc + x] = value(c * pitch + x);
  } else {
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < classes; ++c) target[c * sc + x * sx] = value(c * pitch + x);
  }
}

void run(const Problem& problem, at::Tensor& gradient, std::vector<Totals>& totals) {
  const int64_t tasks = problem.map_images() * problem.bands, size = problem.row_size;
  const auto write = [&](int64_t n, int64_t y, const float* row, const float* more) {
    (gradient.scalar_type() == at::kFloat ? write_row<float> : write_row<at::BFloat16>)(gradient, n, y, row,
                                                                                        more, problem.pitch);
  };
  const bool with_gradient = problem.with_gradient;
  rows::Scratch shared(with_gradient ? tasks * 2 * size : 0);  // first and last row of every band
  run_tasks<Scratch>(tasks, problem, [&](int64_t task, Scratch& scratch) {
    const int64_t n = task / problem.bands, band = task % problem.bands;
    totals[task] = (with_gradient ? run_band<true> : run_band<false>)(problem, n, band, scratch);
    if (!with_gradient) return;
    const int64_t first = problem.band_begin(band), count = problem.band_begin(band + 1) - first;
    std::memcpy(shared.data() + task * 2 * size, scratch.gradient.data(), size * sizeof(float));
    std::memcpy(shared.data() + (task * 2 + 1) * size, scratch.gradient.data() + count * size,
                size * sizeof(float));
    for (int64_t y = 1; y < count; ++y) write(n, first + y, scratch.gradient.data() + y * size, nullptr);
  });
  if (!with_gradient) return;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / problem.bands, band = task % problem.bands;
      const float* own = shared.data() + task * 2 * size;
      write(n, problem.band_begin(band), own, band > 0 ? own - size : nullptr);
      if (band == problem.bands - 1 && problem.map.height > 1)
        write(n, problem.map.height - 1, own + size, nullptr);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> upsample_cross_entropy(
    const at::Tensor& logits, const at::Tensor& labels, const std::optional<at::Tensor>& class_weight,
    const std::optional<at::Tensor>& pixel_weight, int64_t ignore_index, bool with_gradient) {
  const auto weights = [](const std::optional<at::Tensor>& weight) {
    return weight.has_value() ? weight->to(at::kFloat).contiguous() : at::Tensor();
  };
  const Problem problem(logits, labels, weights(class_weight), weights(pixel_weight), ignore_index,
                        with_gradient);
  const auto options =
      logits.options().dtype(logits.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat);
  at::Tensor gradient = with_gradient ? at::empty_like(logits, options) : at::empty({0}, options);
  std::vector<Totals> totals(problem.map_images() * problem.bands);
  run(problem, gradient, totals);

  Totals all;
  for (const Totals& task : totals) {
    all.loss += task.loss;
    all.counted += task.counted;
    all.invalid |= task.invalid;
  }
  TORCH_CHECK_VALUE(!all.invalid, "a label lies outside [0, ", problem.classes,
                    ") and is not the ignore index ", ignore_index, "; check the masks");
  return {at::scalar_tensor(all.loss, logits.options().dtype(at::kFloat)),
          at::scalar_tensor(all.counted, logits.options().dtype(at::kLong)), gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) { m.impl("upsample_cross_entropy", upsample_cross_entropy); }

}  // namespace stpp
