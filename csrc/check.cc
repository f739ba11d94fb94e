#include "check.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>

namespace loratrf {
namespace {

// One operator's shapes on the way to a verdict.
class Checker {
 public:
  Checker(Op op, const std::vector<Shape>& shapes, int64_t max_rank)
      : info_(InfoOf(op)), shapes_(shapes), max_rank_(max_rank), grouped_(op == Op::kGroupedLoraTrf) {}

  // Input `index` is (...,size); a size below 1 is learnt from it. Its leading dimensions are those of input 0.
  bool Tokens(size_t index, const char* letter, int64_t* size) {
    const Shape& shape = shapes_[index];
    if (shape.empty() || shape.back() < 1) return Fail(index, std::string("(..., ") + letter + ") with tokens last");
    *size = shape.back();
    if (!std::equal(shape.begin(), shape.end() - 1, shapes_[0].begin(), shapes_[0].end() - 1)) {
      return Fail(index, std::string("the leading dimensions of ") + info_.inputs[0]);
    }
    return true;
  }

  // Input `index` is (size), grouped (S,size).
  bool Vector(size_t index, const char* letter, int64_t size) {
    if (shapes_[index] == Expected({size})) return true;
    return Fail(index, Letters({Letter(letter, size)}));
  }

  // Input `index` is (rows, cols), grouped (S, rows, cols); the one of them that is negative is the rank, learnt from
  // it. A grouped call's first weight tells S.
  bool Matrix(size_t index, const char* row_letter, int64_t* rows, const char* col_letter, int64_t* cols) {
    const Shape& shape = shapes_[index];
    const size_t axis = grouped_;  // of rows
    if (grouped_ && slots_ < 0 && shape.size() == 3) slots_ = shape[0];
    int64_t* rank = *rows < 0 ? rows : *cols < 0 ? cols : nullptr;
    int64_t value = rank == rows && shape.size() == axis + 2   ? shape[axis]
                    : rank == cols && shape.size() == axis + 2 ? shape[axis + 1]
                                                               : -1;
    const bool known = !rank || value >= (grouped_ ? 0 : 1);
    if (!known || shape != Expected({rank == rows ? value : *rows, rank == cols ? value : *cols})) {
      return Fail(index, Letters({Letter(row_letter, *rows), Letter(col_letter, *cols)}));
    }
    if (rank && value > max_rank_) {
      error_ = std::string(info_.name) + ": " + info_.inputs[index] + " " + Describe(shape) + " has rank " +
               std::to_string(value) + ", the kernels take at most " + std::to_string(max_rank_) +
               ". Open the model without the custom-op library: it runs as standard operators.";
      return false;
    }
    if (rank) *rank = value;
    return true;
  }

  // Input `index` is (batch), the first dimension of input 0, which has another one before its features.
  bool AdapterIds(size_t index, int64_t* batch) {
    if (shapes_[0].size() < 2) return Fail(0, "(batch, ..., N) with a batch row each for adapter_ids");
    *batch = shapes_[0][0];
    if (shapes_[index] == Shape{*batch}) return true;
    return Fail(index, "(batch = " + std::to_string(*batch) + "), one adapter for each row of base");
  }

  // T: the product of input 0's leading dimensions.
  bool CountTokens(int64_t* tokens) {
    const Shape& shape = shapes_[0];
    *tokens = 1;
    if (std::find(shape.begin(), shape.end() - 1, 0) != shape.end() - 1) {
      *tokens = 0;
      return true;
    }
    for (size_t i = 0; i + 1 < shape.size(); ++i) {
      if (shape[i] < 0 || __builtin_mul_overflow(*tokens, shape[i], tokens)) return Fail(0, "a tensor's shape");
    }
    return true;
  }

  int64_t slots() const { return slots_ < 0 ? 0 : slots_; }
  const std::string& error() const { return error_; }

 private:
  static std::string Letter(const char* letter, int64_t size) {
    return size < 0 ? std::string(letter) : std::string(letter) + " = " + std::to_string(size);
  }

