#include "check.h"

#include <algorithm>

namespace loratrf {
namespace {

// One operator's shapes on the way to a verdict.
class Checker {
 public:
  Checker(Op op, const std::vector<Input>& inputs, int64_t max_rank)
      : info_(InfoOf(op)), inputs_(inputs), max_rank_(max_rank), grouped_(op == Op::kGroupedLoraTrf) {}

  // Input `index` is (...,size); a size below 1 is learnt from it. Its leading dimensions are those of input 0.
  bool Tokens(size_t index, const char* letter, int64_t* size) {
    const Shape& shape = inputs_[index].shape;
    if (shape.empty() || shape.back() < 1) return Fail(index, std::string("(..., ") + letter + ") with tokens last");
    *size = shape.back();
    const Shape& first = inputs_[0].shape;
    if (!std::equal(shape.begin(), shape.end() - 1, first.begin(), first.end() - 1)) {
      return Fail(index, std::string("the leading dimensions of ") + info_.inputs[0]);
    }
    return true;
  }

  // Input `index` is (size), grouped (S,size).
  bool Vector(size_t index, const char* letter, int64_t size) {
    if (inputs_[index].shape == Expected({size})) return true;
    return Fail(index, Letters({Letter(letter, size)}));
  }

  // Input `index` is (rows, cols), grouped (S, rows, cols); the one of them that is negative is the rank, learnt from
  // it. A grouped call's first weight tells S.
  bool Matrix(size_t index, const char* row_letter, int64_t* rows, const char* col_letter, int64_t* cols) {
    const Shape& shape = inputs_[index].shape;
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
      fault_ = {Status::kRankTooHigh,
                std::string(info_.name) + ": " + info_.inputs[index] + " " + Describe(shape) + " has rank " +
                    std::to_string(value) + ", the kernels take at most " + std::to_string(max_rank_) +
                    ". Open the model without the custom-op library: it runs as standard operators."};
      return false;
    }
    if (rank) *rank = value;
    return true;
  }

  // Input `index` is (batch), the first dimension of input 0, which has another one before its features.
  bool AdapterIds(size_t index, int64_t* batch) {
    if (inputs_[0].shape.size() < 2) return Fail(0, "(batch, ..., N) with a batch row each for adapter_ids");
    *batch = inputs_[0].shape[0];
    if (inputs_[index].shape == Shape{*batch}) return true;
    return Fail(index, "(batch = " + std::to_string(*batch) + "), one adapter for each row of base");
  }

  // T: the product of input 0's leading dimensions.
  bool CountTokens(int64_t* tokens) {
    const Shape& shape = inputs_[0].shape;
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
  const Fault& fault() const { return fault_; }

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
    std::string text = std::string(info_.name) + ": " + info_.inputs[index] + " is " + Describe(inputs_[index].shape) +
                       ", expected " + expected + ". Shapes:";
    for (size_t i = 0; i < inputs_.size(); ++i) {
      text += std::string(i ? ", " : " ") + info_.inputs[i] + " " + Describe(inputs_[i].shape);
    }
    fault_ = {Status::kBadSize, text + "."};
    return false;
  }

  const OpInfo& info_;
  const std::vector<Input>& inputs_;
  const int64_t max_rank_;
  const bool grouped_;
  int64_t slots_ = -1;  // S, once a weight has told it
  Fault fault_;
};

}  // namespace

Fault CheckShapes(Op op, const std::vector<Input>& inputs, int64_t max_rank, Call* call) {
  Checker check(op, inputs, max_rank);
  Call sizes;
  if (op != Op::kTaskFilter) sizes.R = -1;  // not known yet
  if (op != Op::kLowRank) sizes.F = -1;
  bool fits = check.Tokens(0, "N", &sizes.N);
  if (op != Op::kTaskFilter) {
    fits = fits && check.Tokens(1, "K", &sizes.K) && check.Matrix(2, "R", &sizes.R, "K", &sizes.K) &&
           check.Matrix(3, "N", &sizes.N, "R", &sizes.R);
  }
  if (op != Op::kLowRank) {
    const size_t tau = TauOf(op);
    fits = fits && check.Vector(tau, "N", sizes.N) && check.Matrix(tau + 1, "F", &sizes.F, "N", &sizes.N) &&
           check.Matrix(tau + 2, "N", &sizes.N, "F", &sizes.F);
  }
  if (op == Op::kGroupedLoraTrf) fits = fits && check.AdapterIds(7, &sizes.batch);
  fits = fits && check.CountTokens(&sizes.T);
  if (!fits) return check.fault();
  call->T = sizes.T, call->K = sizes.K, call->N = sizes.N, call->R = sizes.R, call->F = sizes.F;
  call->batch = sizes.batch, call->S = op == Op::kGroupedLoraTrf ? check.slots() : 1;
  return {};
}

Fault ParseFilterInput(Op op, const std::string& text, FilterInput* out) {
  if (text == "adapted" || text == "base") {
    *out = text == "base" ? FilterInput::kBase : FilterInput::kAdapted;
    return {};
  }
  // A stranger's text: keep it short and printable.
  std::string shown = text.substr(0, 40);
  std::replace_if(shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return {Status::kBadSetting, std::string(InfoOf(op).name) + ": filter_input is \"" + shown +
                                   (text.size() > shown.size() ? "..." : "") + "\", expected \"adapted\" or \"base\"."};
}

std::string Describe(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

}  // namespace loratrf
