// The kernels against a double-precision loop, without Python: for emulators (tests/test_kernels.py builds it for
// aarch64), sanitizers and valgrind. Every tensor has a heap block of its exact size.
//
//   g++ -std=c++17 -O2 tests/kernel_selftest.cc csrc/kernels/{loratrf,grouped,isa_baseline}.cc ...
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "../csrc/kernels/loratrf.h"

using namespace loratrf;

namespace {

uint64_t g_state = 1;

double Random() {  // uniform in [-1, 1]
  g_state = g_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<int64_t>(g_state)) / 9.3e18;
}

float FromHalf(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float value =
      exponent ? ldexpf(static_cast<float>(1024 + mantissa), exponent - 25) : ldexpf(static_cast<float>(mantissa), -24);
  return bits & 0x8000 ? -value : value;
}

uint16_t ToHalf(float value) {  // truncates: good enough for making inputs
  if (fabsf(value) < ldexpf(1, -14)) return 0;
  int exponent;
  const float fraction = frexpf(fabsf(value), &exponent);
  const int mantissa = static_cast<int>(fraction * 2048) & 1023;
  return static_cast<uint16_t>((value < 0) << 15 | (exponent + 14) << 10 | mantissa);
}

struct Tensor {
  Type type;
  std::vector<char> bytes;
  std::vector<double> values;

  Tensor(Type t, int64_t count, double scale) : type(t), bytes(count * (t == Type::kFloat32 ? 4 : 2)), values(count) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(Random() * scale);
      if (type == Type::kFloat32) {
        memcpy(&bytes[i * 4], &value, 4);
      } else {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        const uint16_t half = type == Type::kFloat16 ? ToHalf(value) : static_cast<uint16_t>(bits >> 16);
        memcpy(&bytes[i * 2], &half, 2);
      }
      values[i] = Get(i);
    }
  }

  double Get(int64_t i) const {
    if (type == Type::kFloat32) {
      float value;
      memcpy(&value, &bytes[i * 4], 4);
      return value;
    }
    uint16_t half;
    memcpy(&half, &bytes[i * 2], 2);
    if (type == Type::kFloat16) return FromHalf(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
};

using Values = std::vector<double>;

// in (T,cols) times w (rows,cols) transposed.
Values Times(const Values& in, const Values& w, int64_t T, int64_t rows, int64_t cols) {
  Values out(T * rows);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) out[t * rows + r] += in[t * cols + c] * w[r * cols + c];
    }
  }
  return out;
}

void Serial(void*, size_t count, void (*body)(void*, size_t), void* argument) {
  for (size_t i = count; i-- > 0;) body(argument, i);
}

int g_failures = 0;

void CheckCall(const Isa* isa, Type type, int op, bool prepack, int64_t T, int64_t K, int64_t N, int64_t R, int64_t F) {
  Tensor base(type, T * N, 1), x(type, T * K, 1), A(type, R * K, 1 / sqrt(K)), B(type, N * R, 1), tau(type, N, 1),
      C(type, F * N, 1 / sqrt(N)), D(type, N * F, 1), y(type, T * N, 99);
  std::vector<std::vector<float>> packed;
  const auto weight = [&](const Tensor& w, int64_t rows, int64_t cols) {
    if (!prepack) return Weight{w.bytes.data(), nullptr};
    packed.emplace_back(PackedSize(isa, rows, cols));
    Pack(isa, type, rows, cols, w.bytes.data(), packed.back().data());
    return Weight{w.bytes.data(), packed.back().data()};
  };
  packed.reserve(4);
  const Weight a = weight(A, R, K), b = weight(B, N, R), c = weight(C, F, N), d = weight(D, N, F);
  Call call;
  call.type = type, call.T = T, call.N = N;
  call.filter_input = op == 3 ? FilterInput::kBase : FilterInput::kAdapted;
  call.base = base.bytes.data(), call.y = y.bytes.data();
  if (op != 1) call.K = K, call.R = R, call.x = x.bytes.data(), call.A = a, call.B = b;
  if (op != 0) call.F = F, call.tau = tau.bytes.data(), call.C = c, call.D = d;
  Detail detail;
  const Status status = Run(isa, {Serial, nullptr}, call, &detail);

  Values h = base.values;
  if (op != 1) {
    const Values u = Times(x.values, A.values, T, R, K), add = Times(u, B.values, T, N, R);
    for (size_t i = 0; i < h.size(); ++i) h[i] += add[i];
  }
  Values expected = h;
  if (op != 0) {
    const Values& in = op == 3 ? base.values : h;
    Values v = Times(in, C.values, T, F, N);
    for (int64_t t = 0; t < T; ++t) {
      double square = 0, along = 0, length = 0;
      for (int64_t n = 0; n < N; ++n) {
        square += in[t * N + n] * in[t * N + n];
        along += in[t * N + n] * tau.values[n];
        length += tau.values[n] * tau.values[n];
      }
      const double cosine = along / (std::max(sqrt(square), 1e-8) * std::max(sqrt(length), 1e-8));
      for (int64_t f = 0; f < F; ++f) v[t * F + f] *= std::min(std::max(cosine, 0.0), 1.0);
    }
    const Values add = Times(v, D.values, T, N, F);
    for (size_t i = 0; i < h.size(); ++i) expected[i] += add[i];
  }
  double largest = 1e-30, worst = 0;
  for (int64_t i = 0; i < T * N; ++i) {
    largest = std::max(largest, fabs(expected[i]));
    worst = std::max(worst, fabs(expected[i] - y.Get(i)));
  }
  const double tolerance = type == Type::kFloat32 ? 1e-5 : type == Type::kFloat16 ? 1e-3 : 8e-3;
  if (status == Status::kOk && worst <= tolerance * largest) return;
  ++g_failures;
  printf("FAILED %s type %d op %d prepack %d T %d K %d N %d R %d F %d: status %d, error %g\n", IsaName(isa),
         static_cast<int>(type), op, prepack, static_cast<int>(T), static_cast<int>(K), static_cast<int>(N),
         static_cast<int>(R), static_cast<int>(F), static_cast<int>(status), worst / largest);
}