  // A weight's shape with the slots before it, where there are slots.
  Shape Expected(Shape shape) const {
    if (grouped_) shape.insert(shape.begin(), slots_);
    return shape;
  }

  std::string Letters(std::vector<std::string> letters) const {
    if (grouped_) letters.insert(letters.begin(), Letter("S", slots_));
    std::string text = "(";
    for (size_t i = 0; i < letters.size(); ++i) text += (i ? ", " : "") + letters[i];
    return text + ")";
  }

  bool Fail(size_t index, const std::string& expected) {
    error_ = std::string(info_.name) + ": " + info_.inputs[index] + " is " + Describe(shapes_[index]) + ", expected " +
             expected + ". Shapes:";
    for (size_t i = 0; i < shapes_.size(); ++i) {
      error_ += std::string(i ? ", " : " ") + info_.inputs[i] + " " + Describe(shapes_[i]);
    }
    error_ += ".";
    return false;
  }

  const OpInfo& info_;
  const std::vector<Shape>& shapes_;
  const int64_t max_rank_;
  const bool grouped_;
  int64_t slots_ = -1;  // S, once a weight has told it
  std::string error_;
};

std::string WordBadId(const int64_t* adapter_ids, int64_t row, int64_t slots) {
  return "GroupedLoraTrf: adapter_ids[" + std::to_string(row) + "] is " + std::to_string(adapter_ids[row]) +
         ", expected -1 (base alone) to " + std::to_string(slots - 1) + " (" + std::to_string(slots) + " slots).";
}

std::string Word(Op op, Status status) {
  const std::string name = std::string(InfoOf(op).name) + ": ";
  switch (status) {
    case Status::kOk:
      return "";
    case Status::kBadSize:
      return name + "a dimension is out of range.";
    case Status::kRankTooHigh:
      return name + "a rank is over " + std::to_string(kMaxRank) + ".";
    case Status::kNullPointer:
      return name + "a tensor has no data.";
    case Status::kOutOfMemory:
      return name + "no memory for scratch.";
    case Status::kBadAdapterId:
      return name + "an adapter id is out of range.";
    case Status::kDevice:
      return name + "the GPU reports an error.";
  }
  return name + "unknown status.";
}

}  // namespace

const OpInfo& InfoOf(Op op) {
  static const OpInfo kInfos[] = {
      {"LowRank", {"base", "x", "A", "B"}},
      {"TaskFilter", {"z", "tau", "C", "D"}},
      {"LoraTrf", {"base", "x", "A", "B", "tau", "C", "D"}},
      {"GroupedLoraTrf", {"base", "x", "A", "B", "tau", "C", "D", "adapter_ids"}},
  };
  return kInfos[static_cast<int>(op)];
}

bool HasFilterInput(Op op) { return op == Op::kLoraTrf || op == Op::kGroupedLoraTrf; }

bool IsWeight(const char* input) { return input[1] == '\0' && input[0] >= 'A' && input[0] <= 'D'; }

bool IsAdapterIds(const char* input) { return strcmp(input, "adapter_ids") == 0; }

std::string CheckShapes(Op op, const std::vector<Shape>& shapes, Dims* dims, int64_t max_rank) {
  Checker check(op, shapes, max_rank);
  Dims d;
  (op == Op::kTaskFilter ? d.F : d.R) = -1;  // not known yet
  if (op != Op::kLowRank) d.F = -1;
  bool fits = check.Tokens(0, "N", &d.N);
  if (op != Op::kTaskFilter) {
    fits = fits && check.Tokens(1, "K", &d.K) && check.Matrix(2, "R", &d.R, "K", &d.K) &&
           check.Matrix(3, "N", &d.N, "R", &d.R);
  }
  if (op != Op::kLowRank) {
    const size_t tau = op == Op::kTaskFilter ? 1 : 4;
    fits = fits && check.Vector(tau, "N", d.N) && check.Matrix(tau + 1, "F", &d.F, "N", &d.N) &&
           check.Matrix(tau + 2, "N", &d.N, "F", &d.F);
  }
  if (op == Op::kGroupedLoraTrf) fits = fits && check.AdapterIds(7, &d.batch);
  fits = fits && check.CountTokens(&d.T);
  d.S = check.slots();
  if (fits) *dims = d;
  return check.error();
}

std::string ParseFilterInput(Op op, const std::string& text, FilterInput* out) {
  if (text == "adapted" || text == "base") {
    *out = text == "base" ? FilterInput::kBase : FilterInput::kAdapted;
    return "";
  }
  // A stranger's text: keep it short and printable.
  std::string shown = text.substr(0, 40);
  std::replace_if(shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return std::string(InfoOf(op).name) + ": filter_input is \"" + shown + (text.size() > shown.size() ? "..." : "") +
         "\", expected \"adapted\" or \"base\".";
}

std::string Describe(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

std::string ChooseIsa(const Isa** isa) {
  const char* wanted = getenv("LORATRF_ISA");
  *isa = FindIsa(wanted);
  if (*isa) return "";
  return std::string("LORATRF_ISA is \"") + wanted + "\", which this build or this CPU lacks; unset it for \"" +
         IsaName(FindIsa(nullptr)) + "\", the best one here.";
}

namespace {

Call CallOf(Op op, Type type, const Dims& dims, FilterInput filter_input, const void* const* t,
            const float* const* packed, void* y) {
  const auto weight = [&](int i) { return Weight{t[i], packed ? packed[i] : nullptr}; };
  Call call;
  call.type = type, call.filter_input = filter_input;
  call.T = dims.T, call.K = dims.K, call.N = dims.N, call.R = dims.R, call.F = dims.F;
  call.base = t[0], call.y = y;
  if (op != Op::kTaskFilter) call.x = t[1], call.A = weight(2), call.B = weight(3);
  const int tau = op == Op::kTaskFilter ? 1 : 4;
  if (op != Op::kLowRank) call.tau = t[tau], call.C = weight(tau + 1), call.D = weight(tau + 2);
  if (op == Op::kGroupedLoraTrf) {
    call.adapter_ids = static_cast<const int64_t*>(t[7]);
    call.batch = dims.batch, call.S = dims.S;
  }
  return call;
}

std::string Word(Op op, const Call& call, Status status, const Detail& detail) {
  if (status == Status::kBadAdapterId) return WordBadId(call.adapter_ids, detail.bad_row, call.S);
  if (status != Status::kDevice) return Word(op, status);
  return std::string(InfoOf(op).name) + ": CUDA reports \"" + detail.message +
         "\", of this launch or of work queued before it.";
}

}  // namespace

Status Run(Op op, const Isa* isa, ParallelFor parallel, Type type, const Dims& dims, FilterInput filter_input,
           const void* const* tensors, const float* const* packed, void* y, std::string* error) {
  const Call call = CallOf(op, type, dims, filter_input, tensors, packed, y);
  Detail detail;
  const Status status = Run(isa, parallel, call, &detail);
  if (status != Status::kOk) *error = Word(op, call, status, detail);
  return status;
}

#ifdef LORATRF_WITH_CUDA
Status RunOnCuda(Op op, Type type, const Dims& dims, FilterInput filter_input, const void* const* tensors, void* y,
                 Allocate allocate, void* stream, std::string* error) {
  const Call call = CallOf(op, type, dims, filter_input, tensors, nullptr, y);
  Detail detail;
  size_t bytes = 0;
  void* scratch = nullptr;
  Status status = CudaScratchSize(call, &bytes, &detail);
  if (status == Status::kOk && bytes) {
    scratch = allocate.run(allocate.self, bytes);
    if (!scratch) status = Status::kOutOfMemory;
  }
  if (status == Status::kOk) status = CudaRun(call, scratch, stream, &detail);
  if (status != Status::kOk) *error = Word(op, call, status, detail);
  return status;
}
#endif

}  // namespace loratrf
