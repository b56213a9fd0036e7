// confusion on the CPU: int64 counts of (truth, prediction) pairs, in total or per image.
//
// A block of pixels is first converted to cell numbers truth * C + prediction, in a branch-free loop that
// vectorises; uncounted pixels get the cell number C * C. The histogram then reads 16 cells at a time: in
// masks they are mostly one run, counted by one addition. Otherwise four tables take turns, so that equal
// neighbours do not wait for one another. Sums of integers do not depend on their order, so the result is the
// same for any number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <mutex>
#include <type_traits>
#include <vector>

namespace stpp {
namespace {

constexpr int64_t kBlock = 1024;     // pixels converted to cell numbers at a time: 4 KiB
constexpr int64_t kChunk = 1 << 16;  // pixels handed to a thread at a time
constexpr int64_t kRun = 16;
constexpr int64_t kSmall = 64;       // maximum classes for which four tables fit into the cache

struct Rule {
  int64_t classes, ignore;
  bool ignore_both;  // a prediction equal to `ignore` does not count either
};

// Computes the cell numbers of n pixels; returns true if a counted value is outside the classes. Flags are
// integers of the width of the arithmetic, or the compiler would not vectorise the loop.
template <typename P, typename T>
bool find_cells(const P* pred, const T* target, int64_t n, const Rule& rule, int32_t* cells) {
  constexpr bool narrow = sizeof(P) == 1 && sizeof(T) == 1;
  using Int = std::conditional_t<narrow, int32_t, int64_t>;
  using Unsigned = std::make_unsigned_t<Int>;
  const Int classes = static_cast<Int>(rule.classes), nowhere = classes * classes;
  const Int ignore = narrow && (rule.ignore < 0 || rule.ignore > 255) ? -1 : static_cast<Int>(rule.ignore);
  const Int both = rule.ignore_both ? 1 : 0;
  Int wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Int p = static_cast<Int>(pred[i]), t = static_cast<Int>(target[i]);
    const Int skipped = Int(t == ignore) | (both & Int(p == ignore));
    const Int outside = Int(static_cast<Unsigned>(p) >= Unsigned(classes)) |
                        Int(static_cast<Unsigned>(t) >= Unsigned(classes));
    wrong |= outside & (skipped ^ 1);
    cells[i] = static_cast<int32_t>((outside | skipped) != 0 ? nowhere : t * classes + p);
  }
  return wrong != 0;
}

template <typename P, typename T>
void report_outside(const P* pred, const T* target, int64_t n, const Rule& rule) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = static_cast<int64_t>(pred[i]), t = static_cast<int64_t>(target[i]);
    if (t == rule.ignore || (rule.ignore_both && p == rule.ignore)) continue;
    TORCH_CHECK_VALUE(t >= 0 && t < rule.classes, "a target is ", t, ", outside [0, ", rule.classes,
                      ") and not the ignore index ", rule.ignore, "; check the masks");
    TORCH_CHECK_VALUE(p >= 0 && p < rule.classes, "a prediction is ", p, ", outside [0, ", rule.classes,
                      ") where the target counts; check the masks");
  }
}

// Counts the cells in last_turn + 1 (one or four) tables of `span` counters each.
void count_cells(const int32_t* cells, int64_t n, int64_t span, int64_t last_turn, int64_t* tables) {
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    int32_t differs = 0;
    for (int64_t j = 1; j < kRun; ++j) differs |= cells[i] ^ cells[i + j];
    if (differs == 0) {
      tables[cells[i]] += kRun;
    } else {
      for (int64_t j = 0; j < kRun; ++j) ++tables[(j & last_turn) * span + cells[i + j]];
    }
  }
  for (; i < n; ++i) ++tables[cells[i]];
}

template <typename P, typename T>
at::Tensor confusion_of(const at::Tensor& pred, const at::Tensor& target, const Rule& rule, bool per_image) {
  const int64_t images = per_image ? target.size(0) : 1, squared = rule.classes * rule.classes;
  const int64_t pixels = images > 0 ? target.numel() / images : 0, chunks = (pixels + kChunk - 1) / kChunk;
  const int64_t span = squared + 1, turns = rule.classes <= kSmall ? 4 : 1;
  at::Tensor matrix = at::zeros({images, rule.classes, rule.classes}, target.options().dtype(at::kLong));
  int64_t* sums = matrix.data_ptr<int64_t>();
  const P* preds = pred.const_data_ptr<P>();
  const T* targets = target.const_data_ptr<T>();
  std::mutex merging;
  at::parallel_for(0, images * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> tables(span * turns, 0);
    int32_t cells[kBlock];
    const auto flush = [&](int64_t image) {
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t turn = 0; turn < turns; ++turn)
        for (int64_t cell = 0; cell < squared; ++cell)
          sums[image * squared + cell] += tables[turn * span + cell];
      std::fill(tables.begin(), tables.end(), 0);
    };
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / chunks, start = item % chunks * kChunk;
      const int64_t stop = std::min(pixels, start + kChunk);
      for (int64_t at = start; at < stop; at += kBlock) {
        const int64_t n = std::min(kBlock, stop - at), first = image * pixels + at;
        if (find_cells(preds + first, targets + first, n, rule, cells))
          report_outside(preds + first, targets + first, n, rule);
        count_cells(cells, n, span, turns - 1, tables.data());
      }
      if (item + 1 == end || (item + 1) / chunks != image) flush(image);
    }
  });
  return per_image ? matrix : matrix[0];
}

at::Tensor confusion(const at::Tensor& pred, const at::Tensor& target, int64_t classes, int64_t ignore,
                     bool per_image, bool ignore_both) {
  const Rule rule{classes, ignore, ignore_both};
  const at::Tensor p = pred.contiguous(), t = target.contiguous();
  const bool narrow_p = p.scalar_type() == at::kByte, narrow_t = t.scalar_type() == at::kByte;
  if (narrow_p && narrow_t) return confusion_of<uint8_t, uint8_t>(p, t, rule, per_image);
  if (narrow_p) return confusion_of<uint8_t, int64_t>(p, t, rule, per_image);
  if (narrow_t) return confusion_of<int64_t, uint8_t>(p, t, rule, per_image);
  return confusion_of<int64_t, int64_t>(p, t, rule, per_image);
}

}  // namespace
}  // namespace stpp

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) { m.impl("confusion", &stpp::confusion); }
