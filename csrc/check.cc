#include "check.h"

#include <stdlib.h>

#include <algorithm>

namespace loratrf {
namespace {

// One operator's shapes on the way to a verdict.
class Checker {
 public:
  Checker(Op op, const std::vector<Shape>& shapes) : info_(InfoOf(op)), shapes_(shapes) {}

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

  bool Vector(size_t index, const char* letter, int64_t size) {
    if (shapes_[index] == Shape{size}) return true;
    return Fail(index, "(" + Letter(letter, size) + ")");
  }

  // Input `index` is (rows, cols); the one of them that is below 1 is the rank, learnt from it.
  bool Matrix(size_t index, const char* row_letter, int64_t* rows, const char* col_letter, int64_t* cols) {
    const Shape& shape = shapes_[index];
    const bool fits = shape.size() == 2 && shape[0] >= 1 && shape[1] >= 1 && (*rows < 1 || shape[0] == *rows) &&
                      (*cols < 1 || shape[1] == *cols);
    if (!fits) return Fail(index, "(" + Letter(row_letter, *rows) + ", " + Letter(col_letter, *cols) + ")");
    int64_t* rank = *rows < 1 ? rows : *cols < 1 ? cols : nullptr;
    const int64_t value = rank == rows ? shape[0] : shape[1];
    if (rank && value > kMaxRank) {
      error_ = std::string(info_.name) + ": " + info_.inputs[index] + " " + Describe(shape) + " has rank " +
               std::to_string(value) + ", the kernels take at most " + std::to_string(kMaxRank) +
               ". Open the model without the custom-op library: it runs as standard operators.";
      return false;
    }
    if (rank) *rank = value;
    return true;
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

  const std::string& error() const { return error_; }

 private:
  static std::string Letter(const char* letter, int64_t size) {
    return size < 1 ? std::string(letter) : std::string(letter) + " = " + std::to_string(size);
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
  std::string error_;
};

}  // namespace

const OpInfo& InfoOf(Op op) {
  static const OpInfo kInfos[] = {
      {"LowRank", {"base", "x", "A", "B"}},
      {"TaskFilter", {"z", "tau", "C", "D"}},
      {"LoraTrf", {"base", "x", "A", "B", "tau", "C", "D"}},
  };
  return kInfos[static_cast<int>(op)];
}

std::string CheckShapes(Op op, const std::vector<Shape>& shapes, Dims* dims) {
  Checker check(op, shapes);
  Dims d;
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
  fits = fits && check.CountTokens(&d.T);
  if (fits) *dims = d;
  return check.error();
}

std::string ParseFilterInput(const std::string& text, FilterInput* out) {
  if (text == "adapted" || text == "base") {
    *out = text == "base" ? FilterInput::kBase : FilterInput::kAdapted;
    return "";
  }
  // A stranger's text: keep it short and printable.
  std::string shown = text.substr(0, 40);
  std::replace_if(shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return "LoraTrf: filter_input is \"" + shown + (text.size() > shown.size() ? "..." : "") +
         "\", expected \"adapted\" or \"base\".";
}

std::string Describe(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

std::string Describe(Op op, Status status) {
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
  }
  return name + "unknown status.";
}

std::string ChooseIsa(const Isa** isa) {
  const char* wanted = getenv("LORATRF_ISA");
  *isa = FindIsa(wanted);
  if (*isa) return "";
  return std::string("LORATRF_ISA is \"") + wanted + "\", which this build or this CPU lacks; unset it for \"" +
         IsaName(FindIsa(nullptr)) + "\", the best one here.";
}

Status Run(Op op, const Isa* isa, ParallelFor parallel, Type type, const Dims& dims, FilterInput filter_input,
           const void* const* t, const float* const* packed, void* y) {
  const auto weight = [&](int i) { return Weight{t[i], packed ? packed[i] : nullptr}; };
  switch (op) {
    case Op::kLowRank:
      return LowRank(isa, parallel, type, dims.T, dims.K, dims.N, dims.R, t[0], t[1], weight(2), weight(3), y);
    case Op::kTaskFilter:
      return TaskFilter(isa, parallel, type, dims.T, dims.N, dims.F, t[0], t[1], weight(2), weight(3), y);
    case Op::kLoraTrf:
      return LoraTrf(isa, parallel, type, dims.T, dims.K, dims.N, dims.R, dims.F, filter_input, t[0], t[1], weight(2),
                     weight(3), t[4], weight(5), weight(6), y);
  }
  return Status::kBadSize;
}

}  // namespace loratrf