void Expect(bool holds, const char* what) {
  if (holds) return;
  ++g_failures;
  printf("FAILED %s\n", what);
}

// Rows with adapters of their own are, bit for bit, calls with their slots' weights; and what is wrong is a Status.
void CheckGrouped(const Isa* isa, Type type) {
  const int64_t batch = 5, tokens = 3, K = 19, N = 99, R = 4, F = 3, S = 2;
  Tensor base(type, batch * tokens * N, 1), x(type, batch * tokens * K, 1), A(type, S * R * K, 1),
      B(type, S * N * R, 1), tau(type, S * N, 1), C(type, S * F * N, 1), D(type, S * N * F, 1),
      y(type, batch * tokens * N, 99), row(y);
  const int64_t ids[batch] = {1, -1, 0, 1, 0};
  Call call;
  call.type = type, call.T = batch * tokens, call.batch = batch, call.S = S;
  call.K = K, call.N = N, call.R = R, call.F = F;
  call.base = base.bytes.data(), call.x = x.bytes.data(), call.y = y.bytes.data(), call.adapter_ids = ids;
  call.A.data = A.bytes.data(), call.B.data = B.bytes.data(), call.tau = tau.bytes.data();
  call.C.data = C.bytes.data(), call.D.data = D.bytes.data();
  Detail detail;
  const auto run = [&](Call changed) { return Run(isa, {Serial, nullptr}, changed, &detail); };
  Expect(run(call) == Status::kOk, "grouped: kOk");
  const int64_t size = type == Type::kFloat32 ? 4 : 2;
  for (int64_t b = 0; b < batch; ++b) {
    const auto at = [&](const Tensor& tensor, int64_t elements) { return tensor.bytes.data() + elements * size; };
    const char* expected = at(base, b * tokens * N);
    if (ids[b] >= 0) {
      Call one = call;
      one.T = tokens, one.S = one.batch = 1, one.adapter_ids = nullptr, one.y = row.bytes.data();
      one.base = expected, one.x = at(x, b * tokens * K), one.tau = at(tau, ids[b] * N);
      one.A.data = at(A, ids[b] * R * K), one.B.data = at(B, ids[b] * N * R);
      one.C.data = at(C, ids[b] * F * N), one.D.data = at(D, ids[b] * N * F);
      Expect(run(one) == Status::kOk, "one row: kOk");
      expected = row.bytes.data();
    }
    Expect(memcmp(at(y, b * tokens * N), expected, tokens * N * size) == 0, "grouped: a row is what it is alone");
  }

  const auto with = [&](auto change) {
    Call changed = call;
    change(changed);
    return run(changed);
  };
  const int64_t bad[batch] = {0, 1, -1, 2, 5};
  Expect(with([&](Call& c) { c.adapter_ids = bad; }) == Status::kBadAdapterId && detail.bad_row == 3, "bad id");
  Expect(with([](Call& c) { c.adapter_ids = nullptr; }) == Status::kBadSize, "rows without ids");
  Expect(with([](Call& c) { c.T = 16; }) == Status::kBadSize, "rows of unequal length");
  Expect(with([](Call& c) { c.T = -5; }) == Status::kBadSize, "negative T");
  Expect(with([](Call& c) { c.K = 0; }) == Status::kBadSize, "K = 0");
  Expect(with([](Call& c) { c.R = kMaxRank + 1; }) == Status::kRankTooHigh, "R over the limit");
  Expect(with([](Call& c) { c.F = kMaxRank + 1; }) == Status::kRankTooHigh, "F over the limit");
  Expect(with([](Call& c) { c.D.data = nullptr; }) == Status::kNullPointer, "no D");
  Expect(with([](Call& c) { c.y = nullptr; }) == Status::kNullPointer, "no y");
  const auto alone = [](Call& c) { c.T = 3, c.S = c.batch = 1, c.adapter_ids = nullptr, c.R = c.F = 0; };
  Expect(with(alone) == Status::kBadSize, "one adapter with neither half");
}

}  // namespace

int main() {
  const int64_t sizes[][5] = {{1, 1, 1, 1, 1},     {1, 19, 99, 1, 3},   {3, 99, 19, 5, 2},     {4, 600, 99, 19, 16},
                              {5, 99, 600, 8, 33}, {19, 64, 300, 4, 8}, {33, 300, 513, 19, 7}, {70, 99, 99, 16, 65}};
  int checks = 0;
  for (const char* name : {"baseline", "avx2", "avx512", "lanes16"}) {
    const Isa* isa = FindIsa(name);
    if (!isa) continue;
    for (Type type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16}) {
      CheckGrouped(isa, type);
      ++checks;
      for (int op = 0; op < 4; ++op) {
        for (const auto& s : sizes) {
          for (bool prepack : {false, true}) {
            CheckCall(isa, type, op, prepack, s[0], s[1], s[2], s[3], s[4]);
            ++checks;
          }
        }
      }
    }
  }
  if (!g_failures) printf("all passed: %d checks\n", checks);
  return g_failures != 0;
}
